"""Finds the nearest codebook row of every vector in one pass. Scores exist only as blocks in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dyntok_kernels.gpu.tiles import FLOATS, Blocks, Variant, alike_dot, cast, check, kernel, padded
from dyntok_kernels.limits import MAX_CODE_DIM

CODE_SIZES = (8, 16, 32, 64)


def blocks_for(dtype: torch.dtype, dim: int) -> Blocks:
    if dtype == torch.float32:
        return Blocks(32, 64, warps=4) if dim <= 32 else Blocks(32, 32, warps=4)
    return Blocks(64, 128, warps=4, stages=2)


@kernel("rows", "size", "normalize")
def nearest_code_kernel(
    z, codebook, half_norms, codes, rows, size, normalize,
    WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """half_norms: |c|^2 / 2, float32 [K]. |z - c|^2 is smallest where z.c - |c|^2 / 2 is greatest."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (columns < WIDTH)[None, :]
    vectors = tl.load(z + (row.to(tl.int64) * WIDTH)[:, None] + columns[None, :], mask=inside, other=0.0)
    if normalize != 0:
        wide = vectors.to(tl.float32)
        norm = tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), 1e-12)
        vectors = cast(wide / norm[:, None], vectors.dtype)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    found = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, size, BLOCK_N):
        code = start + tl.arange(0, BLOCK_N)
        known = code < size
        present = known[:, None] & (columns < WIDTH)[None, :]
        entries = tl.load(codebook + (code * WIDTH)[:, None] + columns[None, :], mask=present, other=0.0)
        score = (
            alike_dot(vectors, tl.trans(entries)) - tl.load(half_norms + code, mask=known, other=float("inf"))[None, :]
        )
        top, index = tl.max(score, 1, return_indices=True)  # the lowest index of equal ones
        found = tl.where(top > best, start + index, found)  # an earlier block keeps a tie
        best = tl.maximum(best, top)
    tl.store(codes + row, found.to(tl.int64), mask=row < rows)


def nearest_code(z: Tensor, codebook: Tensor, normalize: bool) -> Tensor:
    """Launch the search. Returns int64 [T]; see `ops.nearest_code`. Scores are float32."""
    check(
        z.dtype in FLOATS and z.dtype == codebook.dtype,
        f"z is {z.dtype} and the codebook {codebook.dtype}, expected one of {FLOATS}",
    )
    dim = z.shape[1]
    check(1 <= dim <= MAX_CODE_DIM, f"codes have {dim} channels, the kernel takes 1 to {MAX_CODE_DIM}")
    z, codebook = z.contiguous(), codebook.contiguous()
    codes = torch.empty(len(z), dtype=torch.long, device=z.device)
    half_norms = codebook.float().square().sum(-1) / 2
    blocks = blocks_for(z.dtype, dim)
    if len(z):
        nearest_code_kernel[(triton.cdiv(len(z), blocks.m),)](
            z, codebook, half_norms, codes, len(z), len(codebook), int(normalize), **_constants(dim, blocks),
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return codes


def _constants(dim: int, blocks: Blocks) -> dict[str, int]:
    return {"WIDTH": dim, "BLOCK_C": padded(dim), "BLOCK_M": blocks.m, "BLOCK_N": blocks.n}


def variants() -> list[Variant]:
    found = []
    for dtype in FLOATS:
        for dim in CODE_SIZES:
            types = {"z": dtype, "codebook": dtype, "half_norms": torch.float32, "codes": torch.int64}
            types |= dict.fromkeys(("rows", "size", "normalize"), "i32")
            blocks = blocks_for(dtype, dim)
            found.append(
                Variant(f"nearest_code c={dim}", dtype, nearest_code_kernel, types, _constants(dim, blocks), blocks)
            )
    return found
