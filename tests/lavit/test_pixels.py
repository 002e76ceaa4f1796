"""Codes to pictures in one call, with a diffusion model of toy size in the released folder layout."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support.lavit_files import write_release

import dyntok
from dyntok import CheckpointError, ConfigError
from dyntok.cli.main import main
from dyntok.lavit.convert import convert
from dyntok.loading import EXAMPLE_IMAGE

pytest.importorskip("diffusers")
from support import diffusion_files  # noqa: E402


@pytest.fixture(scope="module")
def release(parity, tmp_path_factory):
    """Released files whose U-Nets fit the fixture's conditioning.

    24 wide in the 512 px style; 24 + 40 wide and pooled to 40 in the 1024 px style.
    """
    folder = write_release(parity, tmp_path_factory.mktemp("release"))
    diffusion_files.write_release(folder / "pixel_decoding", cross_attention_dim=24)
    diffusion_files.write_release(
        folder / "highres_pixel_decoding",
        sdxl=True,
        cross_attention_dim=64,
        projection_class_embeddings_input_dim=40 + 6 * 4,
    )
    return folder


@pytest.fixture(scope="module")
def tokenizer(release, parity):
    return dyntok.load(release, config=parity.config)


def seeded():
    return torch.Generator().manual_seed(3)


def test_decode_gives_pictures(tokenizer, parity):
    enc = tokenizer.encode_tensor(parity["io/pixels"])
    images = tokenizer.decode(enc, steps=2, generator=seeded())
    assert len(images) == 5 and all(isinstance(image, Image.Image) and image.size == (8, 8) for image in images)
    again = tokenizer.decode([row.tolist() for row in enc.codes], steps=2, generator=seeded(), batch_size=3)
    assert [image.tobytes() for image in again] == [image.tobytes() for image in images]
    diffusion, conditions = tokenizer._diffusion_decoder(False), tokenizer.decode_to_conditioning(enc)
    expected = diffusion(*conditions, steps=2, generator=seeded())
    assert np.array_equal(np.asarray(images[4]), (expected[4] * 255).round().permute(1, 2, 0).numpy())
    assert len(tokenizer.decode(enc[0])) == 1  # with no other argument
    photo = dyntok.example_image().crop((0, 0, 90, 40))
    assert tokenizer.decode(tokenizer.encode(photo), size="original", steps=1)[0].size == (90, 40)


def test_decode_at_six_aspect_ratios(tokenizer, parity):
    enc = tokenizer.encode_tensor(parity["io/pixels"][:1])
    sizes = tokenizer._diffusion_decoder(True).sizes
    assert len(sizes) == 6
    for height, width in sizes:
        (image,) = tokenizer.decode(enc, highres=True, size=(height, width), steps=1, generator=seeded())
        assert image.size == (width, height)
    with pytest.raises(ConfigError, match=r"size is \(1, 1\), expected \(height, width\), one of"):
        tokenizer.decode(enc, highres=True, size=(1, 1))


def test_the_import_takes_the_diffusion_models_along_without_pickles(release, tokenizer, parity, tmp_path):
    config = ["--config", json.dumps(parity.config)]
    assert main(["import-lavit", str(release), str(tmp_path / "all"), *config]) == 0
    assert (
        not list((tmp_path / "all").rglob("*.bin")) and (tmp_path / "all" / "highres_pixel_decoding" / "unet").is_dir()
    )
    again = dyntok.load(tmp_path / "all")
    enc = again.encode_tensor(parity["io/pixels"][:2])
    for options in ({}, {"highres": True}):
        pictures = [tok.decode(enc, steps=1, generator=seeded(), **options) for tok in (again, tokenizer)]
        assert [image.tobytes() for image in pictures[0]] == [image.tobytes() for image in pictures[1]]
    assert main(["import-lavit", str(release), str(tmp_path / "some"), *config, "--parts", "decoder"]) == 0
    some = dyntok.load(tmp_path / "some")
    with pytest.raises(CheckpointError, match="has no folder pixel_decoding"):
        some.decode(enc)
    with pytest.raises(ConfigError, match="this tokenizer has no highres decoder"):
        some.decode(enc, highres=True)


def test_through_the_command_line(release, parity, tmp_path):
    folder, codes = tmp_path / "all", tmp_path / "codes.json"
    convert(release, folder, config=parity.config)
    assert main(["encode", str(EXAMPLE_IMAGE), "--model", str(folder), "-o", str(codes)]) == 0
    assert main(["decode", str(codes), "--model", str(folder), "-o", str(tmp_path / "out.png")]) == 0
    assert Image.open(tmp_path / "out.png").size == (8, 8)


def test_only_lavits_tokenizer_has_diffusion_options():
    tiny = dyntok.load()
    for options in ({"steps": 3}, {"highres": True}, {"guidance": 2.0}):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(options))}'"):
            tiny.decode([[1]], **options)


def test_pickles_next_to_an_ordinary_checkpoint_are_not_read(release, parity, tmp_path):
    convert(release, tmp_path / "own", config=parity.config, parts=["decoder"])
    shutil.copytree(release / "pixel_decoding", tmp_path / "own" / "pixel_decoding")
    own = dyntok.load(tmp_path / "own")
    with pytest.raises(CheckpointError, match="can't load UNet2DConditionModel"):
        own.decode([[1]])


def test_a_saved_copy_takes_its_diffusion_model_along(release, tokenizer, parity, tmp_path):
    convert(release, tmp_path / "a", config=parity.config)
    dyntok.load(tmp_path / "a").save_pretrained(tmp_path / "b")
    again = dyntok.load(tmp_path / "b")
    enc = again.encode_tensor(parity["io/pixels"][:1])
    pictures = [tok.decode(enc, steps=1, generator=seeded())[0].tobytes() for tok in (again, tokenizer)]
    assert pictures[0] == pictures[1]


def test_diffusion_models_follow_the_tokenizer(release, parity):
    tokenizer = dyntok.load(release, config=parity.config)
    assert tokenizer._diffusion_decoder(False).unet.dtype == torch.float32
    assert tokenizer._diffusion_decoder(False) is tokenizer._diffusion_decoder(False)
    assert tokenizer.double()._diffusion_decoder(False).unet.dtype == torch.float64
