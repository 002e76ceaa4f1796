"""Types of arguments, exit codes and output that several commands share."""

import argparse
import json
from collections.abc import Callable
from typing import Any

OK, FAILED, USAGE, SOME_SKIPPED, INTERRUPTED = 0, 1, 2, 3, 130


def budget(text: str) -> int | float:
    """Reads a number of tokens, or a share of the patches such as 0.25."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of tokens nor a share such as 0.25") from None


def whole(low: int, high: int) -> Callable[[str], int]:
    """Returns a reader of whole numbers within a range."""

    def read(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {low} to {high}")
        return int(text)

    return read


def mapping(text: str) -> dict[str, Any]:
    """Reads a JSON object."""
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return values


def keep_options(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the keep options of a command line as `encode` takes them."""
    import torch

    sample = None if options.sample is None else torch.Generator().manual_seed(options.sample)
    return {
        "budget": options.budget,
        "threshold": options.threshold,
        "sample": sample,
        "max_tokens": options.max_tokens,
    }


def print_json(values: Any) -> None:
    print(json.dumps(values))
