"""The optimiser of a training run: which tensors go to which method, and that its state can be taken up again."""

import copy

import pytest
import torch
from torch import nn

from dyntok.training.muon import Muon, orthogonalized
from dyntok.training.optimizer import Optimizer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x).tanh()
        return x


def steps(net, optimizer, count):
    torch.manual_seed(1)
    for _ in range(count):
        optimizer.zero_grad()
        loss = (net(torch.randn(16, 6)) - 1).square().mean()
        loss.backward()
        optimizer.step(lr=0.02)
    return float(loss.detach())


def make(kind, **options):
    torch.manual_seed(0)
    net = Net()
    options = {"dtype": torch.float32} | options
    return net, Optimizer(net.named_parameters(), kind, lr=0.02, weight_decay=0.1, **options)


def test_muon_takes_the_matrices_of_blocks_and_adamw_the_rest():
    net, optimizer = make("muon")
    adamw, muon = ([p for group in part.param_groups for p in group["params"]] for part in optimizer.parts)
    assert [id(p) for p in muon] == [id(block.weight) for block in net.blocks]
    assert {id(p) for p in adamw} | {id(p) for p in muon} == {id(p) for p in net.parameters()} and len(adamw) == 4
    assert [(group["weight_decay"], len(group["params"])) for group in optimizer.parts[0].param_groups] == [
        (0.1, 1),
        (0.0, 3),
    ]
    assert len(make("adamw")[1].parts) == 1


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_it_learns_and_goes_on_from_its_state(kind):
    net, optimizer = make(kind)
    before = steps(net, optimizer, 1)
    assert steps(net, optimizer, 60) < before / 2
    twin, other = make(kind)
    twin.load_state_dict(net.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for pair in ((net, optimizer), (twin, other)):
        steps(*pair, 3)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_the_state_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="the state is of 1 optimizers, expected 2"):
        make("muon")[1].load_state_dict(make("adamw")[1].state_dict())


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (8, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_updates_are_orthogonal_in_either_precision(shape, dtype):
    values = torch.linalg.svdvals(orthogonalized(torch.randn(shape), dtype).float())
    assert values.min() > 0.6 and values.max() < 1.3
    assert torch.equal(orthogonalized(torch.zeros(shape), dtype), torch.zeros(shape, dtype=dtype))


def test_float32_is_what_bfloat16_approximates():
    matrix = torch.randn(16, 48)
    exact, rounded = (orthogonalized(matrix, dtype).float() for dtype in (torch.float32, torch.bfloat16))
    assert 0 < (exact - rounded).norm() < 0.05 * exact.norm()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has Muon since 2.9")
def test_in_bfloat16_it_is_the_one_of_pytorch():
    own, theirs = (nn.Linear(8, 24, bias=False) for _ in range(2))
    theirs.load_state_dict(own.state_dict())
    options = {"lr": 0.02, "weight_decay": 0.1}
    pair = (
        Muon(own.parameters(), dtype=torch.bfloat16, **options),
        torch.optim.Muon(theirs.parameters(), adjust_lr_fn="match_rms_adamw", **options),
    )
    for step in range(4):
        for net, optimizer in zip((own, theirs), pair, strict=True):
            net.weight.grad = torch.randn(24, 8, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    torch.testing.assert_close(own.weight, theirs.weight, atol=1e-3, rtol=0)
    pair[0].load_state_dict(pair[1].state_dict())  # of a run that began with PyTorch's
    own.weight.grad = torch.ones(24, 8)
    pair[0].step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_muon_computes_in_the_dtype_of_the_run(dtype, monkeypatch):
    asked = []
    monkeypatch.setattr("dyntok.training.muon.orthogonalized", lambda matrix, dtype: asked.append(dtype) or matrix)
    steps(*make("muon", dtype=dtype), 1)
    assert asked == [dtype, dtype]
