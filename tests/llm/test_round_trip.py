"""Photographs to ids and back, in every layout, under every policy, on grids of many shapes: nothing changes."""

import os
import tarfile
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.any_grid import any_grid_tokenizer

from dyntok import VisualVocab
from dyntok.llm import parse_ids, parse_text

POLICIES = {
    "learned": lambda: {},
    "exact": lambda: {"budget": 17},
    "share": lambda: {"budget": 0.25},
    "threshold": lambda: {"threshold": 0.6},
    "sample": lambda: {"sample": torch.Generator().manual_seed(0)},
    "limit": lambda: {"max_tokens": 12},
    "quality": lambda: {"psnr": 9.0},  # the weights are random
}
SHAPES = [(64, 64), (640, 480), (333, 500), (512, 128), (120, 700), (17, 13), (511, 509)]  # width and height
SIZES = [(64, 64), (40, 56), (72, 24), (56, 120), (8, 136), (104, 48)]  # height and width in pixels, of whole patches
LAYOUTS = {"map": "map", "lattice": "lattice", "positions": "free"}


@pytest.fixture(scope="module")
def visual(small_config):
    return any_grid_tokenizer(small_config)


def check(visual, images, layout, policy, **options):
    """`to_encoding` gives back what was encoded."""
    vocab = VisualVocab.of(visual, after=32000, layout=layout)
    encoding = visual.encode(images, places=LAYOUTS[layout], **POLICIES[policy](), **options)
    rows = vocab.to_ids(encoding)
    assert vocab.to_encoding(rows) == encoding
    return vocab, encoding, rows


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_of_many_shapes(layout, policy, visual, photos):
    images = [Image.fromarray(photo).resize(size) for photo, size in zip(photos * 2, SHAPES, strict=False)]
    vocab, encoding, rows = check(visual, images, layout, policy)
    grids = set(map(tuple, encoding.grids.tolist()))
    assert len(grids) > 4 and any(side % 4 for grid in grids for side in grid) and vocab.sides
    assert policy != "exact" or set(encoding.lengths.tolist()) == {17}
    for i, (row, text) in enumerate(zip(rows, vocab.to_text(encoding), strict=True)):
        for (segment,) in (parse_ids(row, vocab), parse_text(text, vocab)):
            assert segment.kind == "image" and segment.grid == tuple(encoding.grids[i].tolist())
            assert segment.codes == tuple(encoding.codes[i].tolist())
            assert segment.positions == tuple(encoding.positions[i].tolist())


def photographs(count):
    """The first photographs of the captioned ones."""
    if "DYNTOK_DATA" not in os.environ:
        pytest.skip("DYNTOK_DATA names no folder of photographs")
    with tarfile.open(Path(os.environ["DYNTOK_DATA"]) / "captioned" / "captioned-000.tar") as tar:
        members = (member for member in tar if member.name.endswith(".jpg"))
        return [tar.extractfile(member).read() for member in islice(members, count)]


def test_photographs(visual):
    """A share of the photographs under each layout and policy, squeezed into rectangles of several shapes."""
    images = photographs(50)
    pairs = [(layout, policy) for layout in LAYOUTS for policy in POLICIES]
    for i, (layout, policy) in enumerate(pairs):
        check(visual, images[i :: len(pairs)], layout, policy, size=SIZES[i % len(SIZES)], fit="squash")


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_a_thousand_photographs(policy, visual):
    """Every photograph under every policy, a third of them in each layout, in rectangles of several shapes."""
    images = photographs(1000)
    pairs = [(layout, size) for layout in LAYOUTS for size in SIZES]
    for i, (layout, size) in enumerate(pairs):
        check(visual, images[i :: len(pairs)], layout, policy, size=size, fit="squash")
