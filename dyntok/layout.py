"""Canonical masks and the lattice: choices of patches that a few numbers describe, or the number of tokens alone.

Canonical masks: the grid is cut into cells of 2 x 2 patches, and a cell that keeps n patches keeps the first n of a
fixed order. One count per cell then describes the mask. A map value packs the four counts of a block of 4 x 4 patches
into one number, 0 to 624.

The lattice: a fixed order over all patches of the grid, of which an image of T tokens keeps the first T. Its masks are
canonical, too.

Both orders are that of `bayer_pattern`, highest threshold first. Not here: ids of an LLM (`vocab.py`), scores
(`model/selector.py`).
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from dyntok.device import current_stream
from dyntok.errors import CodeError

_Table = TypeVar("_Table", bound=Callable[..., object])

MAX_SIDE = 128  # patches along one side of a grid that a tokenizer makes
MAP_VALUES = 5**4  # four counts of 0 to 4
_CELL_ORDER = (2, 1, 3, 0)  # bottom left, top right, bottom right, top left: the order of `bayer_pattern`
_PLACE_VALUES = (1, 5, 25, 125)  # of the four cells of a block, in raster order


def _table(make: _Table) -> _Table:
    """Remembers the tables of a grid and a device.

    A table that was made in inference mode could not take part in training later. One that was made while a graph is
    compiled, exported or captured belongs to that graph. Each stream of a GPU has tables of its own, since no stream
    waits for what another one makes.
    """
    normal = torch.inference_mode(False)(make)
    remembered = lru_cache(lambda stream, *args: normal(*args))

    @wraps(make)
    def table(*args: Any) -> object:
        if torch.compiler.is_compiling():
            return make(*args)
        stream = current_stream(next((arg for arg in args if isinstance(arg, torch.device)), None))
        return normal(*args) if stream is None else remembered(stream, *args)

    return cast(_Table, table)


def bayer_pattern(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Returns the thresholds of an ordered dither (Bayer 1973) for a grid: float [N], evenly spaced within -1 to 1."""
    # below, sides stay positive: ONNX divides negative numbers otherwise
    matrix = torch.zeros(1, 1, dtype=torch.float32, device=device)
    for _ in range(3):
        matrix = torch.cat([torch.cat([4 * matrix, 4 * matrix + 2], 1), torch.cat([4 * matrix + 3, 4 * matrix + 1], 1)])
    tiled = matrix.repeat((grid[0] + 7) // 8, (grid[1] + 7) // 8)[: grid[0], : grid[1]]
    return ((2 * tiled + 1) / 64 - 1).flatten()


@_table
def lattice_order(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Returns all positions of the grid, int64 [N], in the order in which the lattice keeps them."""
    return bayer_pattern(grid, device).sort(descending=True, stable=True).indices


def lattice_mask(lengths: Tensor, grid: tuple[int, int]) -> Tensor:
    """Returns the patches that images of `lengths` [B] tokens keep, bool [B, N], on the device of the lengths."""
    return lattice_order(grid, lengths.device).argsort() < lengths[:, None]


def lattice_positions(length: int, grid: tuple[int, int]) -> Tensor:
    """Returns the positions that an image of `length` tokens keeps, int64 [T], in raster order.

    Raises `CodeError` unless `length` is 1 to N.
    """
    patches = grid[0] * grid[1]
    if not 1 <= length <= patches:
        raise CodeError(f"a lattice of {length} tokens on a grid of {grid[0]} x {grid[1]}, expected 1 to {patches}")
    return lattice_order(grid, torch.device("cpu"))[:length].sort().values


def num_blocks(grid: tuple[int, int]) -> int:
    """Returns the number of 4 x 4 blocks, those cut off at the right and bottom border included."""
    return -(-grid[0] // 4) * -(-grid[1] // 4)


def counts_to_mask(counts: Tensor, grid: tuple[int, int]) -> Tensor:
    """Returns the keep mask, bool [..., N], for the counts of kept patches of all cells, int64 [..., cells].

    Raises `CodeError` where a count exceeds the patches of its cell.
    """
    cell, rank, capacity = _cells(grid, counts.device)
    _check_last(counts, len(capacity), "counts", grid)
    bad = (counts < 0) | (counts > capacity)
    if bad.any():
        where = bad.nonzero()[0].tolist()
        most = int(capacity[where[-1]])
        raise CodeError(
            f"{_cell_name(where[-1], grid)} keeps {int(counts[tuple(where)])} patches, expected 0 to {most}"
        )
    return rank < counts[..., cell]


def mask_to_counts(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Returns the number of patches that each cell keeps, int64 [..., cells]: the inverse of `counts_to_mask`.

    Raises `CodeError` with the cell where the mask is not canonical.
    """
    cell, rank, capacity = _cells(grid, mask.device)
    _check_last(mask, len(cell), "the mask", grid)
    counts = torch.zeros(*mask.shape[:-1], len(capacity), dtype=torch.long, device=mask.device)
    counts.scatter_add_(-1, cell.expand(mask.shape), mask.long())
    bad = (rank < counts[..., cell]) != mask
    if bad.any():
        number = int(cell[bad.nonzero()[0, -1]])
        raise CodeError(
            f"{_cell_name(number, grid)} keeps other patches than the first of the fixed order, "
            "so counts can't describe "
            'this mask; encode with places="map", or write positions'
        )
    return counts


def canonical_mask(mask: Tensor, grid: tuple[int, int], places: str) -> Tensor:
    """Returns a mask that keeps equally many patches where `places` wants them: bool [B, N].

    places: "map" keeps each cell's count, and of its patches the first of the fixed order; "lattice" keeps each image's
        count; "free" returns the mask itself.
    """
    if places == "map":
        cell, rank, capacity = _cells(grid, mask.device)
        counts = torch.zeros(len(mask), len(capacity), dtype=torch.long, device=mask.device)
        counts.scatter_add_(1, cell.expand(mask.shape), mask.long())
        return rank < counts[:, cell]
    if places == "lattice":
        return lattice_mask(mask.sum(1), grid)
    return mask


def counts_to_map(counts: Tensor, grid: tuple[int, int]) -> Tensor:
    """Returns the map values, int64 [..., blocks] in raster order, of the counts of all cells, int64 [..., cells].

    A value is c0 + 5 c1 + 25 c2 + 125 c3, its block's four cells in raster order; cells beyond the border count 0.
    """
    slot, _ = _slots(grid)
    padded = torch.cat([counts, counts.new_zeros(*counts.shape[:-1], 1)], -1)
    return (padded[..., slot.to(counts.device)] * counts.new_tensor(_PLACE_VALUES)).sum(-1)


def map_to_counts(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Returns the counts of all cells, int64 [..., cells]: the inverse of `counts_to_map`.

    Raises `CodeError` where a block has more patches in its map value than in the grid.
    """
    slot, cells = (table.to(values.device) for table in _slots(grid))
    _check_last(values, len(slot), "the map", grid)
    digits = map_digits().to(values.device)
    outside = (values < 0) | (values >= MAP_VALUES)
    bad = outside | (digits[values.clamp(0, MAP_VALUES - 1)] > block_capacities(grid).to(values.device)).any(-1)
    if bad.any():
        where = bad.nonzero()[0].tolist()
        fits = block_capacities(grid)[where[-1]].tolist()
        raise CodeError(
            f"block {where[-1]} of the grid {grid[0]} x {grid[1]} has map value {int(values[tuple(where)])}, "
            f"expected four counts of at most {fits}"
        )
    return digits[values].flatten(-2)[..., cells]


@_table
def map_digits() -> Tensor:
    """Returns the four counts of every map value, int64 [625, 4]."""
    return torch.arange(MAP_VALUES, device="cpu")[:, None] // torch.tensor(_PLACE_VALUES, device="cpu") % 5


@_table
def block_capacities(grid: tuple[int, int]) -> Tensor:
    """Returns the number of patches in the four cells of each block, int64 [blocks, 4]; 0 beyond the border."""
    slot, _ = _slots(grid)
    sizes = _cells(grid, torch.device("cpu"))[2]
    return torch.cat([sizes, sizes.new_zeros(1)])[slot]


@_table
def _cells(grid: tuple[int, int], device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns each patch's cell and its rank in that cell, int64 [N] each, and each cell's size, int64 [cells]."""
    columns = -(-grid[1] // 2)
    place = torch.arange(grid[0] * grid[1], device=device)
    y, x = place // grid[1], place % grid[1]
    cell = y // 2 * columns + x // 2
    quarter, order = y % 2 * 2 + x % 2, torch.zeros_like(place)
    for number, which in enumerate(_CELL_ORDER):  # without a tensor of the host
        order = torch.where(quarter == which, number, order)  # among four, were all of them there
    present = torch.zeros(-(-grid[0] // 2) * columns, 4, dtype=torch.long, device=device)
    present = present.flatten().index_fill(0, cell * 4 + order, 1).view_as(present)
    return cell, (present.cumsum(1) - 1)[cell, order], present.sum(1)


@_table
def _slots(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns the cells of each block, int64 [blocks, 4], and each cell's index among those, int64 [cells].

    A missing cell has the number `cells`.
    """
    rows, columns = -(-grid[0] // 2), -(-grid[1] // 2)
    numbers = torch.full((-(-rows // 2) * 2, -(-columns // 2) * 2), rows * columns, device="cpu")
    numbers[:rows, :columns] = torch.arange(rows * columns, device="cpu").view(rows, columns)
    slot = numbers.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).transpose(1, 2).reshape(-1, 4)
    return slot, slot.flatten().argsort()[: rows * columns]


def _cell_name(number: int, grid: tuple[int, int]) -> str:
    row, column = divmod(number, -(-grid[1] // 2))
    return f"cell {number} (row {row}, column {column}) of the grid {grid[0]} x {grid[1]}"


def _check_last(values: Tensor, expected: int, what: str, grid: tuple[int, int]) -> None:
    if values.dim() < 1 or values.shape[-1] != expected:
        raise CodeError(
            f"{what} has shape {list(values.shape)}, expected {expected} entries for a grid of {grid[0]} x {grid[1]}"
        )
