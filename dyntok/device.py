"""Checks that a device exists before anything is moved to it, names its kind, makes it the current one, and sends it
numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dyntok.errors import ConfigError


def check_device(device: torch.device | str | int) -> torch.device:
    """Returns the device. Raises `ConfigError`, which says what to use instead, where PyTorch has no such device."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    # the type depends on what is missing: a name, a build of PyTorch, a driver or a package
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        hint = "; a GPU of NVIDIA or AMD is 'cuda', one of Apple 'mps'" if str(device) == "gpu" else ""
        raise ConfigError(
            f"PyTorch {torch.__version__} has no device {str(device)!r} on this machine, expected {_available()}{hint}"
        ) from error
    return found


def _available() -> str:
    gpus = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    names = [repr(name) for name, available in gpus.items() if available]
    return " or ".join(["'cpu'", *names]) if names else "'cpu', because PyTorch found no GPU"


def device_kind(device: torch.device | str) -> str:
    """Returns what decides how a device rounds: the name of a CUDA GPU, such as "NVIDIA L4", else "cpu" or "mps"."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def make_current(device: torch.device | str) -> None:
    """Makes a GPU the current one of this process, on which everything starts that names none."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def current_stream(device: torch.device | None) -> int | None:
    """Returns the number of a GPU's stream on which this thread computes, or None where it is recorded into a graph.

    Other devices have the number 0.
    """
    if device is None or device.type != "cuda" or not torch.cuda.is_available():
        return 0
    return None if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream(device).cuda_stream


def integers_on(device: torch.device, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    """Returns whole numbers as int64 on a device. The host does not wait for a GPU."""
    return sent_to(device, torch.tensor(values, dtype=torch.long, device="cpu"))


def sent_to(device: torch.device, tensor: Tensor) -> Tensor:
    """Returns a tensor of the CPU on a device. The host does not wait for a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
