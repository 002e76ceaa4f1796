"""`encode(psnr=)`: the fewest tokens that reach a quality."""

import json
from dataclasses import replace

import pytest
import torch

import dyntok
from dyntok import CodeError, ConfigError, DynamicVisualTokenizer
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
        assert quality(flex, picture, flex.encode(picture, budget=fewer, places=places)) < TARGET


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


@pytest.mark.parametrize("psnr", [0, -3, True, "20", 1000])
def test_targets_that_make_no_sense(flex, psnr):
    with pytest.raises(ConfigError, match=r"psnr is .*, expected decibels"):
        flex.encode(dyntok.example_image(), psnr=psnr)


def test_a_target_is_a_rule_of_its_own(flex):
    with pytest.raises(ConfigError, match="budget and psnr were both given"):
        flex.encode(dyntok.example_image(), psnr=20.0, budget=10)


def test_a_tokenizer_that_makes_no_pictures_cannot_aim_at_a_quality(flex, photos):
    config = replace(flex.config, decoder=replace(flex.config.decoder, pixels=False))
    with pytest.raises(CodeError, match="no pixel head"):
        DynamicVisualTokenizer(config).encode(photos[0], psnr=20.0)
