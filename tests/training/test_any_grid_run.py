"""The bundled recipes for pictures of any shape, shortened: they train, resume and leave an averaged tokenizer."""

import dataclasses
import json

import pytest
import torch
import yaml
from PIL import Image
from support.any_grid import any_grid_config
from support.small_run import log_of, run_until, trainer, write_teacher

import dyntok
from dyntok.cli import main as cli
from dyntok.config import TokenizerConfig
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.training import bank
from dyntok.training.recipe import RECIPES
from dyntok.training.start import take_weights

STEPS = 4  # of each stage
GRIDS = {"bands": [{"share": 0.5, "patches": [64, 64]}, {"share": 0.5, "patches": [16, 100]}]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return {**write_teacher(tmp_path_factory.mktemp("teacher")), "sizes": [32, 48], "share": 0.6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photos):
    folder = tmp_path_factory.mktemp("photos")
    for i, photo in enumerate(photos):
        Image.fromarray(photo).resize((photo.shape[1] // 3, photo.shape[0] // 3)).save(folder / f"{i}.jpg")
    return folder


@pytest.fixture
def short(teacher, folder, small_config):
    """Returns a function for the values of a bundled recipe with a small tokenizer, a small teacher and few steps."""

    def make(name, **options):
        values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
        config = any_grid_config(dataclasses.replace(small_config))
        tokenizer = json.loads(json.dumps(config.to_dict()))
        tokenizer["codebook"]["size"] = 32
        tokenizer["decoder"]["init_scale"] = tokenizer["merger"]["init_scale"] = 0.1
        values |= {"tokenizer": tokenizer, "grids": GRIDS, "data": [str(folder)], "split": "all", "batch_size": 4}
        values |= {"workers": 0, "precision": "fp32", "log_every": 1, "save_every": 5, "save_minutes": 1000}
        if "teacher" in values:
            values["teacher"] = teacher
        for stage in values["stages"]:
            stage |= {"images": 4 * STEPS, "warmup": 0}
        return values | options

    return make


@pytest.mark.parametrize("name", ["flex", "quickstart"])
def test_the_recipe_trains_a_tokenizer_for_pictures_of_any_shape(name, short, tmp_path, photos, capsys):
    values, path = short(name), tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    assert cli.main(["train", str(path), "-o", str(tmp_path / "run"), "--cpu"]) == 0, capsys.readouterr().err
    stages = [stage["name"] for stage in values["stages"]]
    log = log_of(tmp_path / "run")
    assert [line["stage"] for line in log] == [name for name in stages for _ in range(STEPS)]
    assert all("low" in line or not values["stages"][0]["weights"].get("low") for line in log)
    assert any("local" in line for line in log)  # scores learned from batches on a lattice
    tokenizer = dyntok.load(tmp_path / "run" / "tokenizer")
    encoding = tokenizer.encode([photos[0], photos[5]])
    assert len({tuple(grid) for grid in encoding.grids.tolist()}) == 2  # a square and a strip
    assert [image.size for image in tokenizer.decode(encoding)][0] == (64, 64)


def test_resumed_between_grids_as_if_it_had_not_stopped(short, tmp_path, monkeypatch):
    monkeypatch.setattr(bank, "_PICTURES", 8)
    values = short("flex")
    for stage in values["stages"]:
        stage["weights"] |= {"semantic": 1.0, "distill": 1.0}
    trainer(values, tmp_path / "whole").run()
    run_until(trainer(values, tmp_path / "parts"), 7)
    resumed = trainer(values, tmp_path / "parts")
    assert resumed.step == 5
    resumed.run()
    log = log_of(tmp_path / "whole")
    assert log_of(tmp_path / "parts") == log
    found = [line["step"] for line in log if "semantic" in line]
    assert found[0] == 3 and any(step > 5 for step in found)  # after 8 pictures, in each stage anew
    assert not any("semantic" in line for line in log if (line["step"] - 1) % STEPS == 0)
    one, two = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "parts"))
    for part in ("objective", "average"):
        assert all(torch.equal(value, two[part][name]) for name, value in one[part].items())


def test_the_result_is_the_average_of_the_weights(short, tmp_path):
    values = short("quickstart", ema=0.5, pca_init=False)
    values["stages"] = values["stages"][:1]
    run = trainer(values, tmp_path)
    expected = {name: value.clone() for name, value in run.objective.tokenizer.state_dict().items()}
    take = run.train_step

    def look(*arguments):
        result = take(*arguments)
        for name, value in run.objective.tokenizer.state_dict().items():
            expected[name] = expected[name] * 0.5 + value * 0.5 if value.is_floating_point() else value
        return result

    run.train_step = look
    run.run()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    saved = dyntok.load(tmp_path / "tokenizer").state_dict()
    moved = 0
    for name, value in saved.items():
        assert torch.equal(value, state["average"][name])
        if name != "codebook.embedding" and value.is_floating_point():
            torch.testing.assert_close(value, expected[name])
            moved += not torch.equal(value, state["objective"][f"tokenizer.{name}"])
    assert moved > 10


def test_start_from_a_tokenizer_of_another_shape(small_config, tmp_path, short, capsys):
    """A fixed grid to any grid, a deeper decoder, a larger codebook: what fits is taken, and told."""
    config = dataclasses.replace(small_config, selector=dataclasses.replace(small_config.selector, dither=1.0))
    DynamicVisualTokenizer(config).save_pretrained(tmp_path / "old")
    old = dyntok.load(tmp_path / "old")
    values = short("quickstart")
    values["tokenizer"]["decoder"]["depth"] = 2
    values["tokenizer"]["backbone"]["kwargs"]["init_values"] = 0.1
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values | {"stages": values["stages"][:1]}))
    arguments = ["train", str(path), "-o", str(tmp_path / "run"), "--cpu", "--init", str(tmp_path / "old")]
    assert cli.main(arguments) == 0
    assert "tensors fit; new: " in capsys.readouterr().out

    run = trainer(values, tmp_path / "other", tokenizer=old)
    new = run.objective.tokenizer
    assert not run.quantizing
    assert torch.equal(new.merger.context_kv.weight, old.merger.context_kv.weight)
    assert torch.equal(new.decoder.blocks[0].self_qkv.weight, old.decoder.blocks[0].self_qkv.weight)
    assert torch.equal(new.decoder.query_embed, old.decoder.query_embed.mean(0, keepdim=True))
    assert torch.equal(new.backbone.model.blocks[0].attn.qkv.weight, old.backbone.model.blocks[0].attn.qkv.weight)


def test_a_tokenizer_of_any_grid_starts_from_the_bundled_one():
    torch.manual_seed(0)
    old, new = dyntok.load("tiny"), DynamicVisualTokenizer(TokenizerConfig.preset("flex"))
    start = take_weights(new, old)
    fresh = {name.split(".")[0] for name in start.new}
    assert fresh == {"codebook", "decoder"} and not start.codes
    assert all(name[8:16] >= "blocks.4" or "coordinates" in name for name in start.new if name.startswith("decoder."))
    gammas = [name for name in new.state_dict() if "gamma_1" in name]
    assert gammas
    for name in gammas:
        assert torch.equal(new.state_dict()[name], old.state_dict()[name.replace("gamma_1", "ls1.gamma")])
