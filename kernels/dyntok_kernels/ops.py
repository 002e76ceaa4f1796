"""The operations that merging and code search use, as `torch.library` operations of the namespace `dyntok`.

Ragged batches are packed: the rows of all images one after another, with their boundaries in `cu_seqlens` (int32
[B+1]), as in FlashAttention. PyTorch chooses the implementation: the Triton kernels of `gpu/` for CUDA and ROCm,
`cpu.py` elsewhere. The shapes of results never depend on values, so every operation can be compiled and exported. Only
`total_of` reads a number back to the host. `reference.py` has a readable version of each operation.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op

from dyntok_kernels import cpu


def _on_gpu(operation: CustomOpDef) -> Callable[[Callable], Callable]:
    """Registers the launcher of an operation for CUDA and ROCm.

    Triton launches on the current device, which need not be that of the tensors.
    """

    def register(launch: Callable) -> Callable:
        @wraps(launch)
        def launch_on_device(*args):
            with torch.cuda.device(next(x.device for x in args if isinstance(x, Tensor))):
                return launch(*args)

        return operation.register_kernel("cuda")(launch_on_device)

    return register


def total_of(cu_seqlens: Tensor) -> int:
    """Returns the number of packed rows of `cu_seqlens` [B+1]. Only here does the host wait for the device."""
    return int(cu_seqlens[-1])


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *, causal: bool = False) -> Tensor:
    """Returns softmax attention within each image of a ragged batch, [Tq, H, d]. A row without keys gives zeros.

    q: [Tq, H, d]; k, v: [Tk, H, d]; cu_q, cu_k: int32 [B+1].
    causal: row i sees keys 0 to i; cu_q then equals cu_k.

    On a GPU the dtype is bf16, fp16 or float32, and d a multiple of 8 up to 128. Gradients flow to q, k and v. Raises
    `ValueError` on shapes that do not fit.
    """
    if q.ndim != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:] or cu_q.shape != cu_k.shape:
        shapes = ", ".join(
            f"{name} {list(x.shape)}" for name, x in {"q": q, "k": k, "v": v, "cu_q": cu_q, "cu_k": cu_k}.items()
        )
        raise ValueError(f"attention got {shapes}; expected q [Tq, H, d], k and v [Tk, H, d], cu_q and cu_k [B+1]")
    return torch.ops.dyntok.varlen_attention(q, k, v, cu_q, cu_k, causal)[0]


@custom_op("dyntok::varlen_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Returns the output and, on a GPU, what the backward needs of each row's softmax: [H, Tq], else empty."""
    return cpu.varlen_attention(q, k, v, cu_q, cu_k, causal), q.new_empty(0, dtype=torch.float32)


