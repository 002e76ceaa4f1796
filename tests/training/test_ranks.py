"""Two processes on gloo train as one process with the whole batch does."""

import json
import os
import shutil
import socket

import pytest
import torch
import torch.multiprocessing
from PIL import Image
from support.small_run import write_teacher

from dyntok.structure import build
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.training import bank
from dyntok.training.crops import Crops
from dyntok.training.data import TrainingImages
from dyntok.training.loop import Trainer
from dyntok.training.recipe import Recipe
from dyntok.training.sources import find_samples

STEPS = 4  # of each stage of the whole run
GPU = torch.accelerator.is_available()  # without one, the trainer itself must choose the CPU
BANK = 8  # pictures: so few that each stage fills it

# masks without chance, and every loss a mean over the images: what two ranks average must be what one computes
CERTAIN = {
    "masks": {"learned": 0, "budget": 1},
    "budgets": [0.5, 0.5],
    "weights": {"pixel": 1, "feature": 1, "rate": 1, "commitment": 0.5},
}
MIXED = {
    "masks": {"learned": 1, "budget": 1, "random": 1},
    "position_drop": 0.5,
    "weights": {"pixel": 1, "rate": 1, "local": 0.1, "semantic": 1, "distill": 1},
}


@pytest.fixture(scope="module")
def values(tmp_path_factory, photos, small_config):
    folder = tmp_path_factory.mktemp("photos")
    for i, photo in enumerate(photos):
        Image.fromarray(photo).resize((96, 80)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"not a photograph")
    tokenizer = json.loads(json.dumps(small_config.to_dict()))
    tokenizer["codebook"]["size"] = 32
    shared = {
        "tokenizer": tokenizer,
        "data": [str(folder)],
        "split": "all",
        "seed": 3,
        "workers": 0,
        "precision": "fp32",
    }
    teacher = write_teacher(tmp_path_factory.mktemp("teacher"))
    certain = {**shared, "stages": [{"images": 100, "quantize": True, **CERTAIN}]}
    stages = [
        {"name": "frozen", "images": 4 * STEPS, "freeze": ["selector", "merger"], **MIXED},
        {"name": "all", "images": 4 * STEPS, "quantize": True, "lr": 1.0e-2, **MIXED},
    ]
    return certain, {**shared, "teacher": teacher, "log_every": STEPS, "save_every": 3, "stages": stages}


def one_step(values, folder, batch_size):
    """Gradients of a first step, and the codebook's statistics after it."""
    recipe = build(Recipe, {**values, "batch_size": batch_size})
    torch.manual_seed(0)
    tokenizer = DynamicVisualTokenizer(recipe.config)
    crops = Crops(recipe.config.image, 4, seed=recipe.seed, min_crop=recipe.min_crop)
    data = TrainingImages(find_samples(recipe.data), crops)
    with torch.no_grad():  # half of the batch's patches are kept, of some images more
        keep, drop = tokenizer.selector(tokenizer.backbone(data[0])).unbind(-1)
        tokenizer.selector.head.bias[0] -= (keep - drop).median()
    trainer = Trainer(recipe, folder, tokenizer=tokenizer, cpu=GPU)
    trainer.objective.codebook_trainer.revive_below = (
        0.0  # picks from candidates by place, and ranks order them otherwise
    )
    gradients = {}
    clip = trainer.accelerator.clip_grad_norm_

    def look_and_clip(parameters, norm):
        gradients.update(
            {name: p.grad.clone() for name, p in trainer.objective.named_parameters() if p.grad is not None}
        )
        return clip(parameters, norm)

    trainer.accelerator.clip_grad_norm_ = look_and_clip
    result = trainer.train_step([trainer.data[0]], recipe.stages[0], 0)
    state = trainer.objective.codebook_trainer
    statistics = {"counts": state.counts, "sums": state.sums, "codebook": tokenizer.codebook.embedding}
    return {"gradients": gradients, **statistics, "codes": result.codes, "lengths": result.lengths}


