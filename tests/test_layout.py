"""Canonical masks, map values and the lattice, against definitions spelled out patch by patch."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyntok.errors import CodeError
from dyntok.layout import (
    MAP_VALUES,
    bayer_pattern,
    block_capacities,
    counts_to_map,
    counts_to_mask,
    lattice_positions,
    map_to_counts,
    mask_to_counts,
    num_blocks,
)

GRIDS = [(1, 1), (1, 5), (2, 2), (3, 3), (4, 4), (5, 7), (8, 6), (9, 10), (16, 16)]
sides = st.integers(1, 11)


def cells_of(grid):
    """Every cell in raster order, as the list of its positions in the fixed order."""
    rows, columns = grid
    order = [(1, 0), (0, 1), (1, 1), (0, 0)]  # bottom left, top right, bottom right, top left
    for y, x in itertools.product(range(0, rows, 2), range(0, columns, 2)):
        yield [(y + i) * columns + x + j for i, j in order if y + i < rows and x + j < columns]


@st.composite
def grids_and_counts(draw):
    grid = draw(sides), draw(sides)
    return grid, [draw(st.integers(0, len(cell))) for cell in cells_of(grid)]


@given(grids_and_counts())
@settings(deadline=None, max_examples=200)
def test_counts_give_the_first_patches_of_every_cell(case):
    grid, counts = case
    mask = counts_to_mask(torch.tensor(counts), grid)
    kept = sorted(p for cell, count in zip(cells_of(grid), counts, strict=True) for p in cell[:count])
    assert mask.nonzero()[:, 0].tolist() == kept
    assert mask_to_counts(mask, grid).tolist() == counts


@given(grids_and_counts())
@settings(deadline=None, max_examples=200)
def test_map_values_are_four_counts_of_a_block(case):
    grid, counts = case
    rows, columns = -(-grid[0] // 2), -(-grid[1] // 2)
    values = counts_to_map(torch.tensor(counts), grid)
    expected = []
    for y, x in itertools.product(range(0, rows, 2), range(0, columns, 2)):
        block = [counts[i * columns + j] if i < rows and j < columns else 0 for i in (y, y + 1) for j in (x, x + 1)]
        expected.append(block[0] + 5 * block[1] + 25 * block[2] + 125 * block[3])
    assert values.tolist() == expected and len(expected) == num_blocks(grid)
    assert map_to_counts(values, grid).tolist() == counts


def test_batches_of_masks_agree_with_single_ones():
    grid = (5, 7)
    _, capacity = zip(*[(c, len(c)) for c in cells_of(grid)], strict=True)
    counts = (torch.rand(3, 2, len(capacity)) * (torch.tensor(capacity) + 1)).long()
    masks = counts_to_mask(counts, grid)
    assert torch.equal(masks[1, 1], counts_to_mask(counts[1, 1], grid))
    assert torch.equal(mask_to_counts(masks, grid), counts)
    assert torch.equal(map_to_counts(counts_to_map(counts, grid), grid), counts)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_lattice_follows_the_bayer_pattern_and_is_canonical(grid):
    pattern = bayer_pattern(grid).tolist()
    order = sorted(range(len(pattern)), key=lambda p: (-pattern[p], p))
    for length in {1, 2, len(order) // 3 or 1, len(order)} - {len(order) + 1}:
        if length > len(order):
            continue
        positions = lattice_positions(length, grid)
        assert positions.tolist() == sorted(order[:length])
        mask = torch.zeros(len(order), dtype=torch.bool).index_fill(0, positions, True)
        assert torch.equal(counts_to_mask(mask_to_counts(mask, grid), grid), mask)


def test_capacities_at_the_borders():
    assert block_capacities((3, 5)).tolist() == [[4, 4, 2, 2], [2, 0, 1, 0]]
    assert block_capacities((4, 4)).tolist() == [[4, 4, 4, 4]]


def test_other_masks_are_refused_with_their_cell():
    mask = torch.zeros(2, 25, dtype=torch.bool)
    mask[1, 4] = True  # the top right corner alone in its cell of two; the cell keeps its lower patch first
    with pytest.raises(CodeError, match=r"cell 2 \(row 0, column 2\) of the grid 5 x 5 keeps other patches"):
        mask_to_counts(mask, (5, 5))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: counts_to_mask(torch.tensor([4, 3]), (2, 3)), "cell 1 .* keeps 3 patches, expected 0 to 2"),
        (lambda: counts_to_mask(torch.tensor([-1]), (2, 2)), "keeps -1 patches"),
        (lambda: counts_to_mask(torch.tensor([1, 1]), (2, 2)), r"counts has shape \[2\], expected 1 entries"),
        (lambda: mask_to_counts(torch.ones(5, dtype=torch.bool), (2, 2)), "expected 4 entries"),
        (
            lambda: map_to_counts(torch.tensor([5]), (2, 2)),
            "block 0 .* has map value 5, expected four counts of at most",
        ),
        (lambda: map_to_counts(torch.tensor([MAP_VALUES]), (4, 4)), "has map value 625"),
        (lambda: map_to_counts(torch.tensor([0, 0]), (4, 4)), "expected 1 entries"),
        (lambda: lattice_positions(0, (2, 2)), "a lattice of 0 tokens on a grid of 2 x 2, expected 1 to 4"),
        (lambda: lattice_positions(5, (2, 2)), "a lattice of 5 tokens"),
    ],
)
def test_values_that_do_not_fit_are_refused(call, message):
    with pytest.raises(CodeError, match=message):
        call()


def test_tables_made_in_inference_mode_serve_training():
    grid = (6, 9)
    with torch.inference_mode():
        lattice_positions(3, grid)
        counts_to_mask(torch.zeros(15, dtype=torch.long), grid)
    weight = torch.ones(54, requires_grad=True)
    (weight[lattice_positions(10, grid)].sum() + weight[counts_to_mask(torch.ones(15).long(), grid)].sum()).backward()
    assert weight.grad.sum() == 25
