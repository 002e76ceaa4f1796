"""Ragged attention, forward and backward, that never stores a row of scores (FlashAttention-2, arXiv 2307.08691).

One program computes a block of rows of one head of one image. The backward uses no atomic addition, so its results are
the same every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dyntok_kernels.gpu.tiles import FLOATS, Blocks, Variant, cast, check, dot, find_block, kernel, padded, slots
from dyntok_kernels.limits import HEAD_DIMS, HEAD_DIMS_IN_WORDS

HEAD_SIZES = (16, 32, 64, 88, 128)  # those the compile gate looks at; any multiple of 8 up to 128 works


# Blocks that spill no register on any target of the compile gate; float32 has no matrix instruction and small blocks.
def forward_blocks(dtype: torch.dtype, head_dim: int) -> Blocks:
    if dtype == torch.float32:
        return Blocks(16, 32, warps=8) if head_dim > 64 else Blocks(16, 32, warps=4)
    return Blocks(64, 64, warps=4, stages=2)


def query_blocks(dtype: torch.dtype, head_dim: int) -> Blocks:
    if dtype == torch.float32:
        return Blocks(32, 16, warps=8) if head_dim > 64 else Blocks(32, 16, warps=4)
    return Blocks(32, 64, warps=4) if head_dim > 64 else Blocks(64, 64, warps=4)


def key_blocks(dtype: torch.dtype, head_dim: int) -> Blocks:
    if dtype == torch.float32:
        return Blocks(16, 16, warps=8) if head_dim > 64 else Blocks(32, 32, warps=4)
    return Blocks(64, 32, warps=4) if head_dim > 64 else Blocks(64, 64, warps=4)


@triton.jit
def _rows(base, first, end, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns a block of rows [BLOCK, BLOCK_D] of one head, with zeros past the ends of the image and the head.

    stride: from one row to the next, in units of 8 elements.
    """
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    inside = (first + rows < end)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(
        base + first * (stride.to(tl.int64) * 8) + (rows * (stride * 8))[:, None] + columns[None, :],
        mask=inside,
        other=0.0,
    )


