"""The operations of `ops.py` in plain PyTorch, for CPUs and for devices without kernels of their own.

Arguments and results are those of the operations. `reference.py` has a readable version of each.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS, _CODES, _GROUP = 1024, 2048, 32  # blocks of scores [2048, 1024]; codes are singled out by groups of 32


def lengths_of(cu_seqlens: Tensor) -> list[int]:
    """Returns the lengths of the B images of `cu_seqlens` [B+1], on the host."""
    return cu_seqlens.diff().tolist()


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool) -> Tensor:
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for (oi, qi), (ki, vi) in _images((out, q), (k, v), cu_q, cu_k):
        oi.copy_(F.scaled_dot_product_attention(qi, ki, vi, is_causal=causal))
    return out


def varlen_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    for (gq, gi, qi), (gk, gv, ki, vi) in _images((grads[0], grad, q), (grads[1], grads[2], k, v), cu_q, cu_k):
        scale = qi.shape[-1] ** -0.5
        scores = (qi @ ki.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
        if causal:
            scores = scores.masked_fill_(scores.new_ones(scores.shape[-2:], dtype=torch.bool).triu_(1), -torch.inf)
        weights = scores.softmax(-1)
        change = (gi @ vi.mT).to(weights.dtype)
        change = (weights * (change - (weights * change).sum(-1, keepdim=True))).to(q.dtype) * scale
        gq.copy_(change @ ki)
        gk.copy_(change.mT @ qi)
        gv.copy_(weights.to(q.dtype).mT @ gi)
    return tuple(grads)


def _images(
    of_queries: tuple[Tensor, ...], of_keys: tuple[Tensor, ...], cu_q: Tensor, cu_k: Tensor
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield views [b, H, T, d] of packed rows, one image at a time, or all images at once if their lengths are equal.

    Images without keys are skipped.
    """
    lengths_q, lengths_k = lengths_of(cu_q), lengths_of(cu_k)
    if len(set(lengths_q)) == len(set(lengths_k)) == 1 and lengths_q[0] and lengths_k[0]:
        yield tuple(
            [x.unflatten(0, (len(lengths_q), -1)).transpose(1, 2) for x in side] for side in (of_queries, of_keys)
        )
        return
    pairs = zip(*(x.split(lengths_q) for x in of_queries), *(x.split(lengths_k) for x in of_keys), strict=True)
    for parts in pairs:
        views = [x[None].transpose(1, 2) for x in parts]  # [1, H, T, d]
        queries, keys = views[: len(of_queries)], views[len(of_queries) :]
        if queries[0].numel() and keys[0].numel():
            yield queries, keys


def nearest_code(z: Tensor, codebook: Tensor, normalize: bool) -> Tensor:
    """Search in blocks, so that T x K scores never exist at once.

    Each block keeps only the best score of each group of 32 codes, and the codes of the best group are compared again.
    Where rounding can't tell the two nearest codes apart (with equal rows of the codebook above all), the search is
    repeated in float64.
    """
    z = F.normalize(z, dim=-1) if normalize else z
    codes = torch.empty(len(z), dtype=torch.long, device=z.device)
    doubtful = torch.empty(len(z), dtype=torch.bool, device=z.device)
    squares = codebook.square().sum(1)
    slack = 2 * _rounding(z, squares)
    rows, groups = F.pad(z, (0, 1), value=1.0), _grouped(codebook, squares)  # [T, C+1], [G, 32, C+1]
    block = _CODES // _GROUP
    scores = z.new_empty(min(_CODES, groups.shape[0] * _GROUP), min(_ROWS, len(z)))
    for start in range(0, len(z), _ROWS):
        part = rows[start : start + _ROWS]
        tops = z.new_empty(len(groups), len(part))
        for first in range(0, len(groups), block):
            members = groups[first : first + block]
            score = torch.mm(members.flatten(0, 1), part.T, out=scores[: len(members) * _GROUP, : len(part)])
            torch.amax(score.unflatten(0, (-1, _GROUP)), 1, out=tops[first : first + block])
        group = tops.argmax(0)
        rival = tops.scatter_(0, group[None], -torch.inf).amax(0)
        score = torch.bmm(groups.index_select(0, group), part[:, :, None])[..., 0]  # [rows, 32]
        best, place = score.max(1)
        rival = torch.maximum(rival, score.scatter_(1, place[:, None], -torch.inf).amax(1))
        codes[start : start + _ROWS] = group * _GROUP + place
        doubtful[start : start + _ROWS] = best - rival <= slack[start : start + _ROWS]
    if doubtful.any():
        found = _lowest_nearest(z[doubtful].cpu().double(), codebook.cpu().double())  # MPS has no float64
        codes[doubtful] = found.to(z.device)
    return codes


