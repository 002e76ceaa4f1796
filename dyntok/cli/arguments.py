"""What several commands share: building a parser, reading values, exit codes and output. Imports nothing heavy."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from dyntok.policy import KeepOptions

    Commands = _SubParsersAction[argparse.ArgumentParser]

OK, FAILED, USAGE, SOME_SKIPPED, INTERRUPTED = 0, 1, 2, 3, 130
LARGEST = 2**31


def add_command(
    commands: "Commands",
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    summary: str,
    details: str,
    example: str,
) -> argparse.ArgumentParser:
    """Add a command that calls `run`. `dyntok --help` shows the summary, the command's own help shows everything."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary}\n{details}",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_model_option(parser: "argparse.ArgumentParser | argparse._MutuallyExclusiveGroup") -> None:
    parser.add_argument(
        "--model", metavar="NAME", help="a folder, a name on the hub, or a bundled one: flex, tiny (default: flex)"
    )


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", default="cpu", help="cpu, cuda, cuda:1, mps (default: %(default)s)")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON to stdout and everything else to stderr")


def add_policy_options(parser: argparse.ArgumentParser, *, sample: bool = True) -> None:
    """Add the options that decide how many patches are kept, which `keep_options` reads, and `--refine`."""
    group = parser.add_argument_group("tokens per image (default: the tokenizer decides)")
    rule = group.add_mutually_exclusive_group()
    rule.add_argument(
        "--budget", type=budget, metavar="N", help="exactly N tokens per image, or a share of the patches such as 0.25"
    )
    rule.add_argument("--threshold", type=float, metavar="P", help="keep patches with a keep probability of P or more")
    if sample:
        rule.add_argument(
            "--sample", type=whole(0, 2**63 - 1), metavar="SEED", help="draw patches by their keep probability"
        )
    rule.add_argument("--psnr", type=float, metavar="DB", help="as few tokens as reach this quality; slower")
    group.add_argument("--max-tokens", type=whole(1, LARGEST), metavar="N", help="at most N tokens per image")
    group.add_argument(
        "--places", choices=["map", "lattice", "free"], help="allowed keep masks (default: the tokenizer's own)"
    )
    parser.add_argument(
        "--refine",
        type=whole(0, 15),
        default=0,
        metavar="N",
        help="rounds that try other codes for a closer picture; slow: each takes 20 decodings (default: %(default)s)",
    )


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that decide how a picture meets its grid. `shape_options` reads them."""
    group = parser.add_argument_group("shape (--max-patches, --size, --fit keep: for tokenizers of any shape)")
    group.add_argument("--fit", choices=["keep", "crop", "squash", "pad"], help="default: the tokenizer's own")
    group.add_argument("--max-patches", type=whole(64, 4096), metavar="N", help="at most N patches per image")
    group.add_argument(
        "--size", type=size, metavar="HxW", help="height and width of the rectangle to fit, in pixels, such as 256x384"
    )
    group.add_argument(
        "--decoding",
        choices=["full", "scaled"],
        help="scaled: read large JPEG files at a fraction of their size; other codes (default: the tokenizer's own)",
    )


def add_limit_option(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """Add `--max-pixels`. `limit_options` reads it."""
    parser.add_argument(
        "--max-pixels",
        type=whole(1, LARGEST),
        default=argparse.SUPPRESS,  # the number is in dyntok/image.py, which imports PyTorch
        metavar="N",
        help="refuse larger images (default: 67108864)",
    )


def limit_options(options: argparse.Namespace) -> "dict[str, Any]":
    """Returns the option of `add_limit_option` as `encode` takes it."""
    return {"max_pixels": options.max_pixels} if "max_pixels" in options else {}


def size(text: str) -> tuple[int, int]:
    """Read height and width, such as 256x384, or one number for both."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and 0 < int(side) <= LARGEST for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 256x384, height first")
    return int(sides[0]), int(sides[-1])


def size_or_original(text: str) -> "tuple[int, int] | str":
    """Read a size as `size` does, or the word original."""
    return text if text == "original" else size(text)


def shape_options(options: argparse.Namespace) -> "dict[str, Any]":
    """Returns the options of `add_shape_options` as `encode` takes them."""
    return {name: getattr(options, name) for name in ("fit", "max_patches", "size", "decoding")}


def budget(text: str) -> int | float:
    """Read a number of tokens, or a share of the patches such as 0.25."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of tokens nor a share such as 0.25") from None


def whole(low: int, high: int) -> Callable[[str], int]:
    """Returns a function that reads whole numbers from `low` to `high`."""

    def read(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return read


def json_object(text: str) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return values


def names(text: str) -> list[str]:
    """Read names separated by commas; spaces around them do not count."""
    return [name.strip() for name in text.split(",")]


def keep_options(options: argparse.Namespace) -> "KeepOptions":
    """Returns the options of `add_policy_options` as `encode` takes them."""
    return {
        "budget": options.budget,
        "threshold": options.threshold,
        "sample": options.sample,
        "max_tokens": options.max_tokens,
        "psnr": options.psnr,
        "places": options.places,
    }


def print_json(values: Any) -> None:
    print(json.dumps(values))


def report(text: str, *, to_stderr: bool) -> None:
    """Print a line for people: to stderr if stdout carries data."""
    print(text, file=sys.stderr if to_stderr else sys.stdout)
