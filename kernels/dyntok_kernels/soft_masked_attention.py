"""Attention with a weight per key, for training and LaVIT's softmax, in plain PyTorch on any device."""

import torch
from torch import Tensor


def soft_masked_attention(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, *, eps: float = 0.0) -> Tensor:
    """Returns dense attention in which key j counts `weight[j]` times. Weights of 0 have gradients, too.

    `reference.masked_attention` has the formula. Without eps, the logits of keys of weight 0 are limited to 20 above
    the largest allowed one, so that they can't overflow.

    q: [B, H, Nq, d]; k, v: [B, H, N, d]; weight: [B, Nq or 1, N], 0 to 1. Returns [B, H, Nq, d].
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
