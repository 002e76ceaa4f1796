"""`KeepPolicy`: how many patches an image keeps, and the rule that turns scores into a keep mask."""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypedDict

from dyntok.device import sent_to
from dyntok.errors import ConfigError
from dyntok.model.selector import DROP, KEEP


class KeepOptions(TypedDict, total=False):
    """The options of `KeepPolicy`, as keyword arguments of `encode` and `features`."""

    budget: int | float | None
    threshold: float | None
    sample: int | torch.Generator | None
    max_tokens: int | None
    psnr: float | None
    places: Literal["free", "map", "lattice"] | None


@dataclass(frozen=True)
class KeepPolicy:
    """How scores become a keep mask.

    At most one of `budget`, `threshold`, `sample` and `psnr` may be given; without any, the selector decides.

    budget: the exact number of tokens (int), or a share of the patches (float in (0, 1], rounded, at least one token).
        The patches with the best scores are kept.
    threshold: keep every patch whose keep probability is at least this (0 to 1).
    sample: keep patches at random with their keep probabilities, as in the paper. A seed, or a generator whose initial
        seed is used. Image i of a call draws from that seed and i, so the result depends neither on the batch nor on
        earlier calls.
    max_tokens: an upper limit. Works with every other option; the patches with the best scores stay.
    psnr: the quality in dB that the reconstruction reaches with the fewest tokens. Only a tokenizer with a pixel head
        can do this, and it decodes each image about 8 times to find that number. An image that cannot reach the quality
        keeps all its patches, or `max_tokens` of them.
    places: which masks are allowed (see `layout.py`); by default what the tokenizer was trained for. "map": scores
        decide how many patches each cell of 2 x 2 keeps, and a fixed order decides which. "lattice": scores decide how
        many the picture keeps, and a fixed order decides which. "free": scores decide everything.
    """

    budget: int | float | None = None
    threshold: float | None = None
    sample: int | torch.Generator | None = None
    max_tokens: int | None = None
    psnr: float | None = None
    places: Literal["free", "map", "lattice"] | None = None

    def __post_init__(self) -> None:
        for name in ("budget", "threshold", "sample", "max_tokens", "psnr"):
            value = getattr(self, name)
            if isinstance(value, np.integer | np.floating):
                object.__setattr__(self, name, value.item())
        given = [name for name in ("budget", "threshold", "sample", "psnr") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(
                f"{' and '.join(given)} were both given, expected at most one of budget, threshold, sample, psnr"
            )
        self._check_budget()
        if self.threshold is not None and not (type(self.threshold) in (int, float) and 0 <= self.threshold <= 1):
            raise ConfigError(f"threshold is {self.threshold!r}, expected a probability from 0 to 1")
        seed = type(self.sample) is int and 0 <= self.sample < 2**64
        if not (self.sample is None or seed or isinstance(self.sample, torch.Generator)):
            raise ConfigError(f"sample is {self.sample!r}, expected a seed of 0 or more, or a torch.Generator")
        if self.max_tokens is not None and (type(self.max_tokens) is not int or self.max_tokens < 1):
            raise ConfigError(f"max_tokens is {self.max_tokens!r}, expected an int of at least 1")
        if self.psnr is not None and not (type(self.psnr) in (int, float) and 0 < self.psnr < 100):
            raise ConfigError(f"psnr is {self.psnr!r}, expected decibels, such as 22.0")
        if self.places not in (None, "free", "map", "lattice"):
            raise ConfigError(f"places is {self.places!r}, expected 'free', 'map' or 'lattice'")

    @classmethod
    def of(cls, policy: "KeepPolicy | None", options: Mapping[str, Any]) -> "KeepPolicy":
        """Returns the given policy, or a new one with these options.

        Raises `ConfigError` where both are given, and `TypeError` on an unknown option.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                similar = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {similar[0]!r}?" if similar else f"expected some of {', '.join(known)}"
                raise TypeError(f"got an unexpected option {name!r}; {hint}")
        if policy is None:
            return cls(**options)
        if not isinstance(policy, cls):
            raise ConfigError(f"policy is {type(policy).__name__}, expected a KeepPolicy")
        if given := [name for name, value in options.items() if value is not None]:
            raise ConfigError(f"policy and {', '.join(given)} were both given, expected one or the other")
        return policy

    def __call__(self, log_probs: Tensor, input_indices: Sequence[int] | None = None) -> Tensor:
        """Returns a keep mask, bool [B, N], from log_probs [B, N, 2], with at least one True per image.

        input_indices: the index of each image among all inputs of the call, for `sample`; by default 0, 1, ...

        Raises `ConfigError` where an int budget exceeds N, and with `psnr`, which needs more than scores.
        """
        if self.psnr is not None:
            raise ConfigError("psnr needs a tokenizer that decodes; give it to encode() or features()")
        score = log_probs[..., KEEP] - log_probs[..., DROP]  # [B, N], monotone in the keep probability
        num_patches = score.shape[1]
        rank = ranks(log_probs)
        if (count := self.count(num_patches)) is not None:
            return rank < count
        if self.threshold is not None:
            keep = log_probs[..., KEEP].exp() >= self.threshold
        elif self.seed is not None:
            keep = score + self._noise(score, input_indices) > 0
        else:
            keep = score > 0
        keep = keep | (rank == 0) & ~keep.any(1, keepdim=True)  # at least one token
        return keep if self.max_tokens is None else keep & _best(keep, rank, self.max_tokens)

    def count(self, num_patches: int) -> int | None:
        """Returns the number of patches that every image of N patches keeps; None where it depends on the image.

        Raises `ConfigError` where an int budget exceeds N.
        """
        if self.budget is None:
            return None
        count = self.budget if isinstance(self.budget, int) else max(1, round(self.budget * num_patches))
        if count > num_patches:
            raise ConfigError(f"budget is {count} tokens, but an image has {num_patches} patches")
        return count if self.max_tokens is None else min(count, self.max_tokens)

    def may_miss(self, tokens: int, patches: int) -> bool:
        """Returns whether an image of that many tokens may miss `psnr`: it keeps as many patches as it may."""
        return self.psnr is not None and tokens == min(patches, self.max_tokens or patches)

    def distance(self, log_probs: Tensor, input_indices: Sequence[int] | None = None) -> Tensor:
        """Returns how far each score lies from where its decision changes, in logits: [B, N], positive where kept.

        Where patches compete (for a budget, for `max_tokens`, or for the one patch that an image keeps at least), a
        decision changes half way between the last patch that is kept and the first that is dropped.
        """
        score = plain = log_probs[..., KEEP] - log_probs[..., DROP]
        if self.seed is not None:
            score = score + self._noise(score, input_indices)
        elif self.threshold is not None:
            limit = min(max(self.threshold, 1e-12), 1 - 1e-12)
            score = score - math.log(limit / (1 - limit))
        keep = self(log_probs, input_indices)
        last = plain.masked_fill(~keep, torch.inf).amin(1, keepdim=True)
        cut = plain - _middle(last, plain.masked_fill(keep, -torch.inf), last - 1)
        if self.budget is not None:
            return cut
        count = keep.sum(1, keepdim=True)
        none = (keep & (score < 0)).any(1, keepdim=True) & (count == 1)  # no patch is above its limit
        if self.max_tokens is not None:
            rivals = plain.masked_fill(keep | (score <= 0), -torch.inf)  # above their limit, but others are better
            among = plain - _middle(last, rivals, last)
            among = among.masked_fill(keep & ~rivals.isfinite().any(1, keepdim=True), torch.inf)
            score = torch.where(count >= self.max_tokens, torch.minimum(score, among), score)
        # the only patch may lose its place to one that is better, or above its limit
        return torch.where(none, torch.where(keep, cut, torch.maximum(score, cut)), score)

    def _noise(self, score: Tensor, input_indices: Sequence[int] | None) -> Tensor:
        images, num_patches = score.shape
        indices = range(images) if input_indices is None else input_indices[:images]
        noise = torch.stack([_gumbel_difference(self.seed or 0, index, num_patches) for index in indices])
        return sent_to(score.device, noise).to(score.dtype)

    @property
    def seed(self) -> int | None:
        """Returns the seed of `sample`; None without it."""
        return self.sample.initial_seed() if isinstance(self.sample, torch.Generator) else self.sample

    def _check_budget(self) -> None:
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


def ranks(log_probs: Tensor) -> Tensor:
    """Returns the place of each patch by its score, int64 [B, N]: 0 for the best; log_probs [B, N, 2]."""
    score = log_probs[..., KEEP] - log_probs[..., DROP]
    # stable: equal scores in raster order, so that the same picture always keeps the same patches
    return score.sort(dim=1, descending=True, stable=True).indices.argsort(1)


def _best(keep: Tensor, rank: Tensor, count: int) -> Tensor:
    """Returns a mask of the `count` best kept patches. Sampling may keep other patches than the best of all."""
    order = torch.where(keep, rank, rank + rank.shape[1])
    return order.argsort(1).argsort(1) < count


def _middle(last: Tensor, rivals: Tensor, alone: Tensor) -> Tensor:
    """Returns the middle between the worst kept score [B, 1] and the best of its rivals [B, N]; `alone` without any."""
    best = rivals.amax(1, keepdim=True)
    return torch.where(best.isfinite(), (last + best) / 2, alone)


def _gumbel_difference(seed: int, input_index: int, num_patches: int) -> Tensor:
    """Returns the difference of two Gumbel draws per patch, float32 [N].

    `score + difference > 0` keeps a patch with its keep probability.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + input_index) % 2**63)
    uniform = torch.rand(num_patches, 2, generator=generator, dtype=torch.float64, device="cpu").clamp(1e-12)
    gumbel = -(-uniform.log()).log()
    return (gumbel[:, 0] - gumbel[:, 1]).float()
