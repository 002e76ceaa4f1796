"""TensorBoard and Weights & Biases, through accelerate: they get the lines of `log.jsonl` (see `log.py`)."""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator

from dyntok.errors import MissingDependencyError

_PROJECT = "dyntok"


def check_trackers(names: Sequence[str]) -> None:
    """Raises `MissingDependencyError` if the package of a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingDependencyError(f"the tracker {name} needs its package: pip install {name}, or remove it")


def start_trackers(accelerator: Accelerator, recipe: Mapping[str, Any]) -> None:
    """Starts the trackers of the accelerator, if it has any, and tells them the recipe's plain values."""
    if accelerator.log_with:
        plain = {name: value for name, value in recipe.items() if isinstance(value, int | float | str | bool)}
        accelerator.init_trackers(_PROJECT, config=plain)


def track(accelerator: Accelerator, line: Mapping[str, Any]) -> None:
    """Gives the numbers of a line of the log to the trackers."""
    numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
    accelerator.log(numbers, step=line["step"])


def finish_trackers(accelerator: Accelerator) -> None:
    """Lets the trackers write what they still hold. Processes stay connected, unlike after accelerate's own end."""
    for tracker in accelerator.trackers:
        tracker.finish()
