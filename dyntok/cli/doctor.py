"""The command `doctor`: what this machine is, and whether it makes the golden codes.

Its exit code is 1 where an operation fails or codes differ beyond rounding.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyntok.cli.arguments import (
    FAILED,
    OK,
    add_command,
    add_device_option,
    add_json_option,
    add_model_option,
    print_json,
)

if TYPE_CHECKING:
    from dyntok.cli.arguments import Commands


def add_doctor(commands: "Commands") -> None:
    """Add the command `doctor`."""
    add = add_command(
        commands,
        "doctor",
        _doctor,
        summary="Check this machine.",
        details="Shows versions, devices and kernels, and compares codes of eleven pictures with golden ones.",
        example="dyntok doctor --device cuda",
    )
    add_model_option(add)
    add_device_option(add)
    add_json_option(add)
    add.add_argument("--golden", type=Path, metavar="FILE", help="golden codes (default: those of the bundled flex)")
    add.add_argument(
        "--write-golden", type=Path, metavar="FILE", help="write the codes of this machine as golden ones, and stop"
    )


def _doctor(options: argparse.Namespace) -> int:
    from dyntok import load
    from dyntok.golden import GOLDEN, compare, write

    tokenizer = load(options.model, device=options.device)
    if options.write_golden is not None:
        write(tokenizer, options.write_golden)
        print(f"wrote {options.write_golden}: golden codes of the tokenizer {tokenizer.fingerprint}")
        return OK
    from dyntok import machine

    facts: dict[str, Any] = {
        "versions": machine.versions(),
        "devices": machine.devices(),
        "instructions": machine.instructions(),
        "kernels": machine.kernels(tokenizer.device),
    }
    failed = [name for name, form in facts["kernels"].items() if form.startswith("fails")]
    compared = None if failed else compare(tokenizer, options.golden or GOLDEN)
    facts["golden"] = None if compared is None else [vars(one) for one in compared]
    unexplained = [one.name for one in compared or [] if not one.explained]
    if options.json:
        print_json({**facts, "fingerprint": tokenizer.fingerprint, "device": str(tokenizer.device)})
        return FAILED if failed or unexplained else OK
    for title in ("versions", "devices", "instructions", "kernels"):
        print(f"{title}:")
        for name, value in facts[title].items():
            print(f"  {name:<18}{_in_words(value)}")
    print(f"golden codes of {tokenizer.fingerprint}, on {tokenizer.device}:")
    if failed:
        print("  not compared, because operations fail")
    elif compared is None:
        print("  the golden codes are of another tokenizer; `dyntok doctor --write-golden FILE` makes such codes")
    for one in compared or []:
        result = "equal" if not one.differing else f"{one.differing} of {one.tokens} tokens differ"
        print(f"  {one.name:<18}{result} (close: {one.close_codes:.1%} of codes, {one.close_choices:.1%} of patches)")
    if unexplained:
        print(f"differences beyond rounding in {', '.join(unexplained)}: codes of this machine are not those of others")
    return FAILED if failed or unexplained else OK


def _in_words(value: str | bool) -> str:
    return value if isinstance(value, str) else ("yes" if value else "no")
