"""Numeric precision: the names of dtypes, and modules in half precision whose sensitive parts stay float32."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dyntok.errors import ConfigError
from dyntok.model.codebook import Codebook
from dyntok.model.selector import Selector

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HALF = (torch.float16, torch.bfloat16)

M = TypeVar("M", bound=nn.Module)


def dtype_named(dtype: torch.dtype | str) -> torch.dtype:
    """Returns the dtype itself, or the one with this short name. Raises `ConfigError` on other values."""
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise ConfigError(f"dtype is {dtype!r}, expected {', '.join(DTYPES)} or a floating-point torch.dtype")


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the short name of a dtype, or PyTorch's where there is none."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


def cast(module: M, dtype: torch.dtype) -> M:
    """Converts the weights to `dtype`, in place, and returns the module.

    In half precision the selector, the codebook and every LayerNorm stay float32, so that rounding changes few
    decisions.
    """
    if dtype not in HALF:
        return module.to(dtype)
    sensitive = [part for part in module.modules() if isinstance(part, Selector | Codebook | nn.LayerNorm)]
    kept = {id(tensor) for part in sensitive for tensor in (*part.parameters(), *part.buffers())}

    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(torch.float32 if id(tensor) in kept else dtype) if tensor.is_floating_point() else tensor

    return module._apply(convert)


def autocast(device_type: str, dtype: torch.dtype) -> AbstractContextManager:
    """Returns the context in which weights of `dtype` compute: autocast in half precision, else none at all."""
    if dtype in HALF:
        return torch.autocast(device_type, dtype)
    outside = torch.is_autocast_enabled(device_type)  # a graph without autocast holds no sign of it
    return torch.autocast(device_type, enabled=False) if outside else contextlib.nullcontext()


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Computes convolutions and products of float32 in float32 on a GPU.

    By default cuDNN rounds the factors of a convolution to TF32, which changes codes.
    """
    if device.type != "cuda":
        yield
        return
    convolutions: Any = torch.backends.cudnn
    value: Any = False
    name = "allow_tf32"
    if hasattr(convolutions, "conv"):  # PyTorch 2.9 and later name the precision
        convolutions, name, value = convolutions.conv, "fp32_precision", "ieee"
    settings = [convolutions, torch.backends.cuda.matmul]
    before = [getattr(setting, name) for setting in settings]
    try:
        for setting in settings:
            setattr(setting, name, value)
        yield
    finally:
        for setting, old in zip(settings, before, strict=True):
            setattr(setting, name, old)


@contextmanager
def fixed_convolutions(device: torch.device) -> Iterator[None]:
    """Keeps cuDNN from choosing the program of a convolution by timing it, which may end differently in every run."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    try:
        if device.type == "cuda":
            cudnn.benchmark, cudnn.deterministic = False, True
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
