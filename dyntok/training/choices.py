"""Which patches a training step keeps: the kind of mask and its budget are drawn once for all ranks.

Ranks that drew their own kinds would wait for the slowest at every step. Not here: masks to compare with (`masks.py`).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dyntok.layout import canonical_mask, lattice_positions
from dyntok.model.selector import straight_through
from dyntok.policy import KeepPolicy
from dyntok.training.stage import Stage

Kind = Literal["learned", "budget", "random", "lattice"]


@dataclass(frozen=True)
class Choice:
    """A kind of mask, and the share of the patches that it keeps (the learned kind keeps what the scores say)."""

    kind: Kind
    share: float

    @property
    def measures(self) -> bool:
        """Returns whether the mask ignores the scores: the error it leaves then tells where scores should be higher."""
        return self.kind in ("random", "lattice")


@dataclass(frozen=True)
class Mask:
    """keep: bool [B, N]. gate: float [B, N], equal to it, with the gradient of a learned choice; else None."""

    keep: Tensor
    gate: Tensor | None = None


def draw_choice(stage: Stage) -> Choice:
    """Draws a kind by the stage's shares and a log-uniform budget, from the global random generator."""
    masks, (low, high) = stage.masks, stage.budgets
    shares: dict[Kind, float] = {
        "learned": masks.learned,
        "budget": masks.budget,
        "random": masks.random,
        "lattice": masks.lattice,
    }
    kind = list(shares)[int(torch.multinomial(torch.tensor(list(shares.values())), 1))]
    return Choice(kind, low * (high / low) ** float(torch.rand(())))


def make_mask(choice: Choice, log_probs: Tensor, grid: tuple[int, int], places: str) -> Mask:
    """Returns the mask of log-probabilities [B, N, 2]. Kinds with chance in them draw from the global generator."""
    if choice.kind == "learned":
        return _sampled(log_probs)
    images, patches = log_probs.shape[:2]
    count = max(1, round(patches * choice.share))
    if choice.kind == "budget":
        return Mask(canonical_mask(KeepPolicy(budget=count)(log_probs.detach()), grid, places))
    if choice.kind == "lattice":
        keep = torch.zeros(patches, dtype=torch.bool, device=log_probs.device)
        keep[lattice_positions(count, grid).to(keep.device)] = True
        return Mask(keep.repeat(images, 1))
    noise = torch.rand_like(log_probs[..., 0])
    return Mask(noise.argsort(1).argsort(1) < count)


def _sampled(log_probs: Tensor) -> Mask:
    keep, gate = straight_through(log_probs)
    empty = ~keep.any(1)
    if empty.any():  # at least one token: keep the best patch
        best = KeepPolicy(budget=1)(log_probs.detach()) & empty[:, None]
        keep, gate = keep | best, torch.where(best, gate - gate.detach() + 1, gate)
    return Mask(keep, gate)
