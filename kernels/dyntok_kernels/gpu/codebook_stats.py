"""Counts and sums of the vectors of each code, always added in the same order (no atomic addition)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dyntok_kernels.gpu.tiles import FLOATS, Blocks, Variant, check, padded

_BLOCKS = Blocks(1, 16, warps=1)  # a code, vectors at a time


@triton.jit
def codebook_stats_kernel(
    z, order, bounds, counts, sums, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per code. order: rows of z sorted by code; bounds: int64 [K+1], where each code begins in it."""
    code = tl.program_id(0)
    start = tl.load(bounds + code)
    end = tl.load(bounds + code + 1)
    columns = tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], tl.float32)
    for first in range(start, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        row = tl.load(order + place, mask=place < end, other=0)
        inside = (place < end)[:, None] & (columns < WIDTH)[None, :]
        total += tl.sum(tl.load(z + row[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0).to(tl.float32), 0)
    tl.store(sums + code.to(tl.int64) * WIDTH + columns, total, mask=columns < WIDTH)
    tl.store(counts + code, (end - start).to(tl.float32))


def codebook_stats(z: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Launch the kernel; see `ops.codebook_stats`."""
    check(z.dtype in FLOATS, f"vectors are {z.dtype}, expected one of {FLOATS}")
    z, width = z.contiguous(), z.shape[1]
    counts = torch.empty(size, dtype=torch.float32, device=z.device)
    sums = torch.empty(size, width, dtype=torch.float32, device=z.device)
    ordered, order = codes.sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(size + 1, device=z.device))
    launch = {**_constants(width), "num_warps": _BLOCKS.warps, "num_stages": _BLOCKS.stages}
    codebook_stats_kernel[(size,)](z, order, bounds, counts, sums, **launch)
    return counts, sums


def _constants(width: int) -> dict[str, int]:
    return {"WIDTH": width, "BLOCK_C": padded(width), "BLOCK": _BLOCKS.n}


def variants() -> list[Variant]:
    types = {"order": torch.int64, "bounds": torch.int64, "counts": torch.float32, "sums": torch.float32}
    return [
        Variant(
            f"codebook_stats c={width}",
            dtype,
            codebook_stats_kernel,
            {"z": dtype, **types},
            _constants(width),
            _BLOCKS,
            multiplies=False,
        )
        for dtype in FLOATS
        for width in (8, 16, 32, 64)
    ]
