"""Patch features to what a diffusion U-Net reads in place of a text prompt (LaVIT's pixel decoding).

Not here: the U-Net (`diffusion.py`).
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from dyntok.errors import ConfigError
from dyntok.lavit.config import ConditioningConfig


class Conditioning(nn.Module):
    """Features [B, N, D] -> prompt embeddings [B, N, E] and the pooled embedding [B, P] or None.

    E is the sum of `embed_dims`.

    Raises `ConfigError` where num_heads does not divide the width.
    """

    def __init__(self, in_dim: int, num_patches: int, config: ConditioningConfig) -> None:
        super().__init__()
        self.proj = nn.ModuleList(nn.Linear(in_dim, dim) for dim in config.embed_dims)
        pools = config.pooled_dim is not None
        self.pool = AttentionPool(in_dim, num_patches, config.pooled_dim, config.num_heads) if pools else None

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        embeddings = torch.cat([proj(features) for proj in self.proj], dim=-1)
        return embeddings, None if self.pool is None else self.pool(features)


class AttentionPool(nn.Module):
    """Attention pooling as in CLIP (arXiv 2103.00020), [B, N, D] -> [B, P].

    The mean of all tokens is put in front of them; it attends to the tokens and to itself.
    """

    def __init__(self, embed_dim: int, num_tokens: int, out_dim: int, num_heads: int) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ConfigError(
                f"conditions.num_heads is {num_heads}, expected a divisor of the features' width {embed_dim}"
            )
        self.num_heads = num_heads
        self.pos_embed = nn.Parameter(torch.randn(num_tokens + 1, embed_dim) * embed_dim**-0.5)
        self.query = nn.Linear(embed_dim, embed_dim)
        self.kv = nn.Linear(embed_dim, 2 * embed_dim)
        self.out = nn.Linear(embed_dim, out_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + self.pos_embed  # [B, 1 + N, D]
        q = rearrange(self.query(tokens[:, :1]), "b n (h d) -> b h n d", h=self.num_heads)
        k, v = rearrange(self.kv(tokens), "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        return self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h 1 d -> b (h d)"))
