"""Kernels start on the device of their tensors, which need not be the current one. Without a GPU: a stub driver."""

import pytest
import torch
from support.kernel_cases import bounds
from torch._subclasses.fake_tensor import FakeTensorMode

import dyntok_kernels  # noqa: F401  # registers the operations

pytest.importorskip("triton")
from triton.runtime.jit import KernelInterface  # noqa: E402

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


@pytest.fixture
def launches(monkeypatch):
    """The device that was current at each launch. The device of this process is 0."""
    current, seen = [0], []

    def exchange(device):
        before, current[0] = current[0], device
        return before

    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, exchange)
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda kernel, grid: lambda *_, **__: seen.append(current[0]))
    yield seen
    assert current == [0]


def cases():
    """Arguments on the second GPU for every operation; fake, so that none is needed."""
    with FakeTensorMode():
        q, grad = torch.randn(8, 2, 16), torch.randn(8, 2, 16)
        cu, lse, index = bounds([3, 0, 5]), torch.randn(2, 8), torch.zeros(5, dtype=torch.int32)
        lists = index, bounds([2, 3]), index[:3], bounds([2, 1])
        found = {
            "varlen_attention": (q, q, q, cu, cu, True),
            "varlen_attention_backward": (grad, q, q, q, q, lse, cu, cu, True),
            "nearest_code": (torch.randn(9, 8), torch.randn(70, 8), True),
            "compact": (torch.ones(2, 4, dtype=torch.bool),),
            "gather_rows": (torch.randn(8, 8), index, None),
            "scatter_rows": (torch.randn(5, 8), index, torch.randn(4, 8), 8),
            "codebook_stats": (torch.randn(9, 8), torch.zeros(9, dtype=torch.long), 5),
            "merge_similar": (torch.randn(8, 8), torch.ones(8), *lists),
        }
        move = lambda x: x.to("cuda:1") if isinstance(x, torch.Tensor) else x  # noqa: E731
        return {name: tuple(map(move, arguments)) for name, arguments in found.items()}


def test_every_kernel_starts_on_the_device_of_its_tensors(launches):
    operations = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("dyntok::")]
    arguments = cases()
    assert sorted(operations) == sorted(f"dyntok::{name}" for name in arguments)
    for name, given in arguments.items():
        with given[0].fake_mode:
            getattr(torch.ops.dyntok, name).default.redispatch(CUDA, *given)
        assert launches and set(launches) == {1}, name
        launches.clear()