@triton.jit
def _put(base, first, end, stride, values, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    inside = (first + rows < end)[:, None] & (columns < WIDTH)[None, :]
    where = base + first * (stride.to(tl.int64) * 8) + (rows * (stride * 8))[:, None] + columns[None, :]
    tl.store(where, cast(values, base.dtype.element_ty), mask=inside)


@triton.jit
def _visible(queries, keys, start_q, start_k, end_k, causal):
    """Returns which keys [., n] the queries [m, .] see."""
    return (keys < end_k) & ((causal == 0) | (keys - start_k <= queries - start_q))


@kernel("images", "causal", "total_q", "q_row", "k_row", "v_row", "out_row")
def forward_kernel(
    q, k, v, out, lse, cu_q, cu_k, images, causal, scale, total_q,
    q_row, k_row, v_row, out_row,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write attention and the logarithm of each row's sum.

    scale: of the logits, times log2(e), because exp2 is used.
    lse: base 2, of the scaled logits; -inf for a row without keys.
    """
    head = tl.program_id(1)
    image, first, start_q, end_q = find_block(cu_q, images, tl.program_id(0), BLOCK_M)
    if first >= end_q:
        return
    start_k = tl.load(cu_k + image)
    end_k = tl.load(cu_k + image + 1)
    rows = first + tl.arange(0, BLOCK_M)
    queries = _rows(q + head * WIDTH, first, end_q, q_row, WIDTH, BLOCK_M, BLOCK_D)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last = tl.where(causal != 0, tl.minimum(end_k, start_k + first - start_q + BLOCK_M), end_k)
    for block in range(start_k, last, BLOCK_N):
        columns = block + tl.arange(0, BLOCK_N)
        keys = _rows(k + head * WIDTH, block, end_k, k_row, WIDTH, BLOCK_N, BLOCK_D)
        values = _rows(v + head * WIDTH, block, end_k, v_row, WIDTH, BLOCK_N, BLOCK_D)
        scores = dot(queries, tl.trans(keys)) * scale
        scores = tl.where(
            _visible(rows[:, None], columns[None, :], start_q, start_k, end_k, causal), scores, float("-inf")
        )
        higher = tl.maximum(top, tl.max(scores, 1))  # finite: every row sees the first key
        shrink = tl.exp2(top - higher)
        mass = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(mass, 1)
        sums = sums * shrink[:, None] + dot(cast(mass, values.dtype), values)
        top = higher
    found = tl.where(total > 0, total, 1.0)
    _put(out + head * WIDTH, first, end_q, out_row, sums / found[:, None], WIDTH, BLOCK_M, BLOCK_D)
    tl.store(lse + head * total_q + rows, top + tl.log2(found), mask=rows < end_q)


@kernel("images", "causal", "total_q", "q_row", "k_row", "v_row", "grad_row", "out_row")
def query_gradient_kernel(
    q, k, v, grad, lse, delta, grad_q, cu_q, cu_k, images, causal, scale, total_q,
    q_row, k_row, v_row, grad_row, out_row,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the queries.

    delta: [H, Tq], the sums of out * grad over each row."""
    head = tl.program_id(1)
    image, first, start_q, end_q = find_block(cu_q, images, tl.program_id(0), BLOCK_M)
    if first >= end_q:
        return
    start_k = tl.load(cu_k + image)
    end_k = tl.load(cu_k + image + 1)
    rows = first + tl.arange(0, BLOCK_M)
    queries = _rows(q + head * WIDTH, first, end_q, q_row, WIDTH, BLOCK_M, BLOCK_D)
    towards = _rows(grad + head * WIDTH, first, end_q, grad_row, WIDTH, BLOCK_M, BLOCK_D)
    norm = tl.load(lse + head * total_q + rows, mask=rows < end_q, other=0.0)
    mean = tl.load(delta + head * total_q + rows, mask=rows < end_q, other=0.0)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last = tl.where(causal != 0, tl.minimum(end_k, start_k + first - start_q + BLOCK_M), end_k)
    for block in range(start_k, last, BLOCK_N):
        columns = block + tl.arange(0, BLOCK_N)
        keys = _rows(k + head * WIDTH, block, end_k, k_row, WIDTH, BLOCK_N, BLOCK_D)
        values = _rows(v + head * WIDTH, block, end_k, v_row, WIDTH, BLOCK_N, BLOCK_D)
        scores = dot(queries, tl.trans(keys)) * scale - norm[:, None]
        scores = tl.where(
            _visible(rows[:, None], columns[None, :], start_q, start_k, end_k, causal), scores, float("-inf")
        )
        change = dot(towards, tl.trans(values)) - mean[:, None]
        sums += dot(cast(tl.exp2(scores) * change, keys.dtype), keys)
    _put(grad_q + head * WIDTH, first, end_q, out_row, sums * (scale * 0.6931471805599453), WIDTH, BLOCK_M, BLOCK_D)


@kernel("images", "causal", "total_q", "q_row", "k_row", "v_row", "grad_row", "out_row")
def key_gradient_kernel(
    q, k, v, grad, lse, delta, grad_k, grad_v, cu_q, cu_k, images, causal, scale, total_q,
    q_row, k_row, v_row, grad_row, out_row,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values: a block of BLOCK_N keys visits all queries of its image."""
    head = tl.program_id(1)
    image, first, start_k, end_k = find_block(cu_k, images, tl.program_id(0), BLOCK_N)
    if first >= end_k:
        return
    start_q = tl.load(cu_q + image)
    end_q = tl.load(cu_q + image + 1)
    columns = first + tl.arange(0, BLOCK_N)
    keys = _rows(k + head * WIDTH, first, end_k, k_row, WIDTH, BLOCK_N, BLOCK_D)
    values = _rows(v + head * WIDTH, first, end_k, v_row, WIDTH, BLOCK_N, BLOCK_D)
    key_sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin = tl.where(causal != 0, start_q + (first - start_k) // BLOCK_M * BLOCK_M, start_q)
    for block in range(begin, end_q, BLOCK_M):
        rows = block + tl.arange(0, BLOCK_M)
        queries = _rows(q + head * WIDTH, block, end_q, q_row, WIDTH, BLOCK_M, BLOCK_D)
        towards = _rows(grad + head * WIDTH, block, end_q, grad_row, WIDTH, BLOCK_M, BLOCK_D)
        norm = tl.load(lse + head * total_q + rows, mask=rows < end_q, other=0.0)
        mean = tl.load(delta + head * total_q + rows, mask=rows < end_q, other=0.0)
        scores = dot(keys, tl.trans(queries)) * scale - norm[None, :]  # [n, m]
        seen = _visible(rows[None, :], columns[:, None], start_q, start_k, end_k, causal) & (rows[None, :] < end_q)
        mass = tl.exp2(tl.where(seen, scores, float("-inf")))
        value_sums += dot(cast(mass, towards.dtype), towards)
        change = dot(values, tl.trans(towards)) - mean[None, :]
        key_sums += dot(cast(mass * change, queries.dtype), queries)
    _put(grad_k + head * WIDTH, first, end_k, out_row, key_sums * (scale * 0.6931471805599453), WIDTH, BLOCK_N, BLOCK_D)
    _put(grad_v + head * WIDTH, first, end_k, out_row, value_sums, WIDTH, BLOCK_N, BLOCK_D)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """Launch the forward. Returns out [Tq, H, d] and lse, float32 [H, Tq].

    The arguments are those of `ops.varlen_attention`; their last dimension must be dense.
    """
    q, k, v = (_heads_together(x) for x in (q, k, v))
    cu_q, cu_k = cu_q.contiguous(), cu_k.contiguous()
    check(
        q.dtype in FLOATS and q.dtype == k.dtype == v.dtype,
        f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}, expected one of {FLOATS}",
    )
    total_q, heads, width = q.shape
    check(width in HEAD_DIMS, f"heads have {width} channels, the kernel takes {HEAD_DIMS_IN_WORDS}")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, total_q, dtype=torch.float32, device=q.device)
    images, blocks = len(cu_q) - 1, forward_blocks(q.dtype, width)
    if out.numel() and images:
        forward_kernel[(slots(total_q, images, blocks.m), heads)](
            q, k, v, out, lse, cu_q, cu_k, images, int(causal), _scale(width), total_q, *_strides(q, k, v, out),
            **_constants(width, blocks), num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return out, lse


def varlen_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward. Returns the gradients of q, k and v."""
    grad, q, k, v = (_heads_together(x) for x in (grad, q, k, v))
    cu_q, cu_k = cu_q.contiguous(), cu_k.contiguous()
    total_q, heads, width = q.shape
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = (grad.float() * out.float()).sum(-1).T.contiguous()  # [H, Tq]
    images = len(cu_q) - 1
    shared = cu_q, cu_k, images, int(causal), _scale(width), total_q
    if grad_q.numel() and images:
        blocks = query_blocks(q.dtype, width)
        query_gradient_kernel[(slots(total_q, images, blocks.m), heads)](
            q, k, v, grad, lse, delta, grad_q, *shared, *_strides(q, k, v, grad, grad_q),
            **_constants(width, blocks), num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    if grad_k.numel() and images:
        blocks = key_blocks(q.dtype, width)
        key_gradient_kernel[(slots(len(k), images, blocks.n), heads)](
            q, k, v, grad, lse, delta, grad_k, grad_v, *shared, *_strides(q, k, v, grad, grad_k),
            **_constants(width, blocks), num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return grad_q, grad_k, grad_v


def _heads_together(x: Tensor) -> Tensor:
    """Returns x with the heads of a row adjacent and rows a multiple of 8 apart, as 16-byte loads need."""
    return (
        x if x.stride()[1:] == (x.shape[2], 1) and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 else x.contiguous()
    )


def _scale(width: int) -> float:
    return width**-0.5 * 1.4426950408889634  # log2(e)


def _strides(*tensors: Tensor) -> list[int]:
    return [x.stride(0) // 8 for x in tensors]


def _constants(width: int, blocks: Blocks) -> dict[str, int]:
    return {"WIDTH": width, "BLOCK_D": padded(width), "BLOCK_M": blocks.m, "BLOCK_N": blocks.n}


def variants() -> list[Variant]:
    """Returns what the compile gate compiles."""
    found = []
    for dtype in FLOATS:
        for width in HEAD_SIZES:
            for program, blocks in (
                (forward_kernel, forward_blocks(dtype, width)),
                (query_gradient_kernel, query_blocks(dtype, width)),
                (key_gradient_kernel, key_blocks(dtype, width)),
            ):
                constants = _constants(width, blocks)
                types = {name: _type_of(name, dtype) for name in program.arg_names if name not in constants}
                name = f"attention.{program.fn.__name__.removesuffix('_kernel')}"
                found.append(Variant(f"{name} d={width}", dtype, program, types, constants, blocks))
    return found


def _type_of(name: str, dtype: torch.dtype) -> torch.dtype | str:
    known = {"lse": torch.float32, "delta": torch.float32, "cu_q": torch.int32, "cu_k": torch.int32, "scale": "fp32"}
    pointers = ("q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v")
    return known.get(name, dtype if name in pointers else "i32")
