"""A module and its stored weights: built without wasting memory or time, checked, put together.

Checkpoints may come from strangers. A configuration that asks for a larger model than the weights hold is refused while
the model is built.
"""

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from dyntok.errors import CheckpointError, ConfigError

M = TypeVar("M", bound=nn.Module)

_ZERO_BUFFER = "k_bias"  # of timm's EVA: not stored, always zero
_STORED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ADVICE = "Use the config.json that was saved with them."
_COUNT = re.compile("depth|layer|block|repeat")  # in the names of options that count blocks
# timm registers some modules and parameters that it removes again
_REGISTRATIONS_PER_TENSOR, _MORE_REGISTRATIONS = 4, 1000


class _TooLargeError(Exception):
    """More parts were registered than the weights can fill."""


def new_on_meta(make: Callable[[], M], state: Mapping[str, Tensor] | None = None) -> M:
    """Returns a module without memory or initial values, for `fill`.

    It has both where the meta device would lose computed values.

    state: the tensors that will fill it. Raises `CheckpointError` where they do not fit, before anything large is
        built.
    """
    if state is None:
        return _on_meta_or_not(make, None)
    try:
        with _limited_registrations(_REGISTRATIONS_PER_TENSOR * len(state) + _MORE_REGISTRATIONS):
            return _on_meta_or_not(make, state)
    except _TooLargeError:
        raise CheckpointError(_too_large(len(state))) from None


def check_depth(options: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Raises `CheckpointError` where options of a timm model ask for more blocks than there are tensors.

    timm computes a value for every block before it makes the first one.
    """
    for name, value in options.items():
        counts = [count for count in (value if isinstance(value, list | tuple) else [value]) if isinstance(count, int)]
        if _COUNT.search(name) and sum(counts) > len(state):
            raise CheckpointError(_too_large(len(state), f"backbone.kwargs.{name} is {value}, and "))


def fill(module: nn.Module, state: Mapping[str, Tensor], advice: str = _ADVICE) -> None:
    """Gives a module of `new_on_meta` its tensors, without a copy.

    Raises `CheckpointError` where they do not fit or hold NaN or infinite values.
    """
    check_state_dict(module, state, advice)
    check_finite(state)
    module.load_state_dict(state, assign=True)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta and name == _ZERO_BUFFER:
                setattr(part, name, torch.zeros_like(buffer, device="cpu"))


def check_state_dict(module: nn.Module, state: Mapping[str, Tensor], advice: str = _ADVICE) -> None:
    """Checks that tensors are those of a module, with the same shapes and types.

    Raises a `CheckpointError` that names what is missing, not expected or different.
    """
    expected = module.state_dict()
    both = [name for name in expected if name in state]
    shapes = [
        f"{name} (checkpoint {list(state[name].shape)}, model {list(expected[name].shape)})"
        for name in both
        if state[name].shape != expected[name].shape
    ]
    types = [
        f"{name} (checkpoint {state[name].dtype}, model {expected[name].dtype})"
        for name in both
        if (state[name].dtype in _STORED) != (expected[name].dtype in _STORED)
    ]
    problems = {
        "missing": [name for name in expected if name not in state],
        "not expected": [name for name in state if name not in expected],
        "of another shape": shapes,
        "of another type": types,
    }
    if any(problems.values()):
        found = "; ".join(f"{len(names)} {what}: {few(names)}" for what, names in problems.items() if names)
        raise CheckpointError(f"the weights do not fit the configuration: {found}. {advice}")


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Raises a `CheckpointError` that names tensors with NaN or infinite values."""
    bad = [name for name, tensor in state.items() if tensor.dtype in _STORED and not _is_finite(tensor)]
    if bad:
        raise CheckpointError(
            f"the weights hold NaN or infinite values in {len(bad)} tensors: {few(bad)}; "
            "they are damaged or their training diverged, use another checkpoint"
        )


def few(names: list[str], count: int = 5) -> str:
    """Returns the first names for a message, and the number of the others."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _too_large(tensors: int, why: str = "") -> str:
    held = f"the weights hold only {tensors} tensors, and the configuration asks for a far larger model"
    return f"{why}{held}. {_ADVICE}"


def _is_finite(tensor: Tensor) -> bool:
    # a sum reads the values once and needs no memory; it may overflow where the values are finite
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.to(torch.float32).isfinite().all())


def _on_meta_or_not(make: Callable[[], M], state: Mapping[str, Tensor] | None) -> M:
    try:
        with torch.device("meta"):
            module = make()
    except (ConfigError, RuntimeError):  # networks that need values while they are made; otherwise the same error again
        return _with_values(make)
    stored = set(module.state_dict())
    computed = [name for name, _ in module.named_buffers() if name not in stored and not name.endswith(_ZERO_BUFFER)]
    if not computed:
        return module
    if state is not None:
        check_state_dict(module, state)
    return _with_values(make)


def _with_values(make: Callable[[], M]) -> M:
    # Initial values must not change the caller's random numbers, nor computed ones depend on the caller's device.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return make()


@contextmanager
def _limited_registrations(limit: int) -> Iterator[None]:
    """Limits how many modules and parameters this thread may register inside the block.

    Raises `_TooLargeError` as soon as there are more.
    """
    thread, count = threading.get_ident(), 0

    def registered(*_: object) -> None:
        nonlocal count
        if threading.get_ident() == thread:
            count += 1
            if count > limit:
                raise _TooLargeError

    hooks = [
        torch_module.register_module_parameter_registration_hook(registered),
        torch_module.register_module_module_registration_hook(registered),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
