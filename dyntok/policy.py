"""`KeepPolicy`: how many patches an image keeps, and the rule that turns scores into a keep mask."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dyntok.errors import ConfigError
from dyntok.model.selector import DROP, KEEP


@dataclass(frozen=True)
class KeepPolicy:
    """How scores become a keep mask. At most one of `budget`, `threshold` and `sample`; none means the learned choice.

    budget: exactly so many tokens (int), or that share of N (float in (0, 1], rounded, at least 1), the best by score.
    threshold: every patch whose keep probability is at least this (0 to 1).
    sample: the paper's stochastic choice. Image number i of a call draws from the generator's initial seed and i, so the draw is the
        same in any batch and again in the next call.
    max_tokens: trims any of them by score.
    """

    budget: int | float | None = None
    threshold: float | None = None
    sample: torch.Generator | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("budget", "threshold", "max_tokens"):
            value = getattr(self, name)
            if isinstance(value, np.integer | np.floating):
                object.__setattr__(self, name, value.item())
        given = [name for name in ("budget", "threshold", "sample") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(
                f"{' and '.join(given)} were both given, expected at most one of budget, threshold, sample"
            )
        if isinstance(self.budget, bool) or not isinstance(self.budget, int | float | None):
            raise ConfigError(
                f"budget is {self.budget!r}, expected a number of tokens (int) or a share of the patches (float)"
            )
        if isinstance(self.budget, float) and not 0 < self.budget <= 1:
            raise ConfigError(
                f"budget is {self.budget}, expected a share in (0, 1]; for a number of tokens give an int"
            )
        if isinstance(self.budget, int) and self.budget < 1:
            raise ConfigError(f"budget is {self.budget}, expected at least 1 token")
        if self.threshold is not None and not (type(self.threshold) in (int, float) and 0 <= self.threshold <= 1):
            raise ConfigError(f"threshold is {self.threshold!r}, expected a probability from 0 to 1")
        if self.sample is not None and not isinstance(self.sample, torch.Generator):
            raise ConfigError(f"sample is {type(self.sample).__name__}, expected a torch.Generator")
        if self.max_tokens is not None and (type(self.max_tokens) is not int or self.max_tokens < 1):
            raise ConfigError(f"max_tokens is {self.max_tokens!r}, expected an int of at least 1")

    def __call__(self, log_probs: Tensor, places: Sequence[int] | None = None) -> Tensor:
        """log_probs [B, N, 2] -> keep mask bool [B, N], at least one True per image.

        places: of these images among all inputs of the call, for `sample`; by default 0, 1, ...

        Raises `ConfigError` where an int budget exceeds N.
        """
        score = log_probs[..., KEEP] - log_probs[..., DROP]  # [B, N], monotone in the keep probability
        num_patches = score.shape[1]
        # stable: equal scores in raster order, so that the same picture always keeps the same patches
        rank = score.sort(dim=1, descending=True, stable=True).indices.argsort(1)
        if self.budget is not None:
            count = self.budget if isinstance(self.budget, int) else max(1, round(self.budget * num_patches))
            if count > num_patches:
                raise ConfigError(f"budget is {count} tokens, but an image has {num_patches} patches")
            keep = rank < count
        elif self.threshold is not None:
            keep = log_probs[..., KEEP].exp() >= self.threshold
        elif self.sample is not None:
            places = range(len(score)) if places is None else places[: len(score)]
            noise = torch.stack([_gumbel(self.sample.initial_seed(), place, num_patches) for place in places]).to(score)
            keep = score + noise > 0
        else:
            keep = score > 0
        keep = keep | (rank == 0) & ~keep.any(1, keepdim=True)  # never without a token
        return keep if self.max_tokens is None else keep & _best(keep, rank, self.max_tokens)


def _best(keep: Tensor, rank: Tensor, count: int) -> Tensor:
    """Of the kept patches the `count` best by rank; sampling may keep others than the best."""
    order = torch.where(keep, rank, rank + rank.shape[1])
    return order.argsort(1).argsort(1) < count


def _gumbel(seed: int, place: int, num_patches: int) -> Tensor:
    """Difference of two Gumbel draws per patch, float32 [N]: score + noise > 0 keeps a patch with its keep probability."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + place) % 2**63)
    uniform = torch.rand(num_patches, 2, generator=generator, dtype=torch.float64).clamp(1e-12)
    gumbel = -(-uniform.log()).log()
    return (gumbel[:, 0] - gumbel[:, 1]).float()
