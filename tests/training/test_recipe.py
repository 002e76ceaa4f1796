"""Recipes: what a YAML file may say, and that every slip is refused by name before anything starts."""

import textwrap

import pytest
import timm
import torch
import yaml

from dyntok.config import TokenizerConfig
from dyntok.errors import ConfigError
from dyntok.structure import build
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.training import objective
from dyntok.training import teacher as teacher_module
from dyntok.training.display import closing_line
from dyntok.training.recipe import RECIPES, Recipe, Teacher
from dyntok.training.stage import Masks, Stage, Weights
from dyntok.training.teacher import TeacherFeatures, View

MINIMAL = {"data": ["photos"], "stages": [{"images": 100, "weights": {"pixel": 1}}]}


def load(tmp_path, values):
    path = tmp_path / "recipe.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return Recipe.load(path)


def changed(where, value):
    """MINIMAL with one value set; `where` such as "stages.weights.rate" leads through the first stage."""
    values = yaml.safe_load(yaml.safe_dump(MINIMAL))
    place, (*path, last) = values, where.split(".")
    for name in path:
        place = place.setdefault(name, {})
        place = place[0] if isinstance(place, list) else place
    place[last] = value
    return values


def test_minimal(tmp_path):
    recipe = load(tmp_path, MINIMAL)
    assert recipe.config == TokenizerConfig.preset("tiny")
    (stage,) = recipe.stages
    assert stage == Stage(images=100, weights=Weights(pixel=1))
    assert (stage.rho, stage.masks, stage.weights.rate, recipe.batch_size) == (1 / 3, Masks(1.0, 0.0, 0.0), 2.0, 32)


def test_everything(tmp_path):
    text = """
        tokenizer: {preset: tiny, codebook: {size: 64}}
        data: [a, b.tar]
        split: all
        teacher: {name: mobilenetv2_100, weights: file.safetensors, kwargs: {pad_type: same}, layers: [0, 2]}
        precision: fp32
        stages:
          - {name: one, images: 10, weights: {pixel: 1, perceptual: 0.5}, masks: {random: 1},
             budgets: [0.5, 1], freeze: [selector]}
          - {name: two, images: 5, quantize: true, decay: linear, weights: {pixel: 1}}
    """
    recipe = load(tmp_path, textwrap.dedent(text))
    assert (
        recipe.config.codebook.size == 64 and recipe.config.codebook.dim == TokenizerConfig.preset("tiny").codebook.dim
    )
    assert recipe.data == ("a", "b.tar") and recipe.teacher.layers == (0, 2)
    assert (
        recipe.stages[0].budgets == (0.5, 1) and recipe.stages[0].freeze == ("selector",) and recipe.stages[1].quantize
    )
    assert hash(recipe.stages[0])  # tuples all through


@pytest.mark.parametrize(
    "where, value, told",
    [
        ("bath_size", 4, "unknown bath_size"),
        ("stages.imags", 4, r"unknown stages\[0\]\.imags"),
        ("stages.weights.pixle", 1, r"unknown stages\[0\]\.weights\.pixle"),
        ("teacher.nam", "x", r"unknown teacher\.nam"),
        ("tokenizer.codebok", {"size": 3}, "codebok"),
        ("tokenizer.preset", "huge", "huge"),
        ("tokenizer.preset", ["tiny"], "tiny"),
        ("linear_start", True, "linear_start is now called pca_init; rename the key"),
    ],
)
def test_unknown_keys(tmp_path, where, value, told):
    with pytest.raises(ConfigError, match=rf"recipe\.yaml: .*{told}"):
        load(tmp_path, changed(where, value))


