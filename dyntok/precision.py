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
    if isinstance(dtype, torch.dtype) and dtype in (*DTYPES.values(), torch.float64):
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise ConfigError(f"dtype is {dtype!r}, expected {', '.join(DTYPES)}, one of their torch.dtypes, or torch.float64")


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


_LEGACY = _LegacyPrecision()

Setting = tuple[Any, str, Any]  # the object, the name of its attribute, a value
_lock = threading.Lock()
_users: Counter[str] = Counter()  # threads that need certain settings, by their name
_found: dict[str, dict[tuple[int, str], Setting]] = {}  # what the first of them changed, by object and attribute


@contextmanager
def settings(name: str, wanted: list[Setting]) -> Iterator[None]:
    """Sets global settings while any thread needs them. The last of several threads restores what the first found."""
    with _lock:
        found = _found.setdefault(name, {})
        for part, key, value in wanted:
            old = getattr(part, key)
            if old not in (value, "none"):
                found.setdefault((id(part), key), (part, key, old))
                setattr(part, key, value)
        _users[name] += 1
    try:
        yield
    finally:
        with _lock:
            _users[name] -= 1
            if not _users[name]:
                del _users[name]
                for part, key, old in _found.pop(name).values():
                    _restore(part, key, old)


def _restore(part: Any, key: str, old: Any) -> None:
    if key == "fp32_precision" and part is not _LEGACY:
        setattr(part, key, "none")  # it then follows a setting above it, as it did if that gave the old value
        if getattr(part, key) == old:
            return
    setattr(part, key, old)


def full_float32(device: torch.device) -> AbstractContextManager[None]:
    """Returns the context in which convolutions and products of float32 are computed in float32.

    By default cuDNN rounds the factors of a convolution to TF32. `torch.set_float32_matmul_precision` lets a GPU do so
    in products, and a CPU round to bfloat16.
    """
    return settings(device.type, _full_precision(device.type))


def _full_precision(kind: str) -> list[Setting]:
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
    return [(_LEGACY, "fp32_precision", "highest")] if kind == "cpu" else []


def fixed_convolutions(device: torch.device) -> AbstractContextManager[None]:
    """Returns the context in which cuDNN does not choose the program of a convolution by timing it.

    The timings may end differently in every run.
    """
    cudnn: Any = torch.backends.cudnn
    fixed = [(cudnn, "benchmark", False), (cudnn, "deterministic", True)] if device.type == "cuda" else []
    return settings(f"convolutions of {device.type}", fixed)
