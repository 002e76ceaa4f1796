"""Weights and the module that they are for: what fits, and what is refused before anything large is built."""

import pytest
import torch
from torch import nn

from dyntok.checkpoint.assemble import check_state_dict
from dyntok.errors import CheckpointError


def test_fitting_weights_pass_also_on_meta():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    check_state_dict(model, model.state_dict())
    with torch.device("meta"):
        bare = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    check_state_dict(bare, model.state_dict())


def test_foreign_weights_are_listed():
    model = nn.Sequential(*[nn.Linear(2, 3) for _ in range(8)])
    state = {f"x{i}": torch.zeros(1) for i in range(7)} | {"0.weight": torch.zeros(3, 5)}
    with pytest.raises(CheckpointError) as caught:
        check_state_dict(model, state)
    text = str(caught.value)
    assert "15 missing: 0.bias, 1.weight, 1.bias, 2.weight, 2.bias and 10 more" in text
    assert "7 not expected: x0, x1, x2, x3, x4 and 2 more" in text
    assert "1 of another shape: 0.weight (checkpoint [3, 5], model [3, 2])" in text