@pytest.mark.parametrize(
    "where, value, told",
    [
        (
            "stages.lr",
            "1e-3",
            r"stages\[0\]\.lr is '1e-3' \(str\), expected a finite number; YAML reads 1e-3 as text, write 1\.0e-3",
        ),
        ("stages.lr", "fast", r"stages\[0\]\.lr is 'fast' \(str\), expected a finite number$"),
        ("stages.lr", float("nan"), "stages.*lr is nan .*finite"),
        ("weight_decay", float("inf"), "weight_decay is inf"),
        ("stages.images", "1e6", "images is '1e6'"),
        ("stages.images", 10.5, r"images is 10\.5 \(float\), expected an integer"),
        ("batch_size", True, r"batch_size is True \(bool\), expected an integer"),
        ("stages.quantize", 1, r"quantize is 1 \(int\), expected true or false"),
        ("stages.quantize", "yes please", "quantize is 'yes please'"),
        ("precision", False, r"precision is False \(bool\), expected 'auto' or 'fp32' or 'bf16'; YAML reads no, off"),
        ("precision", "fp8", "precision is 'fp8'"),
        ("split", "test", "split is 'test'"),
        ("stages.decay", "exponential", "decay is 'exponential'"),
        ("data", "photos", r"data is 'photos' \(str\), expected a list"),
        ("data", [1], r"data\[0\] is 1 \(int\), expected text"),
        ("stages", {"images": 1}, "stages is .*dict.*, expected a list"),
        ("stages", ["all"], r"stages\[0\] is 'all' \(str\), expected a mapping"),
        ("stages.freeze", "backbone", r"freeze is 'backbone' \(str\), expected a list"),
        ("stages.budgets", [0.1], "budgets has 1 entries, expected 2"),
        ("stages.budgets", ["a", "b"], r"budgets\[0\] is 'a'"),
        ("stages.weights.rate", None, r"rate is None \(NoneType\), expected a finite number"),
        ("teacher.kwargs", [], r"teacher\.kwargs is \[\] \(list\), expected a mapping"),
        ("tokenizer", "tiny", r"tokenizer is 'tiny' \(str\), expected a mapping"),
    ],
)
def test_wrong_types(tmp_path, where, value, told):
    with pytest.raises(ConfigError, match=told):
        load(tmp_path, changed(where, value))


@pytest.mark.parametrize(
    "where, value, told",
    [
        ("stages.images", 0, "images 0"),
        ("stages.lr", 0, "lr 0"),
        ("stages.warmup", -1, "warmup -1"),
        ("stages.rho", 0, "rho 0"),
        ("stages.rho", 1.1, r"rho 1\.1"),
        ("stages.position_drop", 2, "position_drop 2"),
        ("stages.budgets", [0, 1], "budgets"),
        ("stages.budgets", [0.6, 0.5], "budgets"),
        ("stages.freeze", ["teacher"], "freezes teacher, expected some of backbone"),
        ("stages.weights.rate", -1, r"weights\.rate is -1"),
        ("stages.weights.local", 0.5, r"weights\.local, which follows the error of random or lattice masks"),
        ("stages.weights.pixel", 0, "no loss on the reconstruction"),
        ("stages.masks", {"learned": 0}, "masks"),
        ("stages.masks", {"random": -0.5}, "masks"),
        ("stages.weights.perceptual", 1, r"teacher\.name"),
        ("stages", [], "no stages, expected at least one"),
        ("data", [], "names no data; pass --data FOLDER"),
        ("min_crop", 0, "min_crop is 0"),
        ("seed", -1, "seed is -1"),
        ("seed", 2**31, "seed is 2147483648"),
        ("batch_size", 0, "batch_size is 0"),
        ("workers", -1, "workers is -1"),
        ("log_every", 0, "log_every is 0"),
        ("save_every", -1, "save_every is -1"),
        ("save_minutes", -0.5, r"save_minutes is -0\.5"),
        ("weight_decay", -1, "weight_decay is -1"),
        ("tokenizer.codebook", {"size": 0}, "codebook"),
    ],
)
def test_wrong_values(tmp_path, where, value, told):
    with pytest.raises(ConfigError, match=told):
        load(tmp_path, changed(where, value))


def test_quantization_stays_on():
    with pytest.raises(ConfigError, match="switched off"):
        Recipe(
            data=("x",), stages=(Stage("a", 1, quantize=True, weights=Weights(1)), Stage("b", 1, weights=Weights(1)))
        )


def test_data_as_one_text_in_python():
    with pytest.raises(ConfigError, match="list of folders"):
        Recipe(data="photos", stages=(Stage("a", 1, weights=Weights(1)),))


@pytest.mark.parametrize("text", ["", "- a list", "just text", "data: [", "data: [\x00]"])
def test_files_that_are_no_recipe(tmp_path, text):
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        load(tmp_path, text)


