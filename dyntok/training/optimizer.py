"""The optimizer of a run: AdamW, or Muon for the matrices of transformer blocks and AdamW for all other tensors.

Not here: Muon itself (`muon.py`).
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from dyntok.training.muon import Muon

_BETAS = (0.9, 0.98)


class Optimizer:
    """One or two optimizers that step together.

    kind: "adamw", or "muon" for the matrices in transformer blocks. Both use the same learning rate.
    weight_decay: for tensors of at least two dimensions. dtype: in which Muon computes, the same on all ranks.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        kind: Literal["adamw", "muon"],
        *,
        lr: float,
        weight_decay: float,
        dtype: torch.dtype,
    ) -> None:
        named = list(parameters)
        is_muon = {name: kind == "muon" and "blocks." in name and p.ndim == 2 for name, p in named}
        matrices = [p for name, p in named if is_muon[name]]
        others = [p for name, p in named if not is_muon[name]]
        groups = [
            {"params": [p for p in others if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=lr, betas=_BETAS)]
        if matrices:
            self.parts.append(Muon(matrices, lr=lr, weight_decay=weight_decay, dtype=dtype))

    def step(self, lr: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises `KeyError` or `ValueError` if the state belongs to another kind or to other parameters."""
        if len(state) != len(self.parts):
            raise ValueError(f"the state is of {len(state)} optimizers, expected {len(self.parts)}")
        for i, part in enumerate(self.parts):
            part.load_state_dict(state[str(i)])
