"""Grids of training batches: drawn as the recipe says, equally large batches, and the same after a restart."""

import json
from collections import Counter

import pytest
import torch
from PIL import Image

from dyntok.config import ImageConfig
from dyntok.errors import ConfigError
from dyntok.structure import build
from dyntok.training.crops import Crops
from dyntok.training.data import TrainingImages
from dyntok.training.grids import Band, Grids
from dyntok.training.recipe import Recipe
from dyntok.training.sources import find_samples

CONFIG = ImageConfig(img_size=64, resize="keep", max_patches=64, patch_size=8)
BANDS = (Band(0.45, (256, 256)), Band(0.25, (64, 320)), Band(0.3, (320, 1024)))


@pytest.fixture
def samples(photos, tmp_path):
    for i, photo in enumerate(photos):
        Image.fromarray(photo).resize((120, 90)).save(tmp_path / f"{i}.png")
    return find_samples([tmp_path])


def images(samples, grids, batch_size=4, **options):
    return TrainingImages(samples, Crops(CONFIG, batch_size, seed=7, min_crop=0.8, grids=grids, **options))


def test_sizes_and_shapes_are_drawn_as_the_recipe_says():
    grids = Grids(BANDS, aspect=3.0)
    drawn = [(grids.patches(1, step), grids.grid(1, step)) for step in range(1000)]
    for patches, (rows, columns) in drawn:
        assert 0.85 * patches <= rows * columns <= patches
        assert 1 / 3.6 < columns / rows < 3.6  # 1/3 to 3, rounded to whole patches
    kinds = Counter("usual" if n == 256 else "large" if n >= 320 else "small" for n, _ in drawn)
    assert 400 < kinds["usual"] < 500 and 200 < kinds["small"] < 300 and 250 < kinds["large"] < 350
    assert min(n for n, _ in drawn) < 70 and max(n for n, _ in drawn) > 980
    large = [n for n, _ in drawn if n >= 320]
    assert 0.4 < sum(n < 572 for n in large) / len(large) < 0.6  # log-uniform: half lie below the geometric mean
    aspects = [columns / rows for _, (rows, columns) in drawn]
    assert max(aspects) > 2.4 and min(aspects) < 1 / 2.4
    assert sum(a > 1.01 for a in aspects) == pytest.approx(sum(a < 0.99 for a in aspects), abs=100)
    assert all(0.85 < columns / rows < 1.15 for rows, columns in (Grids(aspect=1.0).grid(1, s) for s in range(50)))


def test_grids_follow_from_seed_and_step_alone():
    grids = Grids(BANDS)
    forward = [grids.grid(3, step) for step in range(50)]
    assert [grids.grid(3, step) for step in reversed(range(50))] == forward[::-1]
    assert [grids.grid(4, step) for step in range(50)] != forward


def test_batches_have_the_same_number_of_patches_and_all_ranks_the_same_shape(samples):
    grids = Grids((Band(1.0, (16, 120)),))
    whole = images(samples, grids)
    shapes = [whole[step].shape for step in range(20)]
    assert len(set(shapes)) > 10
    for count, _, height, width in shapes:
        patches = height * width // 64
        assert height % 8 == width % 8 == 0 and abs(count * patches - 4 * 64) <= 0.2 * 4 * 64 + patches
    halves = [images(samples, grids, batch_size=4, rank=rank, world=2) for rank in range(2)]
    for step in range(6):
        first, second = (half[step] for half in halves)
        assert first.shape == second.shape == shapes[step] and not torch.equal(first, second)


def test_a_later_start_gives_the_same_batches_and_no_picture_is_missed(samples):
    grids = Grids((Band(1.0, (16, 120)),))
    whole = images(samples, grids)
    expected = [whole[step] for step in range(12)]
    assert torch.equal(images(samples, grids)[11], expected[11])
    places = []
    whole._large_enough = lambda epoch, place, size: places.append((epoch, place)) or whole._image(epoch, place)
    for step in range(12):
        whole[step]
    assert places == [divmod(place, len(samples)) for place in range(sum(map(len, expected)))]


def test_small_pictures_give_way_where_grids_are_large(tmp_path, photos):
    for i in range(8):
        side = 40 if i % 2 else 200
        red = Image.new("RGB", (side, side), (255, 0, 0) if side == 40 else (0, 0, 255))
        red.save(tmp_path / f"{i}.png")
    samples = find_samples([tmp_path])
    large, small = (images(samples, Grids((Band(1.0, (n, n)),), aspect=1.0)) for n in (256, 25))
    assert all(large[step][:, 0].max() < 0 for step in range(10))  # only the large ones, which are blue
    assert {bool(x) for step in range(10) for x in small[step][:, 0].amax((1, 2)) > 0} == {True, False}
    tiny_only = [sample for sample in samples if int(sample.key) % 2]
    assert images(tiny_only, Grids((Band(1.0, (256, 256)),)))[0].isfinite().all()


def test_without_grids_pictures_have_the_size_of_the_configuration(samples):
    data = TrainingImages(samples, Crops(CONFIG, 2, seed=0, min_crop=0.8))
    assert data[0].shape == (2, 3, 64, 64)
    wide = ImageConfig(img_size=64, max_patches=64, patch_size=8, size=(32, 64))
    assert TrainingImages(samples, Crops(wide, 2, seed=0, min_crop=0.8))[0].shape == (2, 3, 32, 64)


@pytest.mark.parametrize(
    "grids, told",
    [
        ({"aspect": 9.0}, r"grids\.aspect is 9\.0, expected 1 to 8"),
        ({"bands": []}, "grids.bands is empty"),
        ({"bands": [{"patches": [64, 9000]}]}, r"patches \[64, 9000\], expected \[low, high\] within 1 and 4,096"),
        ({"bands": [{"share": 0}]}, "share of 0"),
        ({"min_scale": 2}, "min_scale is 2"),
        ({}, "its tokenizer takes squares of 128 px"),
    ],
)
def test_grids_that_a_recipe_may_not_have(grids, told):
    values = {"data": ["photos"], "stages": [{"images": 1, "weights": {"pixel": 1}}], "grids": grids}
    with pytest.raises(ConfigError, match=told):
        build(Recipe, values)


def test_a_recipe_with_grids_becomes_plain_values(small_config):
    from support.any_grid import any_grid_config

    values = {"data": ["x"], "stages": [{"images": 1, "weights": {"pixel": 1}}], "grids": {"aspect": 2}}
    recipe = build(Recipe, values | {"tokenizer": any_grid_config(small_config).to_dict()})
    assert json.loads(json.dumps(recipe.to_dict()))["grids"]["bands"] == [{"share": 1.0, "patches": [64, 1024]}]