def test_unreadable_files(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"data: [caf\xe9]")
    for path in (tmp_path / "missing.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(ConfigError, match="can't read the recipe"):
            Recipe.load(path)


def test_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNTOK_DATA", "/some$where")
    monkeypatch.delenv("NOWHERE", raising=False)
    values = changed("data", ["$DYNTOK_DATA/photos", "${DYNTOK_DATA}photos", "plain"])
    assert load(tmp_path, values).data == ("/some$where/photos", "/some$wherephotos", "plain")
    with pytest.raises(ConfigError, match="NOWHERE, which is not set"):
        load(tmp_path, changed("teacher.weights", "$NOWHERE/teacher.safetensors"))
    monkeypatch.setenv("NOWHERE", "")
    with pytest.raises(ConfigError, match="NOWHERE"):
        load(tmp_path, changed("data", ["$NOWHERE/photos"]))


def test_find(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNTOK_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paper-vit").mkdir()  # a run's folder of the same name does not hide the recipe
    assert Recipe.find("paper-vit") == Recipe.load(RECIPES / "paper-vit.yaml")
    assert Recipe.find(RECIPES / "paper-vit.yaml") == Recipe.find("paper-vit")
    with pytest.raises(ConfigError, match="there is no recipe papr-vit; expected a YAML file or one of .*paper-vit"):
        Recipe.find("papr-vit")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_bundled_recipes_load_and_build(path, tmp_path, monkeypatch):
    """With every part and every stage, but on the meta device and without fetching weights."""
    monkeypatch.setenv("DYNTOK_DATA", str(tmp_path))
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *args, pretrained, **options: create(*args, pretrained=False, **options)
    )
    monkeypatch.setattr(teacher_module, "load_timm_weights", lambda model, file: None)
    recipe = Recipe.load(path, data=["photos"])
    with torch.device("meta"):
        tokenizer = DynamicVisualTokenizer(recipe.config)
    teacher = TeacherFeatures(recipe.teacher, (0.5,) * 3, (0.5,) * 3) if recipe.teacher.name else None
    trained = objective.Objective(tokenizer, teacher)
    for stage in recipe.stages:
        trained.set_stage(stage)
        assert any(p.requires_grad for p in trained.parameters())
    assert any(stage.quantize for stage in recipe.stages)


def test_the_recognition_loss_needs_several_pictures(tmp_path):
    values = changed("stages.weights.recognition", 1) | {"teacher": {"name": "resnet18"}, "batch_size": 1}
    with pytest.raises(ConfigError, match="set batch_size to 2 or more"):
        load(tmp_path, values)


def test_a_teacher_of_one_size(monkeypatch):
    monkeypatch.setattr(teacher_module, "load_timm_weights", lambda model, file: None)
    given = {"name": "vit_tiny_patch16_224", "weights": "file"}
    square, wide = torch.zeros(1, 3, 224, 224), torch.zeros(1, 3, 112, 224)
    fixed = TeacherFeatures(Teacher(**given), (0.5,) * 3, (0.5,) * 3)
    assert fixed(square, View())[1].shape == (1, 192)
    for pixels, view in ((wide, View()), (square, View(size=112))):
        with pytest.raises(ConfigError, match="224 x 224 pixels alone, .* set teacher.kwargs: .dynamic_img_size: true"):
            fixed(pixels, view)
    free = TeacherFeatures(Teacher(**given, kwargs={"dynamic_img_size": True}), (0.5,) * 3, (0.5,) * 3)
    assert free(wide, View())[1].shape == (1, 192)


def test_the_line_that_says_how_to_measure(tmp_path):
    def line(*data, **options):
        recipe = build(Recipe, MINIMAL | {"data": list(data)} | options)
        return closing_line(recipe, tmp_path / "my runs", "f" * 16, 0, 60)

    assert f"`dyntok eval photos --split validation --model '{tmp_path}/my runs/tokenizer'`" in line("photos")
    for address in ("s3://name:password@host/shards", "rows.parquet"):
        told = line("photos", address)
        assert "`dyntok eval PICTURES --split" in told and "password" not in told
    assert "`dyntok eval photos --split train --model" in line("photos", split="validation")
    told = line("photos", split="all")
    assert "no picture was held out, measure it on others with `dyntok eval PICTURES" in told and "--split" not in told
