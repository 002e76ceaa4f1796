"""The recipe of the training page trains."""

import dataclasses

import pytest
from PIL import Image
from support.pages import FOLDER, blocks

from dyntok.config import TokenizerConfig
from dyntok.training.loop import Trainer
from dyntok.training.recipe import Recipe

(RECIPE,) = (block.code for block in blocks(FOLDER / "training.md") if block.language == "yaml")


@pytest.fixture
def recipe(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "photos").mkdir()
    for i, photo in enumerate(photos):
        Image.fromarray(photo).save(tmp_path / "photos" / f"{i}.jpg")
    return Recipe.load("recipe.yaml")


def test_the_recipe_of_the_training_page_means_what_the_page_says(recipe):
    tiny = TokenizerConfig.preset("tiny")
    assert recipe.config == dataclasses.replace(tiny, codebook=dataclasses.replace(tiny.codebook, size=4096))
    assert [stage.decay for stage in recipe.stages] == ["constant", "constant", "linear"]
    assert [stage.quantize for stage in recipe.stages] == [False, True, True]


@pytest.mark.slow
def test_the_recipe_of_the_training_page_takes_its_first_steps(recipe):
    run = Trainer(dataclasses.replace(recipe, batch_size=8), "run", cpu=True)  # smaller batches, to be quick
    for stage in recipe.stages:
        run.objective.set_stage(stage)
        result = run.train_step(run.data.batch(run.step), stage, 0)
        assert result.loss.isfinite() and (result.codes is not None) == stage.quantize
