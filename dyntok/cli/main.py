"""The command `dyntok`: its parser, and the dispatch to the commands.

Exit codes: 0 success; 1 a `DyntokError`, printed as one line on stderr; 2 wrong usage; 3 success, but some images were
skipped; 130 interrupted. Each command imports what it needs when it runs, so `dyntok --help` stays fast.
"""

import argparse
import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator, Sequence

from dyntok import __version__
from dyntok.cli import batch, codes, doctor, evaluate, inspect, models, page, sheets, train
from dyntok.cli.arguments import FAILED, INTERRUPTED, OK
from dyntok.errors import DyntokError

GROUPS = {
    "images": ("demo", "encode", "decode", "show"),
    "browser": ("page", "serve"),
    "datasets": ("batch", "inspect"),
    "tokenizers": ("info", "doctor", "eval", "train", "import-lavit"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    with _streams():
        return _run(build_parser().parse_args(arguments))


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """Sends what is printed nowhere where standard output or error is closed, and escapes what it can't encode.

    Python would print the messages of a closed standard error to standard output. File names may hold any characters,
    and the encoding of a terminal or pipe need not have them.
    """
    with contextlib.ExitStack() as stack:
        if None in (sys.stdout, sys.stderr):
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(sys.stdout or nowhere))
            stack.enter_context(contextlib.redirect_stderr(sys.stderr or nowhere))
        stdout = sys.stdout
        if isinstance(stdout, io.TextIOWrapper) and stdout.errors == "strict":
            stdout.reconfigure(errors="backslashreplace")
            stack.callback(_restore, stdout)
        yield


def _restore(stdout: io.TextIOWrapper) -> None:
    with contextlib.suppress(OSError, ValueError):  # it is flushed, and its reader may be gone
        stdout.reconfigure(errors="strict")


def _run(options: argparse.Namespace) -> int:
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except DyntokError as error:
        print(f"dyntok: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("dyntok: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has closed it, as `head` does
        _discard_stdout()
        return OK
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"dyntok: can't write: {error.strerror}; free space on the disk, and run again", file=sys.stderr)
        _discard_stdout()
        return FAILED


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the whole command line, from which the CLI reference is generated."""
    parser = argparse.ArgumentParser(
        prog="dyntok",
        usage="dyntok COMMAND ...",
        description="Turn images into short sequences of integers, and back.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dyntok {__version__}")
    commands = parser.add_subparsers(required=True, prog="dyntok", metavar="COMMAND", help=argparse.SUPPRESS)
    sheets.add_demo(commands)
    codes.add_encode(commands)
    codes.add_decode(commands)
    sheets.add_show(commands)
    page.add_page(commands)
    page.add_serve(commands)
    batch.add_batch(commands)
    inspect.add_inspect(commands)
    models.add_info(commands)
    doctor.add_doctor(commands)
    evaluate.add_eval(commands)
    train.add_train(commands)
    models.add_import_lavit(commands)
    parser.epilog = _list_of_commands(commands.choices)
    return parser


def _list_of_commands(commands: "dict[str, argparse.ArgumentParser]") -> str:
    lines = []
    for group, members in GROUPS.items():
        lines.append(f"{group}:")
        lines += [f"  {name:<14}{(commands[name].description or '').splitlines()[0]}" for name in members]
        lines.append("")
    return "\n".join([*lines, "`dyntok COMMAND --help` shows the options and an example."])


def _discard_stdout() -> None:
    """Send what is left in the buffer of stdout nowhere, so that flushing it at exit is no error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
