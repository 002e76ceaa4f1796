"""The fingerprint of a tokenizer: a hash of everything that makes codes and gives them their meaning."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dyntok.config import TokenizerConfig
from dyntok.errors import CheckpointError, ConfigError

_SECTIONS = ("image", "backbone", "selector", "merger", "codebook")
_PARTS = ("backbone.", "selector.", "merger.", "projection.", "codebook.")
_PIECE = 1 << 22  # elements hashed at a time


def makes_codes(name: str) -> bool:
    """Returns whether codes depend on the tensor of this name, rather than only their decoding."""
    return name.startswith(_PARTS)


def encoding_sections(config: TokenizerConfig) -> str:
    """Returns the sections that codes depend on, as JSON.

    Default values are left out, so that a later version with more options gives the same text.

    Raises `ConfigError` where a value cannot be written as JSON.
    """
    try:
        sections = {name: value for name, value in config.stated().items() if name in _SECTIONS}
        return json.dumps(sections, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the configuration can't be written as JSON: {error}") from error


def fingerprint(config: TokenizerConfig, state_dict: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> str:
    """Returns 16 hexadecimal digits (of SHA-256).

    Hashed are the configuration and the tensors from the image to the codebook, by name, shape and value. Decoders, the
    pixel head and every other part that only reads codes may change or be missing.

    Floating-point tensors count as their float32 values, so a checkpoint stored in fp16 and its float32 form agree.
    With `dtype`: the fingerprint after storing them as that. The model is read piece by piece and never copied as a
    whole.
    """
    digest = hashlib.sha256(encoding_sections(config).encode())
    for name in sorted(filter(makes_codes, state_dict)):
        tensor = dense(name, state_dict[name])
        kind = "float32" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
        digest.update(f"\n{json.dumps([name, kind, list(tensor.shape)])}\n".encode())
        for piece in tensor.reshape(-1).split(_PIECE):
            if tensor.is_floating_point():
                piece = rounded(name, piece, dtype).to(torch.float32)
            array = piece.cpu().numpy()
            digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False))
    return digest.hexdigest()[:16]


def dense(name: str, tensor: Any) -> Tensor:
    """Returns the tensor without gradient. Raises `CheckpointError` unless it is a dense tensor with values."""
    if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.layout != torch.strided:
        kind = type(tensor).__name__
        raise CheckpointError(f"{name} is no dense tensor with values ({kind}); only those can be stored")
    return tensor.detach()


def rounded(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Returns a floating-point tensor as `dtype`. Raises `CheckpointError` where a value is too large for it."""
    if dtype is None or not tensor.is_floating_point():
        return tensor
    converted = tensor.to(dtype)
    if not torch.equal(tensor.isfinite(), converted.isfinite()):
        largest = f"values up to {tensor.abs().max():.3g}"
        raise CheckpointError(f"{name} has {largest}, too large for {dtype}; store it as float32 or bfloat16")
    return converted
