"""Naive references that every faster path is compared with.

They are written for reading, on dense padded tensors, and never dispatched to. Arguments and results are those of the
operations of the same name in `ops.py`, except that ragged batches come as a mask.
"""

import torch
from torch import Tensor


def masked_attention(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, eps: float = 0.0) -> Tensor:
    """Returns attention in which key j counts `weight[j]` times.

    o_i = sum_j p_ij v_j,  p_ij = (w_ij exp(l_ij - m_i) + eps / N) / (sum_j w_ij exp(l_ij - m_i) + eps),
    l = q k^T / sqrt(d)

    With eps = 0 this is the masked softmax. With eps = 1e-6 and m the maximum over all N keys it is the formula of
    LaVIT's released code, which lets every value in with a weight of about eps / N. A row without keys gets the average
    of all values.

    q: [B, H, Nq, d]; k, v: [B, H, N, d]; weight: [B, Nq, N], 0 or 1, gradients flow into it. Returns [B, H, Nq, d].
    """
    weight = weight[:, None]  # [B, 1, Nq, N]
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # [B, H, Nq, N]
    allowed = weight.detach() > 0
    if eps == 0:
        top = logits.masked_fill(~allowed, -torch.inf).amax(-1, keepdim=True)
        logits = logits - torch.where(top.isfinite(), top, 0.0).detach()
    else:
        logits = logits - logits.detach().amax(-1, keepdim=True)
    mass = logits.exp() * weight
    total = mass.sum(-1, keepdim=True)
    if eps == 0:
        some = allowed.any(-1, keepdim=True)
        # the inner where: 0 / 0 would be left out of the value, but not of the gradient
        probabilities = torch.where(some, mass / torch.where(some, total, 1.0), 1 / k.shape[-2])
    else:
        probabilities = (mass + eps / k.shape[-2]) / (total + eps)
    return probabilities @ v


def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """Returns the index of the row of `codebook` nearest to each row of z (squared distance); the lowest index on ties.

    z: [T, C]; codebook: [K, C]. Returns int64 [T].
    """
    return (z[:, None] - codebook[None]).square().sum(-1).argmin(-1)


def gather_rows(x: Tensor, index: Tensor, embed: Tensor | None) -> Tensor:
    """Returns out[t] = x[index[t]] + embed[index[t] % N]; zeros where index[t] is -1.

    x: [M, D]; index: [T]; embed: [N, D] or None.
    """
    out = x.new_zeros(len(index), x.shape[1])
    for t, source in enumerate(index.tolist()):
        if source >= 0:
            out[t] = x[source] if embed is None else x[source] + embed[source % len(embed)]
    return out


def scatter_rows(rows: Tensor, index: Tensor, base: Tensor | None, total: int) -> Tensor:
    """Returns out[index[t]] = rows[t] + base[index[t] % N], and base alone elsewhere.

    rows: [T, D]; index: [T]; base: [N, D] or None.
    """
    out = rows.new_zeros(total, rows.shape[1])
    for t, target in enumerate(index.tolist()):
        if target >= 0:
            out[target] = rows[t]
    return out if base is None else out + base.repeat(total // len(base), 1)


def codebook_stats(z: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Returns the counts [K] and sums [K, C] of the vectors z [T, C] by their codes [T]."""
    chosen = (codes[:, None] == torch.arange(size, device=z.device)).to(z.dtype)  # [T, K]
    return chosen.sum(0), chosen.T @ z


def merge_similar(x: Tensor, keep: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge each dropped patch into the kept patch of greatest cosine, the first of equal ones.

    Kept patches become weighted means.

    x: [B, N, D]; keep: bool [B, N]; weights: [B, N]. Returns tokens [T, D], sizes [T], owner int32 [B, N].
    """
    unit = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    cosine = (unit @ unit.transpose(1, 2)).masked_fill(~keep[:, None], -torch.inf)  # [B, N, N]
    nearest = torch.where(
        keep, torch.arange(keep.shape[1], device=x.device), cosine.argmax(-1)
    )  # [B, N], a patch of the same image
    token = keep.flatten().cumsum(0).view_as(keep) - 1  # of each kept patch
    owner = token.gather(1, nearest)
    member = (
        owner.flatten()[None] == torch.arange(len(keep.nonzero()), device=x.device)[:, None]
    ) * weights.flatten()  # [T, B * N]
    sizes = member.sum(1)
    return member @ x.flatten(0, 1) / sizes[:, None], sizes, owner.to(torch.int32)
