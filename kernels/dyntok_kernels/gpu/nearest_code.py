"""Finds the nearest codebook row of every vector. Scores exist only as blocks in registers.

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
_PARTS = 16  # of the codebook: one image alone has enough programs, and their number never depends on the batch
_EPS, _EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


def blocks_for(dtype: torch.dtype, dim: int) -> Blocks:
    if dtype == torch.float32:
        return Blocks(32, 64, warps=4) if dim <= 32 else Blocks(32, 32, warps=4)
    return Blocks(64, 128, warps=4, stages=2)


def decide_blocks(dim: int) -> Blocks:
    return Blocks(1, 16, warps=4) if dim <= 32 else Blocks(1, 8, warps=4)  # a vector, codes at a time


@triton.jit
def _unit(vectors):
    """Returns l2-normalized rows [m, c] in their own dtype."""
    wide = vectors.to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), 1e-12)
    return cast(wide / norm[:, None], vectors.dtype)


@kernel("rows", "size", "span", "normalize")
def nearest_code_kernel(
    z, codebook, half_norms, best_scores, seconds, best_codes, rows, size, span, normalize,
    WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program compares a block of vectors with one part of the codebook, `span` rows.

    half_norms: |c|^2 / 2, float32 [K]. |z - c|^2 is smallest where z.c - |c|^2 / 2 is greatest.
    best_scores, seconds (of the runner-up), best_codes: what each part found, [T, PARTS].
    """
    part = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (columns < WIDTH)[None, :]
    vectors = tl.load(z + (row.to(tl.int64) * WIDTH)[:, None] + columns[None, :], mask=inside, other=0.0)
    if normalize != 0:
        vectors = _unit(vectors)
    second = tl.full([BLOCK_M], float("-inf"), tl.float32)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    found = tl.zeros([BLOCK_M], tl.int32)
    end = tl.minimum(size, (part + 1) * span)
    for start in range(part * span, end, BLOCK_N):
        code = start + tl.arange(0, BLOCK_N)
        known = code < end
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
    place = row.to(tl.int64) * PARTS + part
    tl.store(best_scores + place, best, mask=row < rows)
    tl.store(seconds + place, second, mask=row < rows)
    tl.store(best_codes + place, found, mask=row < rows)


@kernel("size", "normalize")
def decide_kernel(
    z, codebook, longest, best_scores, seconds, best_codes, codes, size, normalize, slack, slack64,
    WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program per vector takes the best of all parts. Where the runner-up is within rounding, it searches again.

    That is in float64, for the lowest of all codes that are equally near. longest: the greatest |c|, float32 [1].
    slack, slack64: the rounding errors of a score in units of |c| (|z| + |c|).
    """
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, PARTS)
    scores = tl.load(best_scores + row * PARTS + parts)
    top, part = tl.max(scores, 0, return_indices=True)  # the lowest part of equal ones
    rival = tl.max(tl.where(parts == part, float("-inf"), scores), 0)
    rival = tl.maximum(rival, tl.max(tl.load(seconds + row * PARTS + parts), 0))
    tl.store(codes + row, tl.load(best_codes + row * PARTS + part).to(tl.int64))
    columns = tl.arange(0, BLOCK_C)
    vector = tl.load(z + row * WIDTH + columns[None, :], mask=(columns < WIDTH)[None, :], other=0.0)  # [1, c]
    if normalize != 0:
        vector = _unit(vector)
    wide = vector.to(tl.float64)
    length = tl.load(longest).to(tl.float64)
    unit = length * (tl.sqrt(tl.sum(wide * wide)) + length)
    if top - rival > slack * unit:
        return
    best = tl.full([], float("-inf"), tl.float64)
    found = tl.full([], 0, tl.int32)
    for start in range(0, size, BLOCK_N):
        code = start + tl.arange(0, BLOCK_N)
        known = code < size
        present = known[:, None] & (columns < WIDTH)[None, :]
        entries = tl.load(codebook + (code * WIDTH)[:, None] + columns[None, :], mask=present, other=0.0).to(tl.float64)
        score = tl.where(known, tl.sum((wide - entries / 2) * entries, 1), float("-inf"))
        nearest = tl.max(score, 0)
        first = tl.min(tl.where(score >= nearest - slack64 * unit, code, size), 0)
        better = nearest > best + slack64 * unit
        found = tl.where(better, first, found)
        best = tl.where(better, nearest, best)
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
    best_scores, seconds = torch.empty(2, len(z), _PARTS, dtype=torch.float32, device=z.device)
    best_codes = torch.empty(len(z), _PARTS, dtype=torch.int32, device=z.device)
    blocks, again, size = blocks_for(z.dtype, dim), decide_blocks(dim), len(codebook)
    span = triton.cdiv(triton.cdiv(size, _PARTS), blocks.n) * blocks.n
    if len(z):
        nearest_code_kernel[(triton.cdiv(len(z), blocks.m), _PARTS)](
            z, codebook, half_norms, best_scores, seconds, best_codes, len(z), size, span, int(normalize),
            **_constants(dim, blocks), num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
        decide_kernel[(len(z),)](
            z, codebook, longest, best_scores, seconds, best_codes, codes, size, int(normalize), 2 * dim * _EPS,
            dim * _EPS64, **_decide_constants(dim), num_warps=again.warps, num_stages=again.stages,
        )  # fmt: skip
    return codes


def _constants(dim: int, blocks: Blocks) -> dict[str, int]:
    return {"WIDTH": dim, "BLOCK_C": padded(dim), "BLOCK_M": blocks.m, "BLOCK_N": blocks.n, "PARTS": _PARTS}


def _decide_constants(dim: int) -> dict[str, int]:
    return {"WIDTH": dim, "BLOCK_C": padded(dim), "BLOCK_N": decide_blocks(dim).n, "PARTS": _PARTS}


def variants() -> list[Variant]:
    found = []
    parts = {"best_scores": torch.float32, "seconds": torch.float32, "best_codes": torch.int32}
    for dtype in FLOATS:
        for dim in CODE_SIZES:
            types: dict[str, torch.dtype | str] = {"z": dtype, "codebook": dtype, "half_norms": torch.float32, **parts}
            types |= dict.fromkeys(("rows", "size", "span", "normalize"), "i32")
            blocks = blocks_for(dtype, dim)
            constants = _constants(dim, blocks)
            found.append(Variant(f"nearest_code c={dim}", dtype, nearest_code_kernel, types, constants, blocks))
            types = {"z": dtype, "codebook": dtype, "longest": torch.float32, **parts, "codes": torch.int64}
            types |= {"size": "i32", "normalize": "i32", "slack": "fp32", "slack64": "fp32"}
            name, constants = f"nearest_code.decide c={dim}", _decide_constants(dim)
            found.append(Variant(name, dtype, decide_kernel, types, constants, decide_blocks(dim), multiplies=False))
    return found
