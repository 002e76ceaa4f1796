"""A small training run, for several test files: 24 pieces of photographs, two stages, a tokenizer of 64 patches."""

import copy
import json

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from dyntok.structure import build
from dyntok.training.loop import Trainer
from dyntok.training.recipe import Recipe

WARM, CODES = 24, 12  # steps of the two stages
SAVE_EVERY = 10
EXTRA = {"name": "more", "images": 8, "quantize": True, "weights": {"pixel": 1}}  # a stage that may follow


def write_recipe(folder, photos, config):
    """Writes pieces of photographs to a folder, and returns the values of a recipe with two stages on them."""
    for i, photo in enumerate(photos):
        height, width = (side // 2 for side in photo.shape[:2])
        for j in range(4):
            top, left = j // 2 * height, j % 2 * width
            Image.fromarray(photo[top : top + height, left : left + width]).resize((96, 80)).save(
                folder / f"{i}-{j}.jpg"
            )
    tokenizer = json.loads(json.dumps(config.to_dict()))
    tokenizer["backbone"]["kwargs"]["init_values"] = tokenizer["merger"]["init_scale"] = tokenizer["decoder"][
        "init_scale"
    ] = 0.1
    tokenizer["codebook"]["size"] = 32
    shared = {
        "position_drop": 0.25,
        "masks": {"learned": 0.5, "budget": 0.25, "random": 0.25},
        "weights": {"pixel": 10, "rate": 2, "local": 0.1},
    }
    recipe = {
        "tokenizer": tokenizer,
        "data": [str(folder)],
        "split": "all",
        "batch_size": 4,
        "pca_init": True,
        "optimizer": "muon",
        "seed": 5,
        "workers": 0,
        "precision": "fp32",
        "log_every": 1,
        "save_minutes": 1000,
        "save_every": SAVE_EVERY,
        "stages": [
            {"name": "warm", "images": 4 * WARM, "lr": 3.0e-3, "warmup": 40, **shared},
            {"name": "codes", "images": 4 * CODES - 3, "lr": 1.0e-3, "quantize": True, "decay": "linear", **shared},
        ],
    }
    return json.loads(json.dumps(recipe))  # the stages share nothing


def write_teacher(folder):
    """Writes a small teacher with random weights to a folder, and returns its section of a recipe."""
    options = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
    torch.manual_seed(1)
    save_file(timm.create_model("convnext_atto", **options).state_dict(), folder / "teacher.safetensors")
    return {"name": "convnext_atto", "weights": str(folder / "teacher.safetensors"), "kwargs": options}


def changed(values, stages=(), **options):
    """The recipe's values with other options; stages: pairs of index and other options of that stage."""
    values = copy.deepcopy(values) | options
    for index, other in stages:
        values["stages"][index] |= other
    return values


def trainer(values, folder, **options):
    return Trainer(build(Recipe, values), folder, cpu=True, **options)


class Stop(BaseException):
    """Ends a run as abruptly as an interrupt does."""


def run_until(trainer, step):
    """Run up to and without the step of that number."""
    original = trainer.train_step

    def train_step(*args):
        if trainer.step == step:
            raise Stop
        return original(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(trainer, "train_step", train_step)
        trainer.run()


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def copy_run(source, target):
    for name in ("state.pt", "log.jsonl"):
        (target / name).write_bytes((source / name).read_bytes())
