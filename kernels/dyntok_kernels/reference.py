"""Naive references: what every faster path is compared with.

Written for reading, on dense padded tensors, never dispatched to. Same arguments and results as the operations of the same
name in `ops.py`, except that ragged batches come as a mask.
"""

import torch
from torch import Tensor


def masked_attention(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, eps: float = 0.0) -> Tensor:
    """Attention in which key j counts `weight[j]` times.

    o_i = sum_j p_ij v_j,  p_ij = (w_ij exp(l_ij - m_i) + eps / N) / (sum_j w_ij exp(l_ij - m_i) + eps),  l = q k^T / sqrt(d)

    With eps = 0 this is the masked softmax; with eps = 1e-6 and m the maximum over all N keys it is the formula of LaVIT's
    released code (lets every value in with a weight of about eps / N). A row without any key gets the average over all N values.

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
    """Index of the row of `codebook` with the smallest squared distance to each row of z; the lowest index on ties.

    z: [T, C]; codebook: [K, C]. Returns LongTensor [T].
    """
    return (z[:, None] - codebook[None]).square().sum(-1).argmin(-1)
