"""`encode(psnr=)`: the fewest tokens that reach a quality."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

import dyntok
from dyntok import ConfigError, DynamicVisualTokenizer
from dyntok.cli.main import main
from dyntok.image import to_pixels
from dyntok.target import visible_psnr

TARGET = 18.0


@pytest.fixture(scope="module")
def flex():
    return dyntok.load()


@pytest.fixture(scope="module")
def pictures(photos):
    return photos[:4]


def quality(tokenizer, picture, encoding):
    config = tokenizer.image_config()
    return float(visible_psnr(tokenizer.decode_to_pixels(encoding), to_pixels(picture, config)[None], config))


@pytest.mark.parametrize("places", ["map", "lattice", "free"])
def test_the_target_is_reached_and_not_with_far_fewer_tokens(flex, pictures, places):
    for picture in pictures:
        encoding = flex.encode(picture, psnr=TARGET, places=places)
        assert quality(flex, picture, encoding) >= TARGET
        fewer = max(1, round(0.8 * encoding.num_tokens))
        reached = quality(flex, picture, flex.encode(picture, budget=fewer, places=places))
        assert reached < TARGET + 0.1  # quality takes small steps back


def test_a_higher_target_takes_more_tokens(flex, pictures):
    lengths = torch.stack([flex.encode(pictures, psnr=target).lengths for target in (18.0, 20.0, 22.0)])
    assert (lengths[1:] >= lengths[:-1]).all() and (lengths[2] > lengths[0]).all()
    assert len(set(lengths[1].tolist())) > 1  # the length follows the picture


def test_an_image_that_cannot_reach_the_target_keeps_what_is_allowed(flex, pictures):
    rows, columns = flex.encode(pictures[0], budget=1).grids[0].tolist()
    assert flex.encode(pictures[0], psnr=60).num_tokens == rows * columns
    assert flex.encode(pictures[0], psnr=60, max_tokens=17).num_tokens == 17


def test_images_together_and_alone_give_the_same_codes(flex, pictures):
    together = flex.encode(pictures, psnr=TARGET)
    for i, picture in enumerate(pictures):
        assert torch.equal(together.codes[i], flex.encode(picture, psnr=TARGET).codes[0])


def test_the_command_line_takes_a_target(flex, tmp_path, capsys):
    path = tmp_path / "example.png"
    dyntok.example_image().save(path)
    assert main(["encode", str(path), "--psnr", str(TARGET), "-o", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["codes"][0] == flex.encode(path, psnr=TARGET).codes[0].tolist()


def test_the_command_line_counts_the_pictures_that_miss_the_target(tmp_path, capsys):
    picture, plain = dyntok.example_image(), Image.new("RGB", (128, 128))
    (tmp_path / "in").mkdir()
    for name, image in (("a", picture), ("b", plain)):
        image.save(tmp_path / "in" / f"{name}.png")
    names = [str(tmp_path / "in" / name) for name in ("a.png", "b.png")]
    told = "1 of 2 images may not reach the psnr, even with all the patches allowed\n"
    assert main(["encode", *names, "--psnr", "35"]) == 0 and told in capsys.readouterr().out
    assert main(["encode", *names, "--psnr", "35", "-o", "-"]) == 0 and told in capsys.readouterr().err
    assert main(["encode", *names, "--psnr", "10"]) == 0 and "may not reach" not in capsys.readouterr().out
    assert main(["encode", *names, "--budget", "256"]) == 0 and "may not reach" not in capsys.readouterr().out
    command = ["batch", str(tmp_path / "in"), "--workers", "0"]
    assert main([*command, str(tmp_path / "out"), "--psnr", "35", "--max-tokens", "99"]) == 0
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("psnr", [0, -3, True, "20", 1000])
def test_targets_that_make_no_sense(flex, psnr):
    with pytest.raises(ConfigError, match=r"psnr is .*, expected decibels"):
        flex.encode(dyntok.example_image(), psnr=psnr)


def test_a_target_is_a_rule_of_its_own(flex):
    with pytest.raises(ConfigError, match="budget and psnr were both given"):
        flex.encode(dyntok.example_image(), psnr=20.0, budget=10)


def test_a_tokenizer_that_makes_no_pictures_cannot_aim_at_a_quality(flex, photos):
    config = replace(flex.config, decoder=replace(flex.config.decoder, pixels=False))
    with pytest.raises(ConfigError, match="psnr is .*, but this tokenizer has no pixel head"):
        DynamicVisualTokenizer(config).encode(photos[0], psnr=20.0)
