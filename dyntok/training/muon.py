"""Muon, an optimizer for matrices, in the precision of the run.

`torch.optim.Muon` always multiplies in bfloat16. On processors that emulate bfloat16, this took more than half of the
time of a training step. Not here: which tensors Muon trains (`optimizer.py`).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_MOMENTUM = 0.95
_STEPS = 5
_FACTORS = 3.4445, -4.7750, 2.0315  # of the polynomial a x + b x^3 + c x^5, from the source below


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are orthogonalized (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    Updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982, section 2.2). So one learning rate
    suits both. Its state is that of `torch.optim.Muon`.

    params: matrices. weight_decay: decoupled, as in AdamW. dtype: of the products, the same on all ranks.
    """

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, weight_decay: float, dtype: torch.dtype) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # takes no closure: nothing computes the loss again
        """Moves every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix.grad)
                momentum = state["momentum_buffer"].lerp_(matrix.grad, 1 - _MOMENTUM)
                update = orthogonalized(matrix.grad.lerp(momentum, _MOMENTUM), self.dtype)
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)


def orthogonalized(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a matrix with the same singular vectors and singular values near 1 (between about 0.7 and 1.2).

    Five Newton-Schulz steps, computed in `dtype`, which is also the result's. Singular values that are tiny beside the
    largest one come out smaller.
    """
    a, b, c = _FACTORS
    x = matrix.to(dtype)
    wide = x if x.shape[0] <= x.shape[1] else x.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if x.shape[0] <= x.shape[1] else wide.T
