"""What the transformer blocks of merger and decoder share."""

from typing import Any

import torch
from torch import nn

from dyntok.errors import ConfigError


def check_heads(part: str, embed_dim: int, num_heads: int) -> None:
    """Raises `ConfigError` unless `num_heads` divides the width."""
    if embed_dim % num_heads:
        raise ConfigError(f"{part}.num_heads is {num_heads}, expected a divisor of its width {embed_dim}")


def feed_forward(embed_dim: int, mlp_ratio: float) -> nn.Sequential:
    """Returns the block's MLP with int(mlp_ratio * embed_dim) hidden channels."""
    hidden = int(mlp_ratio * embed_dim)
    return nn.Sequential(nn.Linear(embed_dim, hidden), nn.GELU(), nn.Linear(hidden, embed_dim))


def scale_branches(scale: float, *layers: Any) -> None:
    """Scales the last layer (linear or convolution.

    None is skipped) of each residual branch, so that a deep stack starts near the identity.
    """
    with torch.no_grad():
        for layer in layers:
            if layer is not None:
                layer.weight.mul_(scale)
                layer.bias.zero_()
