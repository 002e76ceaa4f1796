"""A GPU that exists by name alone: tensors with shapes, dtypes and a device, but without values.

An operation on tensors of two devices, and every read of a value, is an error there.
"""

import contextlib

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

FAKE = FakeTensorMode()  # one for all tests, because tables of a grid are remembered


@contextlib.contextmanager
def fake_gpu(monkeypatch):
    """Tensors made inside are fake. Autocast for CUDA works as on a machine that has it."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    with FAKE:
        yield


def to_fake_gpu(module):
    """Replaces all tensors of a module by fake ones on a GPU, and returns the module."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(_alike(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _alike(buffer)
    return module


def _alike(tensor):
    with FAKE:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
