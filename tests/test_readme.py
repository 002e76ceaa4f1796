"""What the README says: its Python runs, and no placeholder is left in it."""

import argparse
import dataclasses
import functools
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import dyntok
from dyntok import TokenizerConfig
from dyntok.cli import main as cli
from dyntok.image import to_pixels
from dyntok.training.loop import Trainer
from dyntok.training.recipe import Recipe

ROOT = Path(dyntok.__file__).parents[1]
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="the package was installed without its README")


def test_the_ten_lines_run(tmp_path, monkeypatch, capsys):
    code = re.search(r"## Ten lines\n\n```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    (tmp_path / "dyntok").symlink_to(ROOT / "dyntok")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert Image.open(tmp_path / "again.png").size == (128, 128)
    assert len(names["short"].codes[0]) == 48 and names["ids"][0] == 32000 and names["mask"].all()
    assert str(names["enc"].positions[0]) in capsys.readouterr().out


def snippet(beginning):
    return re.search(rf"```python\n({re.escape(beginning)}.*?)```", README.read_text(), re.DOTALL)[1]


def test_the_lines_on_whole_datasets_run(photos, tmp_path, monkeypatch):
    datasets, ray = pytest.importorskip("datasets"), pytest.importorskip("ray")
    from support.batch_data import pictures, rows, tar_members, write_table, write_tar

    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    images = pictures(photos, 8)
    write_tar("shards/0.tar", tar_members(images))
    write_table("images.parquet", images)
    cells = datasets.Dataset.from_dict({"image": [{"bytes": content, "path": None} for content in images.values()]})
    names = {"torch": torch, "ray": ray, "dataset": cells.cast_column("image", datasets.Image())}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error", ignore_reinit_error=True)
    try:
        exec(compile(snippet("from dyntok import batch"), "README.md", "exec"), names)
        wanted = [row["codes"] for row in rows("codes")]
        assert len(wanted) == 8 and names["mask"].sum() == sum(map(len, wanted))
        assert [row["codes"] for row in names["dataset"]] == wanted
        assert isinstance(names["table"], ray.data.Dataset)
    finally:
        ray.shutdown()


def test_the_lines_on_compiling_and_exporting_run(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend="aot_eager")
    )  # the real one needs a C++ compiler
    tok = dyntok.load()
    names = {
        "torch": torch,
        "tok": tok,
        "pixels": torch.stack([to_pixels(photo, tok.config.image) for photo in photos[:2]]),
    }
    exec(compile(snippet("from dyntok.export import FixedDecoder"), "README.md", "exec"), names)
    assert names["codes"].shape == (2, 96) and Path("encoder.onnx").exists() and Path("decoder.onnx").exists()
    assert torch.equal(names["codes"][0], tok.encode(photos[0], budget=96).codes[0])


def test_no_placeholder_is_left():
    for page in (README, ROOT / "dyntok" / "pretrained" / "tiny" / "README.md"):
        assert not re.findall(r"\{[A-Za-z_]+\d*\}", page.read_text()), page


def test_every_file_is_listed():
    text = README.read_text()
    folders = [
        "dyntok",
        "dyntok/training",
        "dyntok/training/recipes",
        "dyntok/llm",
        "dyntok/batch",
        "kernels/dyntok_kernels",
        "benchmarks",
    ]
    paths = [
        path
        for folder in folders
        for path in (ROOT / folder).iterdir()
        if path.suffix in (".py", ".yaml") and path.stem != "__init__"
    ]
    rows = [line for line in text.partition("## Files")[2].splitlines() if line.startswith("| `")]

    def listed(path):  # a name follows the folder or another name of the folder
        folder = path.parent.relative_to(ROOT).as_posix()
        return any(
            line.startswith(f"| `{folder}/") and re.search(rf"[`/]{re.escape(path.name)}`", line) for line in rows
        )

    assert len(paths) > 40 and [str(path) for path in paths if not listed(path)] == []


def test_every_option_is_told():
    text = README.read_text()
    (commands,) = (action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction))
    options = {
        option
        for command in commands.choices.values()
        for action in command._actions
        for option in action.option_strings
    }
    told = set(re.findall(r"--[a-z-]+", text))
    assert {option for option in options if option.startswith("--")} - told - {"--help", "--output"} == set()


def test_the_example_recipe_trains(photos, tmp_path, monkeypatch):
    """Its first steps, on a folder of photographs."""
    recipe = re.search(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL)[1]
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "photos").mkdir()
    for i, photo in enumerate(photos):
        Image.fromarray(photo).save(tmp_path / "photos" / f"{i}.jpg")
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.load("recipe.yaml")
    assert recipe.config == dataclasses.replace(TokenizerConfig.preset("tiny"), codebook=recipe.config.codebook)
    assert (recipe.config.codebook.size, recipe.config.codebook.dim) == (
        4096,
        TokenizerConfig.preset("tiny").codebook.dim,
    )
    assert [stage.decay for stage in recipe.stages] == ["constant", "constant", "linear"]
    run = Trainer(dataclasses.replace(recipe, batch_size=8), "run", cpu=True)  # the test is short of time
    for stage in recipe.stages:
        run.objective.set_stage(stage)
        result = run.train_step(run.data.batch(run.step), stage, 0)
        assert result.loss.isfinite() and (result.codes is not None) == stage.quantize
