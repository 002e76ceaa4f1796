"""The recipes of the training page train."""

import dataclasses

import pytest
from PIL import Image
from support.pages import FOLDER, blocks

from dyntok.config import TokenizerConfig
from dyntok.training.loop import Trainer
from dyntok.training.recipe import Recipe

(RECIPE, ANY_GRID) = (block.code for block in blocks(FOLDER / "training.md") if block.language == "yaml")


@pytest.fixture
def folder(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i, photo in enumerate(photos):
        Image.fromarray(photo).save(tmp_path / "photos" / f"{i}.jpg")
    return tmp_path


@pytest.fixture
def recipe(folder):
    (folder / "recipe.yaml").write_text(RECIPE)
    return Recipe.load("recipe.yaml")


@pytest.fixture
def any_grid(folder):
    (folder / "recipe.yaml").write_text(ANY_GRID)
    return Recipe.load("recipe.yaml")


def test_the_recipe_of_the_training_page_means_what_the_page_says(recipe):
    tiny = TokenizerConfig.preset("tiny")
    assert recipe.config == dataclasses.replace(tiny, codebook=dataclasses.replace(tiny.codebook, size=4096))
    assert [stage.decay for stage in recipe.stages] == ["constant", "constant", "linear"]
    assert [stage.quantize for stage in recipe.stages] == [False, True, True]


def test_the_any_grid_recipe_means_what_the_page_says(any_grid):
    assert any_grid.config == TokenizerConfig.preset("flex")
    run = Trainer(any_grid, "run", cpu=True)
    rows, columns = run.objective.tokenizer.grid
    assert (rows, columns) == (16, 16)
    sizes = [run.recipe.grids.patches(0, step) for step in range(200)]
    assert 80 < sizes.count(256) < 120 and min(sizes) < 100 and max(sizes) > 800
    for number in range(3):
        count, _, height, width = run.data.batch(number).shape
        assert count * height * width == pytest.approx(16 * 128 * 128, rel=0.2)


@pytest.mark.slow
def test_the_recipe_of_the_training_page_takes_its_first_steps(recipe):
    run = Trainer(dataclasses.replace(recipe, batch_size=8), "run", cpu=True)  # smaller batches, to be quick
    for stage in recipe.stages:
        run.objective.set_stage(stage)
        result = run.train_step([run.data.batch(run.step)], stage, 0)
        assert result.loss.isfinite() and (result.codes is not None) == stage.quantize