def work(rank, port, certain, mixed, folder):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    bank._PICTURES = BANK
    step = one_step(certain, folder / "step", batch_size=2)
    trainer = Trainer(build(Recipe, {**mixed, "batch_size": 2}), folder / "run", cpu=GPU)
    before = {name: value.clone() for name, value in trainer.objective.named_parameters()}
    untouched = []
    save = trainer.save

    def look_and_save():
        untouched.append([name for name, p in trainer.objective.named_parameters() if torch.equal(p, before[name])])
        save()

    trainer.save = look_and_save
    kinds = []
    make = trainer.objective._mask

    def look_and_make(choice, log_probs, grid):
        kinds.append((choice.kind, choice.share))
        return make(choice, log_probs, grid)

    trainer.objective._mask = look_and_make
    trainer.run()
    step["kinds"] = kinds
    torch.save({**step, "trained": trainer.objective.state_dict(), "untouched": untouched}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(values, tmp_path_factory):
    """What each of two processes found, and their common folder."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, *values, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)], folder


@pytest.fixture(scope="module")
def alone(values, tmp_path_factory):
    return one_step(values[0], tmp_path_factory.mktemp("alone"), batch_size=4)


def test_gradients_are_those_of_one_process_with_the_whole_batch(ranks, alone):
    (first, second), _ = ranks
    assert first["lengths"].sum() != second["lengths"].sum()  # the rate is of both
    assert set(first["gradients"]) == set(second["gradients"]) == set(alone["gradients"])
    assert {"tokenizer.selector.head.weight", "tokenizer.backbone.model.patch_embed.proj.weight"} <= set(
        alone["gradients"]
    )
    for name, expected in alone["gradients"].items():
        assert torch.equal(first["gradients"][name], second["gradients"][name]), name
        assert torch.allclose(
            first["gradients"][name], expected, rtol=1e-3, atol=1e-6 + 1e-4 * float(expected.abs().max())
        ), name


def test_codebook_statistics_are_those_of_one_process_with_the_whole_batch(ranks, alone):
    (first, second), _ = ranks
    assert len(first["codes"]) == len(second["codes"]) == len(alone["codes"]) / 2 == 64
    both = torch.cat([first["codes"], second["codes"]])
    assert torch.equal(both.bincount(minlength=32), alone["codes"].bincount(minlength=32))
    assert alone["counts"].max() > 1
    for name in ("counts", "sums", "codebook"):
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], alone[name], atol=1e-6)


def test_both_processes_hold_the_same_weights_to_the_end(ranks):
    """Ranks agree although each drew other masks, parts were frozen at first, and the codebook started in between."""
    (first, second), _ = ranks
    assert first["trained"]["bank.added"] == 4 * STEPS and first["trained"]["bank.vectors"].abs().sum(1).all()
    for name, value in first["trained"].items():
        assert torch.equal(value, second["trained"][name]), name
    for found in (first, second):
        after_freezing = found["untouched"][0]
        assert all(name in after_freezing for name in found["gradients"] if ".selector." in name or ".merger." in name)
        assert not [name for name in found["untouched"][-1] if ".selector." in name or ".merger." in name]


def test_ranks_draw_their_kinds_of_masks_together(ranks):
    (first, second), _ = ranks
    assert first["kinds"] == second["kinds"] and len({kind for kind, _ in first["kinds"]}) > 1


def test_one_process_writes_for_both(ranks):
    _, folder = ranks
    assert sorted(path.name for path in (folder / "run").iterdir()) == ["lock", "log.jsonl", "state.pt", "tokenizer"]
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"], line["images"]) for line in lines] == [
        ("frozen", STEPS, 4 * STEPS),
        ("all", 2 * STEPS, 8 * STEPS),
    ]
    assert all(line["unreadable"] == 1 for line in lines)  # whichever rank met it
    assert all("semantic" in line for line in lines)
    assert torch.load(folder / "run" / "state.pt", weights_only=True)["step"] == 2 * STEPS


def test_one_process_goes_on_where_two_stood(ranks, values, tmp_path, monkeypatch):
    monkeypatch.setattr(bank, "_PICTURES", BANK)
    shutil.copytree(ranks[1] / "run", tmp_path / "run")
    more = {**values[1], "stages": [*values[1]["stages"], {"images": 4, "quantize": True, **CERTAIN}]}
    trainer = Trainer(build(Recipe, {**more, "batch_size": 4}), tmp_path / "run", cpu=True)
    assert trainer.step == 2 * STEPS and trainer.quantizing
    trainer.run()
    assert trainer.step == 2 * STEPS + 1
