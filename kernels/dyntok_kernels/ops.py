"""The operations behind merging and code search, as fast as PyTorch allows, on any device.

Ragged batches are packed: rows of all images one after another, `cu_seqlens` [B+1] (int32) says where each begins, as in
FlashAttention. The readable twin of each operation is in `reference.py`.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_CODE_BLOCK = 2048  # rows of the codebook compared at once: [T, 2048] stays in cache for the T of one image


def lengths_of(cu_seqlens: Tensor) -> list[int]:
    """[B+1] -> B lengths, on the host."""
    return cu_seqlens.diff().tolist()


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *, causal: bool = False) -> Tensor:
    """Softmax attention inside each image of a ragged batch. A row without any key gives zeros.

    q: [Tq, H, d]; k, v: [Tk, H, d]; cu_q, cu_k: int32 [B+1]; causal: row i sees keys 0..i (then cu_q equals cu_k).
    Returns [Tq, H, d].
    """
    lengths_q, lengths_k = lengths_of(cu_q), lengths_of(cu_k)
    if len(set(lengths_q)) == len(set(lengths_k)) == 1 and lengths_k[0] > 0:  # equal lengths: one batched call
        batched = (x.unflatten(0, (len(lengths_q), -1)).transpose(1, 2) for x in (q, k, v))  # [B, H, T, d]
        return F.scaled_dot_product_attention(*batched, is_causal=causal).transpose(1, 2).flatten(0, 1)
    outputs = [q[:0]]  # also where there is no image at all
    for qi, ki, vi in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True):
        if len(ki) == 0:
            outputs.append(torch.zeros_like(qi))
            continue
        qi, ki, vi = (x.transpose(0, 1)[None] for x in (qi, ki, vi))  # [1, H, T, d]
        outputs.append(F.scaled_dot_product_attention(qi, ki, vi, is_causal=causal)[0].transpose(0, 1))
    return torch.cat(outputs)


def weighted_attention(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, *, eps: float = 0.0) -> Tensor:
    """Dense attention in which key j counts `weight[j]` times, differentiable in the weights even where they are 0.

    The formula is that of `reference.masked_attention`. Without eps the logits of keys of weight 0 are cut at 20 above the largest
    allowed one, so that they can't overflow.

    q: [B, H, Nq, d]; k, v: [B, H, N, d]; weight: [B, Nq or 1, N] in 0..1. Returns [B, H, Nq, d].
    """
    weight = weight[:, None]
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, H, Nq, N]
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    allowed = weight.detach() > 0
    if eps == 0:
        top = logits.detach().masked_fill(~allowed, -torch.inf).amax(-1, keepdim=True)
        mass = (logits - top.masked_fill(top == -torch.inf, 0.0)).clamp(max=20.0).exp() * weight
        total = mass.sum(-1, keepdim=True)
        empty = ~allowed.any(-1, keepdim=True)
        mass, total = mass.masked_fill(empty, 1.0), total.masked_fill(empty, float(k.shape[-2]))
        return (mass / total).to(v.dtype) @ v
    mass = (logits - logits.detach().amax(-1, keepdim=True)).exp() * weight
    return ((mass + eps / k.shape[-2]) / (mass.sum(-1, keepdim=True) + eps)).to(v.dtype) @ v


def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codebook row nearest to each row of z (squared distance, rows as stored); the lowest index on ties.

    Searches the codebook in blocks: T x K similarities never exist at once. The few rows of z whose two nearest codes are closer to each
    other than rounding can tell (equal codebook rows above all) are searched again in float64.

    z: [T, C]; codebook: [K, C], same dtype. Returns LongTensor [T].
    """
    best = runner_up = z.new_full((len(z),), -torch.inf)
    codes = torch.zeros(len(z), dtype=torch.long, device=z.device)
    for start, score in _score_blocks(z, codebook):
        top, index = score.max(-1)
        second = score.scatter_(1, index[:, None], -torch.inf).amax(-1)
        runner_up = torch.maximum(torch.maximum(runner_up, second), torch.minimum(best, top))
        codes = torch.where(top > best, index + start, codes)
        best = torch.maximum(best, top)
    doubtful = best - runner_up <= _rounding(z, codebook)
    if doubtful.any():
        codes[doubtful] = _lowest_nearest(z[doubtful].double(), codebook.double())
    return codes


def _score_blocks(z: Tensor, codebook: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(index of the first row, scores [T, at most _CODE_BLOCK]): higher where a row is nearer."""
    # |z - c|^2 = |z|^2 - 2 (z.c - |c|^2 / 2), and |z|^2 is the same for every row
    half_norms = codebook.square().sum(-1) / 2  # [K]
    for start in range(0, len(codebook), _CODE_BLOCK):
        rows = slice(start, start + _CODE_BLOCK)
        yield start, torch.addmm(-half_norms[rows], z, codebook[rows].T)


def _rounding(z: Tensor, codebook: Tensor) -> Tensor:
    """Bound on how far a score may be off, [T]. Matrix products round differently at different shapes, even for equal rows."""
    longest = codebook.square().sum(-1).max().sqrt()
    return torch.finfo(z.dtype).eps * z.shape[1] * longest * (z.square().sum(-1).sqrt() + longest)


def _lowest_nearest(z: Tensor, codebook: Tensor) -> Tensor:
    slack = _rounding(z, codebook)
    best = z.new_full((len(z),), -torch.inf)
    codes = torch.zeros(len(z), dtype=torch.long, device=z.device)
    for start, score in _score_blocks(z, codebook):
        top = score.amax(-1)
        index = (score >= (top - slack)[:, None]).int().argmax(-1)  # the first of them
        better = top > best + slack
        codes = torch.where(better, index + start, codes)
        best = torch.where(better, top, best)
    return codes
