"""Finds the nearest codebook row of every vector in one pass. Scores exist only as blocks in registers.

Rows whose best two scores lie within rounding are searched again in float64, as the form for CPUs does, so that equal
and nearly equal rows of the codebook give the same code everywhere.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dyntok_kernels.gpu.tiles import FLOATS, Blocks, Variant, alike_dot, cast, check, kernel, padded
from dyntok_kernels.limits import MAX_CODE_DIM

CODE_SIZES = (8, 16, 32, 64)
_AGAIN = Blocks(1, 16, warps=4)  # a vector, codes at a time
_EPS, _EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


def blocks_for(dtype: torch.dtype, dim: int) -> Blocks:
    if dtype == torch.float32:
        return Blocks(32, 64, warps=4) if dim <= 32 else Blocks(32, 32, warps=4)
    return Blocks(64, 128, warps=4, stages=2)


@triton.jit
def _unit(vectors):
    """Returns l2-normalized rows [m, c] in their own dtype."""
    wide = vectors.to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), 1e-12)
    return cast(wide / norm[:, None], vectors.dtype)


@kernel("rows", "size", "normalize")
def nearest_code_kernel(
    z, codebook, half_norms, longest, codes, doubtful, rows, size, normalize, slack,
    WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """half_norms: |c|^2 / 2, float32 [K]. |z - c|^2 is smallest where z.c - |c|^2 / 2 is greatest.

    longest: the greatest |c|, float32 [1]. doubtful: int32 [T], 1 where the runner-up is within `slack` roundings.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (columns < WIDTH)[None, :]
    vectors = tl.load(z + (row.to(tl.int64) * WIDTH)[:, None] + columns[None, :], mask=inside, other=0.0)
    if normalize != 0:
        vectors = _unit(vectors)
    second = tl.full([BLOCK_M], float("-inf"), tl.float32)
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
        others = tl.where(tl.arange(0, BLOCK_N)[None, :] == index[:, None], float("-inf"), score)
        second = tl.maximum(second, tl.maximum(tl.minimum(best, top), tl.max(others, 1)))
        found = tl.where(top > best, start + index, found)  # an earlier block keeps a tie
        best = tl.maximum(best, top)
    tl.store(codes + row, found.to(tl.int64), mask=row < rows)
    wide = vectors.to(tl.float32)
    length = tl.load(longest)
    limit = slack * length * (tl.sqrt(tl.sum(wide * wide, 1)) + length)
    tl.store(doubtful + row, (best - second <= limit).to(tl.int32), mask=row < rows)


@kernel("size", "normalize")
def search_again_kernel(
    z, codebook, longest, codes, doubtful, size, normalize, slack,
    WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per vector searches a doubtful one in float64: the lowest of all codes that are equally near."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(doubtful + row) == 0:
        return
    columns = tl.arange(0, BLOCK_C)
    vector = tl.load(z + row * WIDTH + columns[None, :], mask=(columns < WIDTH)[None, :], other=0.0)  # [1, c]
    if normalize != 0:
        vector = _unit(vector)
    wide = vector.to(tl.float64)
    length = tl.load(longest).to(tl.float64)
    limit = slack * length * (tl.sqrt(tl.sum(wide * wide)) + length)
    best = tl.full([], float("-inf"), tl.float64)
    found = tl.full([], 0, tl.int32)
    for start in range(0, size, BLOCK_N):
        code = start + tl.arange(0, BLOCK_N)
        known = code < size
        present = known[:, None] & (columns < WIDTH)[None, :]
        entries = tl.load(codebook + (code * WIDTH)[:, None] + columns[None, :], mask=present, other=0.0).to(tl.float64)
        score = tl.sum((wide - entries / 2) * entries, 1)
        score = tl.where(known, score, float("-inf"))
        top = tl.max(score, 0)
        first = tl.min(tl.where(score >= top - limit, code, size), 0)
        better = top > best + limit
        found = tl.where(better, first, found)
        best = tl.where(better, top, best)
    tl.store(codes + row, found.to(tl.int64))


def nearest_code(z: Tensor, codebook: Tensor, normalize: bool) -> Tensor:
    """Launch the search. Returns int64 [T]; see `ops.nearest_code`.

    Scores are float32, and float64 for the rows that this cannot decide. The host does not learn which those are.
    """
    check(
        z.dtype in FLOATS and z.dtype == codebook.dtype,
        f"z is {z.dtype} and the codebook {codebook.dtype}, expected one of {FLOATS}",
    )
    dim = z.shape[1]
    check(1 <= dim <= MAX_CODE_DIM, f"codes have {dim} channels, the kernel takes 1 to {MAX_CODE_DIM}")
    z, codebook = z.contiguous(), codebook.contiguous()
    codes = torch.empty(len(z), dtype=torch.long, device=z.device)
    squares = codebook.float().square().sum(-1)
    half_norms, longest = squares / 2, squares.amax(0, keepdim=True).sqrt()
    doubtful = torch.empty(len(z), dtype=torch.int32, device=z.device)
    blocks = blocks_for(z.dtype, dim)
    if len(z):
        nearest_code_kernel[(triton.cdiv(len(z), blocks.m),)](
            z, codebook, half_norms, longest, codes, doubtful, len(z), len(codebook), int(normalize), 2 * dim * _EPS,
            **_constants(dim, blocks), num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
        search_again_kernel[(len(z),)](
            z, codebook, longest, codes, doubtful, len(codebook), int(normalize), dim * _EPS64,
            **_again_constants(dim), num_warps=_AGAIN.warps, num_stages=_AGAIN.stages,
        )  # fmt: skip
    return codes


def _constants(dim: int, blocks: Blocks) -> dict[str, int]:
    return {"WIDTH": dim, "BLOCK_C": padded(dim), "BLOCK_M": blocks.m, "BLOCK_N": blocks.n}


def _again_constants(dim: int) -> dict[str, int]:
    return {"WIDTH": dim, "BLOCK_C": padded(dim), "BLOCK_N": _AGAIN.n}


def variants() -> list[Variant]:
    found = []
    for dtype in FLOATS:
        for dim in CODE_SIZES:
            types: dict[str, torch.dtype | str] = {"z": dtype, "codebook": dtype, "longest": torch.float32}
            types |= {"codes": torch.int64, "doubtful": torch.int32, "size": "i32", "normalize": "i32", "slack": "fp32"}
            again = search_again_kernel
            name = f"nearest_code.again c={dim}"
            found.append(Variant(name, dtype, again, types, _again_constants(dim), _AGAIN, multiplies=False))
            types = {"z": dtype, "codebook": dtype, "half_norms": torch.float32, "longest": torch.float32}
            types |= {"codes": torch.int64, "doubtful": torch.int32}
            types |= {"rows": "i32", "size": "i32", "normalize": "i32", "slack": "fp32"}
            blocks = blocks_for(dtype, dim)
            found.append(
                Variant(f"nearest_code c={dim}", dtype, nearest_code_kernel, types, _constants(dim, blocks), blocks)
            )
    return found
