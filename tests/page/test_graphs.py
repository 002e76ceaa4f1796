"""The page's ONNX graphs give the tokenizer's codes and pictures, for every number of tokens and on any grid."""

import dataclasses

import numpy as np
import pytest
import torch
from support.any_grid import any_grid_tokenizer

import dyntok
from dyntok.errors import ConfigError
from dyntok.image import to_pixels
from dyntok.model.decoder import guessed_positions
from dyntok.page.graphs import write_graphs
from dyntok.policy import KeepPolicy

onnxruntime = pytest.importorskip("onnxruntime")
POLICIES = [{}, {"budget": 8}, {"budget": 1.0}]


def sessions(tokenizer, folder):
    write_graphs(tokenizer, folder)
    return {name: onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("score", "codes", "picture")}


def assert_same(tokenizer, graphs, photo, options):
    expected = tokenizer.encode(photo, **options)
    grid, positions = tuple(expected.grids[0].tolist()), expected.positions[0].numpy()
    pixels = to_pixels(photo, tokenizer.config.image)[None].numpy()
    features, _ = graphs["score"].run(None, {"pixels": pixels})
    keep = np.zeros(grid[0] * grid[1], np.float32)
    keep[positions] = 1
    (codes,) = graphs["codes"].run(None, {"features": features, "keep": keep.reshape(grid)})
    assert np.array_equal(codes[positions], expected.codes[0])
    for known, rows in ((1, expected), (0, expected.codes)):
        if not known:  # the page puts them at the guessed places
            keep = np.zeros_like(keep)
            positions = guessed(tokenizer, len(expected.codes[0]), grid)
            keep[positions] = 1
        plane = np.zeros(len(keep), np.int32)
        plane[positions] = expected.codes[0]
        inputs = {"codes": plane.reshape(grid), "keep": keep.reshape(grid), "known": np.float32([known])}
        (picture,) = graphs["picture"].run(None, inputs)
        options = {} if known else {"grid": grid}
        pixels = tokenizer.decode_to_pixels(rows, **options)[0].numpy()
        mean, std = (np.float32(v)[:, None, None] for v in (tokenizer.config.image.mean, tokenizer.config.image.std))
        np.testing.assert_allclose(picture, (pixels * std + mean).clip(0, 1), atol=1e-4)


def guessed(tokenizer, count, grid):
    bounds = torch.tensor([0, count], dtype=torch.int32)
    return guessed_positions(bounds, count, grid, tokenizer.decoder.dithered).numpy()


def test_the_small_tokenizer(tokenizer, photos, tmp_path):
    graphs = sessions(tokenizer, tmp_path)
    for options in POLICIES:
        assert_same(tokenizer, graphs, photos[1], options)


@pytest.mark.slow
def test_any_grid(small_config, photos, tmp_path, recwarn):
    tokenizer = any_grid_tokenizer(small_config)
    graphs = sessions(tokenizer, tmp_path)
    assert not [warning for warning in recwarn if "axis name" in str(warning.message)]
    for photo in (photos[0], photos[1], photos[4]):  # three grids
        for options in POLICIES:
            assert_same(tokenizer, graphs, photo, options)


@pytest.mark.slow
def test_the_merger_without_parameters(small_config, photos, tmp_path):
    merger = dataclasses.replace(small_config.merger, kind="similar")
    tokenizer = any_grid_tokenizer(dataclasses.replace(small_config, merger=merger))
    graphs = sessions(tokenizer, tmp_path)
    assert_same(tokenizer, graphs, photos[1], {"budget": 20})


@pytest.mark.slow
def test_the_bundled_tokenizer(photos, tmp_path):
    tokenizer = dyntok.load()
    graphs = sessions(tokenizer, tmp_path)
    for photo in photos:
        assert_same(tokenizer, graphs, photo, {})
    files = [path.stat().st_size for path in tmp_path.glob("*.onnx")]
    assert len(files) == 3 and sum(files) < 20e6


@pytest.mark.slow
def test_scores_decide_as_the_policy_does(tokenizer, photos, tmp_path):
    graphs = sessions(tokenizer, tmp_path)
    pixels = to_pixels(photos[0], tokenizer.config.image)[None]
    _, score = graphs["score"].run(None, {"pixels": pixels.numpy()})
    log_probs = tokenizer.selector(tokenizer.backbone(pixels), tokenizer.grid)
    assert np.array_equal(score > 0, KeepPolicy()(log_probs)[0])


def test_a_tokenizer_that_makes_no_pixels(small_config, tmp_path):
    decoder = dataclasses.replace(small_config.decoder, pixels=False)
    tokenizer = dyntok.DynamicVisualTokenizer(dataclasses.replace(small_config, decoder=decoder))
    with pytest.raises(ConfigError, match="needs a tokenizer that makes pixels"):
        write_graphs(tokenizer, tmp_path)