@_on_gpu(_attention)
def _(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    from dyntok_kernels.gpu.attention import varlen_attention

    return varlen_attention(q, k, v, cu_q, cu_k, causal)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    rows = (q.shape[1], q.shape[0]) if q.device.type == "cuda" else (0,)
    return q.new_empty(q.shape), q.new_empty(rows, dtype=torch.float32)


@custom_op("dyntok::varlen_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return cpu.varlen_attention_backward(grad, q, k, v, cu_q, cu_k, causal)


@_on_gpu(_attention_backward)
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from dyntok_kernels.gpu.attention import varlen_attention_backward

    return varlen_attention_backward(grad, q, k, v, out, lse, cu_q, cu_k, causal)


@_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_attention(ctx, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors, *output)


def _attention_gradient(ctx, grad: Tensor, _: Tensor | None) -> tuple:
    q, k, v, cu_q, cu_k, out, lse = ctx.saved_tensors
    return (
        *torch.ops.dyntok.varlen_attention_backward(grad, q, k, v, out, lse, cu_q, cu_k, ctx.causal),
        None,
        None,
        None,
    )


_attention.register_autograd(_attention_gradient, setup_context=_keep_attention)


@custom_op("dyntok::nearest_code", mutates_args=())
def _nearest_code(z: Tensor, codebook: Tensor, normalize: bool) -> Tensor:
    return cpu.nearest_code(z, codebook, normalize)


@_on_gpu(_nearest_code)
def _(z: Tensor, codebook: Tensor, normalize: bool) -> Tensor:
    from dyntok_kernels.gpu.nearest_code import nearest_code

    return nearest_code(z, codebook, normalize)


@_nearest_code.register_fake
def _(z: Tensor, codebook: Tensor, normalize: bool) -> Tensor:
    return z.new_empty(z.shape[:1], dtype=torch.long)


def nearest_code(z: Tensor, codebook: Tensor, *, normalize: bool = True) -> Tensor:
    """Returns the index of the codebook row nearest to each row of z, int64 [T]; the lowest index on ties.

    The distance is the squared distance to the rows as stored. A T x K matrix never exists.

    z: [T, C]; codebook: [K, C] of the same dtype, K of at least 1.
    normalize: l2-normalize z first. With a codebook of unit rows the nearest row is then the most similar one.

    Raises `ValueError` on shapes that do not fit.
    """
    if (
        z.ndim != 2
        or codebook.ndim != 2
        or z.shape[1] != codebook.shape[1]
        or len(codebook) == 0
        or z.dtype != codebook.dtype
    ):
        found = f"z {z.dtype} {list(z.shape)} and a codebook {codebook.dtype} {list(codebook.shape)}"
        raise ValueError(f"code search got {found}; expected [T, C] and [K, C] of one dtype")
    return torch.ops.dyntok.nearest_code(z, codebook, normalize)


@custom_op("dyntok::compact", mutates_args=())
def _compact(keep: Tensor) -> tuple[Tensor, Tensor]:
    return cpu.compact(keep)


@_on_gpu(_compact)
def _(keep: Tensor) -> tuple[Tensor, Tensor]:
    from dyntok_kernels.gpu.rows import compact

    return compact(keep)


@_compact.register_fake
def _(keep: Tensor) -> tuple[Tensor, Tensor]:
    return keep.new_empty(keep.numel(), dtype=torch.int32), keep.new_empty(len(keep) + 1, dtype=torch.int32)


def compact(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the places of the kept patches of a bool mask [B, N], as indices and boundaries.

    indices: int32 [B*N] into the flattened grid, in order, and -1 after the last one.
    cu_seqlens: int32 [B+1]. `total_of(cu_seqlens)` is the number of kept patches.
    """
    if keep.ndim != 2 or keep.dtype != torch.bool:
        raise ValueError(f"compaction got {keep.dtype} {list(keep.shape)}, expected a bool mask [B, N]")
    return torch.ops.dyntok.compact(keep)


@custom_op("dyntok::gather_rows", mutates_args=())
def _gather_rows(x: Tensor, index: Tensor, embed: Tensor | None) -> Tensor:
    return cpu.gather_rows(x, index, embed)


@_on_gpu(_gather_rows)
def _(x: Tensor, index: Tensor, embed: Tensor | None) -> Tensor:
    from dyntok_kernels.gpu.rows import gather_rows

    return gather_rows(x, index, embed)


@_gather_rows.register_fake
def _(x: Tensor, index: Tensor, embed: Tensor | None) -> Tensor:
    return x.new_empty(index.shape[0], x.shape[1])


@custom_op("dyntok::scatter_rows", mutates_args=())
def _scatter_rows(rows: Tensor, index: Tensor, base: Tensor | None, total: int) -> Tensor:
    return cpu.scatter_rows(rows, index, base, total)


@_on_gpu(_scatter_rows)
def _(rows: Tensor, index: Tensor, base: Tensor | None, total: int) -> Tensor:
    from dyntok_kernels.gpu.rows import scatter_rows

    return scatter_rows(rows, index, base, total)


@_scatter_rows.register_fake
def _(rows: Tensor, index: Tensor, base: Tensor | None, total: int) -> Tensor:
    return rows.new_empty(total, rows.shape[1])


def _keep_gather(ctx, inputs: tuple, output: Tensor) -> None:
    x, index, embed = inputs
    ctx.total, ctx.embed = len(x), None if embed is None else (len(embed), embed.dtype)
    ctx.save_for_backward(index)


def _gather_gradient(ctx, grad: Tensor) -> tuple:
    (index,) = ctx.saved_tensors
    on_grid = torch.ops.dyntok.scatter_rows(grad, index, None, ctx.total)
    return on_grid, None, None if ctx.embed is None else _over_images(on_grid, *ctx.embed)


def _keep_scatter(ctx, inputs: tuple, output: Tensor) -> None:
    _, index, base, _ = inputs
    ctx.base = None if base is None else (len(base), base.dtype)
    ctx.save_for_backward(index)


def _scatter_gradient(ctx, grad: Tensor) -> tuple:
    (index,) = ctx.saved_tensors
    rows = torch.ops.dyntok.gather_rows(grad, index, None)
    return rows, None, None if ctx.base is None else _over_images(grad, *ctx.base), None


def _over_images(grad: Tensor, patches: int, dtype: torch.dtype) -> Tensor:
    return grad.unflatten(0, (-1, patches)).sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(dtype)


_gather_rows.register_autograd(_gather_gradient, setup_context=_keep_gather)
_scatter_rows.register_autograd(_scatter_gradient, setup_context=_keep_scatter)


def gather_rows(x: Tensor, index: Tensor, embed: Tensor | None = None) -> Tensor:
    """Returns packed rows of a grid: out[t] = x[index[t]] + embed[index[t] % N]; zeros where the index is -1.

    x: [M, D]; index: int32 or int64 [T], every row at most once; embed: [N, D], such as a position embedding, with M a
    multiple of N. Returns [T, D] in the dtype of x. Gradients flow to x and embed.
    """
    return torch.ops.dyntok.gather_rows(x, index, embed)


def scatter_rows(rows: Tensor, index: Tensor, base: Tensor | None = None, *, total: int) -> Tensor:
    """Returns a grid of packed rows: out[index[t]] = rows[t], plus base[m % N] on every row m.

    rows: [T, D]; index: int32 or int64 [T], every place at most once, -1 for nowhere; base: [N, D], such as a mask
    token with its position embedding, with total a multiple of N. Returns [total, D] in the dtype of the rows.
    Gradients flow to rows and base.
    """
    return torch.ops.dyntok.scatter_rows(rows, index, base, total)


@custom_op("dyntok::codebook_stats", mutates_args=())
def _codebook_stats(z: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    return cpu.codebook_stats(z, codes, size)


@_on_gpu(_codebook_stats)
def _(z: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    from dyntok_kernels.gpu.codebook_stats import codebook_stats

    return codebook_stats(z, codes, size)


@_codebook_stats.register_fake
def _(z: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    return z.new_empty(size, dtype=torch.float32), z.new_empty(size, z.shape[1], dtype=torch.float32)


def codebook_stats(z: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Returns, for each of `size` codes, the number and the sum of its vectors: float32 [K] and [K, C].

    z: [T, C]; codes: int64 [T]. The result is the same every time.
    """
    return torch.ops.dyntok.codebook_stats(z, codes, size)


@custom_op("dyntok::merge_similar", mutates_args=())
def _merge_similar(
    x: Tensor, weights: Tensor, kept: Tensor, cu_kept: Tensor, dropped: Tensor, cu_dropped: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return cpu.merge_similar(x, weights, kept, cu_kept, dropped, cu_dropped)


@_on_gpu(_merge_similar)
def _(
    x: Tensor, weights: Tensor, kept: Tensor, cu_kept: Tensor, dropped: Tensor, cu_dropped: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from dyntok_kernels.gpu.merge_similar import merge_similar

    return merge_similar(x, weights, kept, cu_kept, dropped, cu_dropped)


@_merge_similar.register_fake
def _(
    x: Tensor, weights: Tensor, kept: Tensor, cu_kept: Tensor, dropped: Tensor, cu_dropped: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = kept.shape[0]
    return x.new_empty(rows, x.shape[1]), x.new_empty(rows, dtype=wide), x.new_empty(x.shape[0], dtype=torch.int32)


def _keep_merged(ctx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], *output)
    ctx.set_materialize_grads(False)


def _merged_gradient(ctx, grad: Tensor | None, grad_sizes: Tensor | None, _: None) -> tuple:
    """Returns the gradient of merged = sum(w x) / size. The choice of owners has none."""
    x, weights, merged, sizes, owner = ctx.saved_tensors
    grad = torch.zeros_like(merged) if grad is None else grad
    per_row = (grad / sizes[:, None]).index_select(0, owner)  # [M, D]
    of_weights = (per_row * (x - merged.index_select(0, owner))).sum(-1)
    if grad_sizes is not None:
        of_weights = of_weights + grad_sizes.index_select(0, owner)
    return (per_row * weights[:, None]).to(x.dtype), of_weights.to(weights.dtype), None, None, None, None


_merge_similar.register_autograd(_merged_gradient, setup_context=_keep_merged)


def merge_similar(
    x: Tensor, keep: Tensor, weights: Tensor, *, total: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge every dropped patch into the most similar kept patch of its image (ToMe, arXiv 2210.09461).

    There are no parameters. Similarity is the cosine; the first of equal ones wins. A kept patch becomes the weighted
    mean of the patches it owns.

    x: [B, N, D]; keep: bool [B, N], at least one True per image; weights: float [B, N], positive.
    total: the number of kept patches, if it is known.

    Returns tokens [T, D], sizes [T] (the sums of the weights) and owner int32 [B, N] (the token that each patch went
    into). Gradients flow to x and weights.
    """
    images, patches, width = x.shape
    kept, cu_kept = compact(keep)
    dropped, cu_dropped = compact(~keep)
    total = total_of(cu_kept) if total is None else total
    lists = kept[:total], cu_kept, dropped[: images * patches - total], cu_dropped
    merged, sizes, owner = torch.ops.dyntok.merge_similar(x.reshape(-1, width), weights.reshape(-1), *lists)
    return merged, sizes, owner.view(images, patches)
