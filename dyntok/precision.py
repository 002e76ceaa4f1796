"""Numeric precision: the names of dtypes, and modules in half precision whose sensitive parts stay float32."""

from typing import TypeVar

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
    if dtype in DTYPES:
        return DTYPES[dtype]
    raise ConfigError(f"dtype is {dtype!r}, expected {', '.join(DTYPES)} or a floating-point torch.dtype")


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
