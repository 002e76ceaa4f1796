"""Merges dropped patches into their most similar kept ones (ToMe, arXiv 2210.09461) without a similarity matrix."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dyntok_kernels.gpu.tiles import FLOATS, Blocks, Variant, cast, check, dot, find_block, kernel, slots

BLOCKS = Blocks(32, 32, warps=4)


@kernel("images")
def assign_kernel(
    x, scale, kept, cu_kept, dropped, cu_dropped, owner, images, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write owner[patch] = the kept row of greatest cosine, numbered over the batch; the lowest of equal ones.

    scale: 1 / norm of each patch.
    """
    image, first, start, end = find_block(cu_dropped, images, tl.program_id(0), BLOCK_M)
    if first >= end:
        return
    start_kept = tl.load(cu_kept + image)
    end_kept = tl.load(cu_kept + image + 1)
    place = first + tl.arange(0, BLOCK_M)
    patch = tl.load(dropped + place, mask=place < end, other=0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    found = tl.zeros([BLOCK_M], tl.int32) + start_kept
    for block in range(start_kept, end_kept, BLOCK_N):
        row = block + tl.arange(0, BLOCK_N)
        target = tl.load(kept + row, mask=row < end_kept, other=0).to(tl.int64)
        product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for column in range(0, WIDTH, BLOCK_D):
            inside = (column + columns < WIDTH)[None, :]
            own = tl.load(x + patch[:, None] * WIDTH + (column + columns)[None, :], mask=inside, other=0.0)
            other = tl.load(x + target[:, None] * WIDTH + (column + columns)[None, :], mask=inside, other=0.0)
            product += dot(own, tl.trans(other))
        cosine = product * tl.load(scale + target)[None, :]
        cosine = tl.where((row < end_kept)[None, :], cosine, float("-inf"))
        top, index = tl.max(cosine, 1, return_indices=True)
        found = tl.where(top > best, block + index, found)
        best = tl.maximum(best, top)
    tl.store(owner + patch, found, mask=place < end)


@kernel("images")
def average_kernel(
    x, weights, owner, kept, cu_kept, dropped, cu_dropped, merged, sizes, images, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write merged[t] = the weighted mean of the patches that row t owns; sizes[t] = the sum of their weights."""
    image, first, start, end = find_block(cu_kept, images, tl.program_id(0), BLOCK_M)
    if first >= end:
        return
    start_dropped = tl.load(cu_dropped + image)
    end_dropped = tl.load(cu_dropped + image + 1)
    row = first + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (column < WIDTH)[None, :]
    patch = tl.load(kept + row, mask=row < end, other=0).to(tl.int64)
    size = tl.load(weights + patch)
    total = tl.load(x + patch[:, None] * WIDTH + column[None, :], mask=inside, other=0.0).to(tl.float32) * size[:, None]
    for block in range(start_dropped, end_dropped, BLOCK_N):
        place = block + tl.arange(0, BLOCK_N)
        source = tl.load(dropped + place, mask=place < end_dropped, other=0).to(tl.int64)
        mine = tl.load(owner + source, mask=place < end_dropped, other=-1)[None, :] == row[:, None]  # [m, n]
        share = tl.where(mine, tl.load(weights + source)[None, :], 0.0)
        # a row that is not of this image must not be read: 0 times its NaN would be NaN
        filled = inside & (place < end_dropped)[:, None]
        values = tl.load(x + source[:, None] * WIDTH + column[None, :], mask=filled, other=0.0)
        rounded = cast(share, values.dtype)
        total += dot(rounded, values)
        if x.dtype.element_ty != tl.float32:  # what rounding takes from weights such as 257, which bfloat16 lacks
            total += dot(cast(share - rounded.to(tl.float32), values.dtype), values)
        size += tl.sum(share, 1)
    where = merged + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(where, cast(total / size[:, None], merged.dtype.element_ty), mask=(row < end)[:, None] & inside)
    tl.store(sizes + row, size, mask=(row < end) & (tl.program_id(1) == 0))


def merge_similar(
    x: Tensor, weights: Tensor, kept: Tensor, cu_kept: Tensor, dropped: Tensor, cu_dropped: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch both kernels; see `ops.merge_similar`."""
    check(x.dtype in FLOATS, f"patches are {x.dtype}, expected one of {FLOATS}")
    x, weights, width = x.contiguous(), weights.float().contiguous(), x.shape[1]
    kept, cu_kept, dropped, cu_dropped = (lists.contiguous() for lists in (kept, cu_kept, dropped, cu_dropped))
    merged = torch.empty(len(kept), width, dtype=x.dtype, device=x.device)
    sizes = torch.empty(len(kept), dtype=torch.float32, device=x.device)
    owner = torch.empty(len(x), dtype=torch.int32, device=x.device)
    owner[kept.long()] = torch.arange(len(kept), dtype=torch.int32, device=x.device)
    scale = 1 / x.float().norm(dim=-1).clamp(min=1e-12)
    images = len(cu_kept) - 1
    launch = {**_constants(width), "num_warps": BLOCKS.warps, "num_stages": BLOCKS.stages}
    if len(dropped):
        grid = (slots(len(dropped), images, BLOCKS.m),)
        assign_kernel[grid](x, scale, kept, cu_kept, dropped, cu_dropped, owner, images, **launch)
    if len(kept):
        grid = slots(len(kept), images, BLOCKS.m), triton.cdiv(width, launch["BLOCK_D"])
        average_kernel[grid](x, weights, owner, kept, cu_kept, dropped, cu_dropped, merged, sizes, images, **launch)
    return merged, sizes, owner


def _constants(width: int) -> dict[str, int]:
    return {"WIDTH": width, "BLOCK_M": BLOCKS.m, "BLOCK_N": BLOCKS.n, "BLOCK_D": 32}


def variants() -> list[Variant]:
    found = []
    lists = {"kept": torch.int32, "cu_kept": torch.int32, "dropped": torch.int32, "cu_dropped": torch.int32}
    for dtype in FLOATS:
        for width in (192, 1408):
            constants = _constants(width)
            types = {"x": dtype, "scale": torch.float32, **lists, "owner": torch.int32, "images": "i32"}
            found.append(Variant(f"merge_similar.assign d={width}", dtype, assign_kernel, types, constants, BLOCKS))
            types = {"x": dtype, "weights": torch.float32, "owner": torch.int32, **lists}
            types |= {"merged": dtype, "sizes": torch.float32, "images": "i32"}
            found.append(Variant(f"merge_similar.average d={width}", dtype, average_kernel, types, constants, BLOCKS))
    return found
