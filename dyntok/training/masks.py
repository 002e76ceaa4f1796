"""Keep masks that ignore the picture, to compare the selector's choice with.

Not here: choices that depend on the picture (`dyntok/policy.py`).
"""

import hashlib

import torch
from torch import Tensor

_GOLDEN = (5**0.5 - 1) / 2


def seed_of(key: str, salt: str) -> int:
    """Returns a 63-bit seed for a key, the same in every run and on every machine."""
    return int.from_bytes(hashlib.sha256(f"{salt}/{key}".encode()).digest()[:8], "big") >> 1


def random_mask(count: int, grid: tuple[int, int], key: str) -> Tensor:
    """Returns a mask, bool [N], with `count` of rows * columns patches, drawn by a seed made from `key`."""
    num_patches = grid[0] * grid[1]
    generator = torch.Generator("cpu").manual_seed(seed_of(key, "random_mask"))
    drawn = torch.randperm(num_patches, generator=generator, device="cpu")
    return torch.zeros(num_patches, dtype=torch.bool, device="cpu").index_fill_(0, drawn[:count], True)


def even_mask(count: int, grid: tuple[int, int]) -> Tensor:
    """Returns a mask, bool [N], with `count` of rows * columns patches, spread evenly in both directions.

    The numbers per row differ by at most one. Within a row the distances are equal, and each row starts at an offset
    that grows by the golden ratio of the distance, so that no column is preferred (a Fibonacci lattice).
    """
    rows, columns = grid
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    bounds = [(2 * row * count + rows) // (2 * rows) for row in range(rows + 1)]
    start = 0.5
    for row in range(rows):
        here = bounds[row + 1] - bounds[row]
        mask[row, [int((i + start) * columns / here) for i in range(here)]] = True
        start = (start + _GOLDEN) % 1 if here else start
    return mask.flatten()
