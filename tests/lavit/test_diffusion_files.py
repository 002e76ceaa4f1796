"""Folders of diffusion models that are damaged, hostile or of another kind: each is refused, and the error says why."""

import functools
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from support.hostile import Hostile

from dyntok.errors import CheckpointError, ConfigError, MissingDependencyError
from dyntok.lavit.diffusion import DiffusionDecoder

diffusers = pytest.importorskip("diffusers")
from support.diffusion_files import STORED, WIDTH, write_release  # noqa: E402

load = functools.partial(DiffusionDecoder.load, pickles=True)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return write_release(tmp_path_factory.mktemp("pixel_decoding"))


@pytest.fixture
def copied(release, tmp_path):
    return shutil.copytree(release, tmp_path / "copy")


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


DAMAGE = {
    "no unet": (lambda f: shutil.rmtree(f / "unet"), "unet is missing, expected folders unet, vae and scheduler"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler is missing"),
    "no config": (lambda f: os.remove(f / "vae" / "config.json"), "can't load AutoencoderKL from .*config.json"),
    "no weights": (lambda f: os.remove(f / "unet" / "diffusion_pytorch_model.bin"), "diffusion_pytorch_model.bin"),
    "cut pickle": (
        lambda f: os.truncate(f / "unet" / "diffusion_pytorch_model.bin", 999),
        "can't load UNet2DConditionModel from .*unet",
    ),
    "broken json": (lambda f: (f / "unet" / "config.json").write_text("{"), "can't load UNet2DConditionModel"),
    "another list": (
        lambda f: torch.save([1], f / "unet" / "diffusion_pytorch_model.bin"),
        "can't load UNet2DConditionModel",
    ),
    "few tensors": (
        lambda f: torch.save({"conv_in.bias": torch.zeros(8)}, f / "unet" / "diffusion_pytorch_model.bin"),
        r"unet lack \d\d+ tensors that config.json asks for, such as conv_in.weight|keys are missing",  # by the version
    ),
    "other width": (
        lambda f: edit_json(f / "unet" / "config.json", cross_attention_dim=32),
        "can't load UNet2DConditionModel",
    ),
    "absurd config": (
        lambda f: edit_json(f / "unet" / "config.json", down_block_types=["Nonsense"]),
        "can't load UNet2DConditionModel",
    ),
    "absurd schedule": (
        lambda f: edit_json(f / "scheduler" / "scheduler_config.json", beta_schedule="no"),
        "can't load DDIMScheduler",
    ),
    "other kind": (
        lambda f: edit_json(f / "unet" / "config.json", sample_size=None),
        "sample_size is None, expected a positive",
    ),
    "narrow uncond": (
        lambda f: torch.save(torch.zeros(3, 9), f / "uncond_embeddings.bin"),
        r"float32 \[3, 9\], expected floats \[L, 24\]",
    ),
    "two unconds": (
        lambda f: torch.save(torch.zeros(2, 3, WIDTH), f / "uncond_embeddings.bin"),
        r"float32 \[2, 3, 24\]",
    ),
    "no row": (lambda f: torch.save(torch.zeros(0, WIDTH), f / "uncond_embeddings.bin"), r"float32 \[0, 24\]"),
    "uncond list": (lambda f: torch.save([1], f / "uncond_embeddings.bin"), "holds a list, expected one tensor"),
    "cut uncond": (lambda f: os.truncate(f / "uncond_embeddings.bin", 99), "can't read .*uncond_embeddings.bin"),
    "other key": (
        lambda f: save_file({"a": torch.zeros(3, WIDTH)}, f / "uncond_embeddings.safetensors"),
        "can't read .*KeyError",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused(copied, damage):
    spoil, message = DAMAGE[damage]
    spoil(copied)
    with pytest.raises(CheckpointError, match=message):
        load(copied, dtype=torch.float16)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("dtype", [torch.int8, "float16", None])
def test_networks_have_a_floating_dtype(release, dtype):
    with pytest.raises(ConfigError, match="dtype is .*, expected one of torch.float16"):
        load(release, dtype=dtype)


@pytest.mark.parametrize(
    "unet, vae, message",
    [
        ({"addition_embed_type": "text", "encoder_hid_dim": WIDTH}, {}, "addition_embed_type is 'text'"),
        ({"in_channels": 9}, {}, r"have \(9, 4, 4\) latent channels"),
        ({}, {"latent_channels": 8}, r"have \(4, 4, 8\) latent channels"),
        ({}, {"out_channels": 1}, "the VAE makes 1 channels, expected 3"),
        ({"sample_size": (4, 4)}, {}, "sample_size is .*4, 4.*, expected a positive whole number"),
    ],
)
def test_networks_of_another_kind_are_refused(tmp_path, unet, vae, message):
    folder = write_release(tmp_path, vae=vae, **unet)
    torch.save(torch.zeros(STORED, WIDTH), folder / "uncond_embeddings.bin")
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.bin", "uncond_embeddings.bin"])
def test_code_in_a_pickle_does_not_run(copied, tmp_path, name, form):
    touched = tmp_path / "touched"
    if form == "bare":
        (copied / name).write_bytes(pickle.dumps(Hostile(touched), protocol=2))
    else:
        torch.save({"conv_in.weight": Hostile(touched)}, copied / name, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=name.rsplit("/", 1)[0]) as refusal:
        load(copied)
    assert not touched.exists() and "weights_only" not in str(refusal.value)
    if form == "bare":
        pickle.loads((copied / name).read_bytes())
        assert touched.exists()  # it would have


def test_diffusers_is_loaded_late_and_its_lack_named(release, monkeypatch):
    code = "import sys, dyntok.lavit.diffusion; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingDependencyError, match=r"diffusers is not installed.*dyntok\[diffusion\]"):
        load(release)
