"""One of LaVIT's released files: a torch pickle, of which only tensors are read.

Pickles from strangers can run code. PyTorch's `weights_only` prevents that; everything that is not a tensor is refused.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyntok.errors import CheckpointError


class ReleasedWeights:
    """The tensors of one file, and which of them have been used."""

    def __init__(self, file: Path, tensors: dict[str, Tensor]) -> None:
        self.file, self.tensors, self.used = file, tensors, set[str]()

    @classmethod
    def read(cls, file: Path) -> "ReleasedWeights":
        """Raises `CheckpointError` where the file can't be read or holds anything but dense floating-point tensors."""
        tensors: Any = _unpickle(file)
        names = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
        if not names or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise CheckpointError(f"{file} holds {type(tensors).__name__}, expected a mapping of names to tensors")
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or tensor.is_meta or tensor.layout != torch.strided:
                found = f"{tensor.dtype} on {tensor.device}"
                raise CheckpointError(f"{file}: {name} is {found}, expected dense floating-point values")
        return cls(file, tensors)

    def find(self, name: str) -> Tensor:
        """Returns a tensor without using it. Raises `CheckpointError` where it is missing."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.file} lacks the tensor {name}; expected one of LaVIT's released files")
        return self.tensors[name]

    def take(self, name: str) -> Tensor:
        """Returns a tensor and counts it as used."""
        self.used.add(name)
        return self.find(name)

    def shape(self, name: str, dims: int = 2) -> torch.Size:
        """Returns the shape of a tensor. Raises `CheckpointError` where it has another number of dimensions."""
        shape = self.find(name).shape
        if len(shape) != dims:
            raise CheckpointError(f"{self.file}: {name} has the shape {list(shape)}, expected {dims} dimensions")
        return shape

    def joined(self, *names: str) -> Tensor:
        """Returns several tensors, concatenated."""
        tensors = [self.take(name) for name in names]
        if len({(tensor.dim(), tensor.shape[1:]) for tensor in tensors}) > 1:
            some = ", ".join(names[:4])
            raise CheckpointError(f"{self.file}: {some} have different shapes, expected widths that fit together")
        return torch.cat(tensors)

    def depth(self, prefix: str) -> int:
        """Returns the number of blocks under a prefix."""
        return len({name.removeprefix(prefix).split(".")[0] for name in self.tensors if name.startswith(prefix)})

    def renamed(self, prefix: str, layers: dict[str, str], to: str = "") -> dict[str, Tensor]:
        """Returns the weight and bias of every layer `prefix + old`, as `to + new`."""
        pairs = [(f"{old}.{kind}", f"{new}.{kind}") for old, new in layers.items() for kind in ("weight", "bias")]
        return {to + new: self.take(prefix + old) for old, new in pairs}

    def check_all_used(self) -> None:
        """Raises `CheckpointError` where tensors have not been used."""
        unexpected = [name for name in self.tensors if name not in self.used]
        if unexpected:
            some = ", ".join(unexpected[:5])
            raise CheckpointError(f"{self.file} has {len(unexpected)} tensors that were not expected: {some}")


def _unpickle(file: Path) -> object:
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # a file written before PyTorch 1.6 can't be memory-mapped
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"can't read {file}: {error.strerror or error}") from error
    # pickles fail with errors of any type. PyTorch's advice to load without weights_only is not passed on
    except Exception as error:
        kind = type(error).__name__
        raise CheckpointError(f"{file} is damaged or holds more than tensors ({kind}); it was not loaded") from error
