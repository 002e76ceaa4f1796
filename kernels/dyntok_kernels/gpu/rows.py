"""Moves rows between the grid of patches and the packed rows of kept ones: compaction, gather, scatter."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dyntok_kernels.gpu.tiles import FLOATS, Blocks, Variant, cast, check, kernel

_BLOCKS = Blocks(16, 128)  # rows, columns
_COMPACT = Blocks(1, 1024)  # an image, patches at a time


@kernel("patches")
def compact_kernel(keep, cu_seqlens, indices, patches, BLOCK: tl.constexpr):
    """One program per image writes the places of its True entries, in order, from the image's offset on."""
    image = tl.program_id(0)
    place = tl.load(cu_seqlens + image)
    for start in range(0, patches, BLOCK):
        patch = start + tl.arange(0, BLOCK)
        kept = tl.load(keep + image.to(tl.int64) * patches + patch, mask=patch < patches, other=0).to(tl.int32)
        rank = tl.cumsum(kept, 0)
        tl.store(indices + place + rank - 1, image * patches + patch, mask=kept != 0)
        place += tl.sum(kept, 0)


@kernel("rows", "patches")
def gather_kernel(
    x,
    index,
    embed,
    out,
    rows,
    patches,
    WIDTH: tl.constexpr,
    EMBEDDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write out[t] = x[index[t]] (+ embed[index[t] % patches]); zeros where the index is -1."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    source = tl.load(index + row, mask=row < rows, other=-1).to(tl.int64)
    inside = (source >= 0)[:, None] & (column < WIDTH)[None, :]
    values = tl.load(x + source[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
    if EMBEDDED:
        place = tl.where(source >= 0, source % patches, 0)
        added = tl.load(embed + place[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
        values = cast(values.to(tl.float32) + added.to(tl.float32), x.dtype.element_ty)
    where = out + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(where, values, mask=(row < rows)[:, None] & (column < WIDTH)[None, :])


@kernel("total", "patches")
def scatter_kernel(
    rows,
    inverse,
    base,
    out,
    total,
    patches,
    WIDTH: tl.constexpr,
    BASED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write out[m] = rows[inverse[m]], or zeros where that is -1 (+ base[m % patches])."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    source = tl.load(inverse + row, mask=row < total, other=-1).to(tl.int64)
    inside = (row < total)[:, None] & (column < WIDTH)[None, :]
    values = tl.load(rows + source[:, None] * WIDTH + column[None, :], mask=(source >= 0)[:, None] & inside, other=0.0)
    if BASED:
        added = tl.load(base + (row % patches)[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
        values = cast(values.to(tl.float32) + added.to(tl.float32), rows.dtype.element_ty)
    tl.store(out + row.to(tl.int64)[:, None] * WIDTH + column[None, :], values, mask=inside)


def compact(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the compaction; see `ops.compact`."""
    images, patches = keep.shape
    cu_seqlens = torch.zeros(images + 1, dtype=torch.int32, device=keep.device)
    torch.cumsum(keep.sum(1), 0, out=cu_seqlens[1:])
    indices = torch.full((images * patches,), -1, dtype=torch.int32, device=keep.device)
    if indices.numel():
        compact_kernel[(images,)](
            keep.contiguous(), cu_seqlens, indices, patches, BLOCK=_COMPACT.n,
            num_warps=_COMPACT.warps, num_stages=_COMPACT.stages,
        )  # fmt: skip
    return indices, cu_seqlens


def gather_rows(x: Tensor, index: Tensor, embed: Tensor | None) -> Tensor:
    """Launch the gather; see `ops.gather_rows`."""
    check(x.dtype in FLOATS, f"rows are {x.dtype}, expected one of {FLOATS}")
    x, width = x.contiguous(), x.shape[1]
    out = torch.empty(len(index), width, dtype=x.dtype, device=x.device)
    if out.numel():
        embedded = embed is not None
        embed = embed.to(x.dtype).contiguous() if embedded else x
        gather_kernel[_grid(len(index), width)](
            x, index.int().contiguous(), embed, out, len(index), len(embed), WIDTH=width, EMBEDDED=embedded, **_LAUNCH
        )
    return out


def scatter_rows(rows: Tensor, index: Tensor, base: Tensor | None, total: int) -> Tensor:
    """Launch the scatter; see `ops.scatter_rows`."""
    check(rows.dtype in FLOATS, f"rows are {rows.dtype}, expected one of {FLOATS}")
    rows, width = rows.contiguous(), rows.shape[1]
    out = torch.empty(total, width, dtype=rows.dtype, device=rows.device)
    if out.numel():
        # the last entry takes what belongs nowhere
        inverse = torch.full((total + 1,), -1, dtype=torch.int32, device=rows.device)
        inverse[torch.where(index < 0, total, index).long()] = torch.arange(
            len(index), dtype=torch.int32, device=rows.device
        )
        based = base is not None
        base = base.to(rows.dtype).contiguous() if based else out
        scatter_kernel[_grid(total, width)](
            rows, inverse, base, out, total, len(base), WIDTH=width, BASED=based, **_LAUNCH
        )
    return out


_SIZES = {"BLOCK_M": _BLOCKS.m, "BLOCK_D": _BLOCKS.n}
_LAUNCH = {**_SIZES, "num_warps": _BLOCKS.warps, "num_stages": _BLOCKS.stages}


def _grid(rows: int, width: int) -> tuple[int, int]:
    return triton.cdiv(rows, _BLOCKS.m), triton.cdiv(width, _BLOCKS.n)


def variants() -> list[Variant]:
    numbers = {"rows": "i32", "patches": "i32", "total": "i32"}
    types = {"keep": torch.bool, "cu_seqlens": torch.int32, "indices": torch.int32, "patches": "i32"}
    found = [Variant("compact", torch.int32, compact_kernel, types, {"BLOCK": _COMPACT.n}, _COMPACT, multiplies=False)]
    for dtype in FLOATS:
        for width, fused in ((192, False), (1408, False), (192, True), (1408, True)):
            constants = {"WIDTH": width, **_SIZES}
            types = {"x": dtype, "index": torch.int32, "embed": dtype, "out": dtype, "rows": "i32", "patches": "i32"}
            name = f"gather_rows d={width} embedded" if fused else f"gather_rows d={width}"
            constants["EMBEDDED"] = fused
            gather = Variant(name, dtype, gather_kernel, types, constants, _BLOCKS, multiplies=False)
            types = {
                "rows": dtype,
                "inverse": torch.int32,
                "base": dtype,
                "out": dtype,
                **{n: numbers[n] for n in ("total", "patches")},
            }
            name = f"scatter_rows d={width} based" if fused else f"scatter_rows d={width}"
            constants = {"WIDTH": width, **_SIZES, "BASED": fused}
            scatter = Variant(name, dtype, scatter_kernel, types, constants, _BLOCKS, multiplies=False)
            found += [gather, scatter]
    return found