def _grouped(codebook: Tensor, squares: Tensor) -> Tensor:
    """Returns rows whose products with augmented vectors are scores: a higher score is a nearer row.

    |z - c|^2 = |z|^2 - 2 (z.c - |c|^2 / 2), and |z|^2 is the same for every row. Rows that fill the last group are
    never near.
    """
    size, dim = codebook.shape
    rows = codebook.new_zeros(-(-size // _GROUP) * _GROUP, dim + 1)
    rows[:size, :dim] = codebook
    rows[:size, dim] = squares / -2
    rows[size:, dim] = -torch.inf
    return rows.unflatten(0, (-1, _GROUP))


def _rounding(z: Tensor, squares: Tensor) -> Tensor:
    """Returns a bound on the error of each row's scores, [T], from the squared norms of the codebook's rows.

    Matrix products round differently at different shapes, even for equal rows.
    """
    longest = squares.max().sqrt()
    return torch.finfo(z.dtype).eps * z.shape[1] * longest * (z.square().sum(-1).sqrt() + longest)


def _lowest_nearest(z: Tensor, codebook: Tensor) -> Tensor:
    squares = codebook.square().sum(-1)
    half_norms, slack = squares / 2, _rounding(z, squares)
    best = z.new_full((len(z),), -torch.inf)
    codes = torch.zeros(len(z), dtype=torch.long, device=z.device)
    for start in range(0, len(codebook), _CODES):
        rows = slice(start, start + _CODES)
        score = torch.addmm(-half_norms[rows], z, codebook[rows].T)
        top = score.amax(-1)
        index = (score >= (top - slack)[:, None]).int().argmax(-1)  # the first of them
        better = top > best + slack
        codes = torch.where(better, index + start, codes)
        best = torch.where(better, top, best)
    return codes


def compact(keep: Tensor) -> tuple[Tensor, Tensor]:
    cu_seqlens = F.pad(keep.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    indices = torch.full((keep.numel(),), -1, dtype=torch.int32, device=keep.device)
    found = keep.flatten().nonzero()[:, 0]
    indices[: len(found)] = found.to(torch.int32)
    return indices, cu_seqlens


def gather_rows(x: Tensor, index: Tensor, embed: Tensor | None) -> Tensor:
    absent = index < 0
    some = bool(absent.any())
    source = index.clamp(min=0) if some else index
    out = x.index_select(0, source) if len(x) else x.new_zeros(len(index), x.shape[1])
    if embed is not None:
        out += embed.to(x.dtype).index_select(0, source % len(embed))
    return out.masked_fill_(absent[:, None], 0) if some else out


def scatter_rows(rows: Tensor, index: Tensor, base: Tensor | None, total: int) -> Tensor:
    out = rows.new_zeros(total, rows.shape[1]) if base is None else base.to(rows.dtype).repeat(total // len(base), 1)
    placed = index >= 0
    if not placed.all():
        rows, index = rows[placed], index[placed]
    index = index.long()
    out[index] = rows if base is None else rows + out.index_select(0, index)
    return out


def codebook_stats(z: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    counts = torch.bincount(codes, minlength=size).float()
    return counts, torch.zeros(size, z.shape[1], dtype=torch.float32, device=z.device).index_add_(0, codes, z.float())


def merge_similar(
    x: Tensor, weights: Tensor, kept: Tensor, cu_kept: Tensor, dropped: Tensor, cu_dropped: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    owner = torch.empty(len(x), dtype=torch.int32, device=x.device)
    owner[kept.long()] = torch.arange(len(kept), dtype=torch.int32, device=x.device)
    unit = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
    begin = cu_kept.tolist()
    pairs = zip(kept.split(lengths_of(cu_kept)), dropped.split(lengths_of(cu_dropped)), begin, strict=False)
    for own, others, first in pairs:
        targets = unit.index_select(0, own)
        for part in others.split(_ROWS):
            owner[part.long()] = (unit.index_select(0, part) @ targets.T).argmax(-1).to(torch.int32) + first
    weights = weights.to(torch.promote_types(x.dtype, torch.float32))
    sizes = torch.zeros(len(kept), dtype=weights.dtype, device=x.device).index_add_(0, owner, weights)
    sums = torch.zeros(len(kept), x.shape[1], dtype=weights.dtype, device=x.device).index_add_(
        0, owner, weights[:, None] * x
    )
    return (sums / sizes[:, None]).to(x.dtype), sizes, owner
