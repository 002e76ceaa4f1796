"""Numeric precision: the names of dtypes, and modules in half precision whose sensitive parts stay float32."""

import contextlib
import threading
from collections import Counter
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


class _LegacyPrecision:
    """The precision of products on a CPU before PyTorch 2.9, as a setting like the later ones."""

    @property
    def fp32_precision(self) -> str:
        return torch.get_float32_matmul_precision()

    @fp32_precision.setter
    def fp32_precision(self, value: str) -> None:
        torch.set_float32_matmul_precision(value)


_settings_lock = threading.Lock()
_users: Counter[str] = Counter()  # threads that need full precision, by kind of device
_changed: dict[str, list[tuple[Any, str, Any]]] = {}  # what they found: setting, name, value


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Computes convolutions and products of float32 in float32.

    By default cuDNN rounds the factors of a convolution to TF32. `torch.set_float32_matmul_precision` lets a GPU do so
    in products, and a CPU round to bfloat16. The last of several threads restores what the first one found.
    """
    kind = device.type
    with _settings_lock:
        if not _users[kind]:
            found = [(setting, name, value, getattr(setting, name)) for setting, name, value in _settings(kind)]
            _changed[kind] = [(setting, name, old) for setting, name, value, old in found if old not in (value, "none")]
            for setting, name, value, old in found:
                if old not in (value, "none"):
                    setattr(setting, name, value)
        _users[kind] += 1
    try:
        yield
    finally:
        with _settings_lock:
            _users[kind] -= 1
            if not _users[kind]:
                for setting, name, old in _changed.pop(kind):
                    setattr(setting, name, old)


def _settings(kind: str) -> list[tuple[Any, str, Any]]:
    """Returns the settings that lower the precision on a kind of device, with the values that do not."""
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    named = hasattr(cudnn, "conv")  # PyTorch 2.9 and later name the precision
    if kind == "cuda" and named:
        return [(part, "fp32_precision", "ieee") for part in (cudnn.conv, torch.backends.cuda.matmul)]
    if kind == "cuda":
        return [(part, "allow_tf32", False) for part in (cudnn, torch.backends.cuda.matmul)]
    if kind == "cpu" and named:
        return [(part, "fp32_precision", "ieee") for part in (mkldnn.conv, mkldnn.matmul)]
    return [(_LegacyPrecision(), "fp32_precision", "highest")] if kind == "cpu" else []


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
