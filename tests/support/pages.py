"""The documentation's pages, their code blocks, and a session that runs the blocks of a page from top to bottom."""

import ast
import contextlib
import doctest
import io
import re
import subprocess
import tokenize
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dyntok
from dyntok.cli.main import main

ROOT = Path(dyntok.__file__).parents[1]
FOLDER = ROOT / "docs"
OUTSIDE = ("README.md", "kernels/README.md", "dyntok/pretrained/tiny/README.md", "examples/tiny_any_to_any/README.md")
PAGES = [path for path in [*(ROOT / name for name in OUTSIDE), *sorted(FOLDER.glob("*.md"))] if path.exists()]

_BLOCK = re.compile(
    r"(?:^ *<!-- not run: (?P<reason>[^\n]+?) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_OUTPUT = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    page: str
    line: int  # of its first line of code
    language: str
    code: str
    reason: str | None  # why it is not run

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Returns every fenced block of a page, dedented."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        indent = len(match["indent"])
        code = "\n".join(line[indent:] for line in match["code"].splitlines()) + "\n"
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(page.relative_to(ROOT).as_posix(), line, match["language"], code, match["reason"]))
    return found


def commands(block: Block) -> list[tuple[str, str]]:
    """Returns (command line, expected output) pairs; blocks of the language `sh` show no output."""
    if block.language == "sh":
        joined = block.code.replace("\\\n", " ")
        return [(line, "...") for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    pairs = []
    for piece in re.split(r"^\$ ", block.code, flags=re.MULTILINE)[1:]:
        command, _, output = piece.partition("\n")
        pairs.append((command, output or "..."))
    return pairs


def arguments(command: str) -> list[str]:
    """Expands a command line as bash does."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


@dataclass
class Session:
    """Runs blocks one after another, in the current folder and with the same names, as a reader does."""

    names: dict[str, Any] = field(default_factory=dict)

    def run(self, block: Block) -> None:
        """Raises `AssertionError` if a block shows another output than it has."""
        if block.language == "python":
            self._python(block)
        elif block.language in ("sh", "console"):
            for command, output in commands(block):
                name, *rest = arguments(command)
                assert name == "dyntok", f"{block}: {name} is not run here; mark the block"
                text = io.StringIO()
                with contextlib.redirect_stdout(text):
                    assert main(rest) == 0, f"{block}: {command} failed"
                _compare(f"{block}: {command}", _without_numbers(output), _without_numbers(text.getvalue()))

    def _python(self, block: Block) -> None:
        tree, comments = ast.parse(block.code), _comments(block.code)
        for statement in ast.increment_lineno(tree, block.line - 1).body:
            text = io.StringIO()
            with contextlib.redirect_stdout(text):
                exec(compile(ast.Module([statement], []), block.page, "exec"), self.names)
            if _is_print(statement):
                shown = _shown(comments, statement.end_lineno - block.line + 1)
                assert shown, f"{block.page}:{statement.lineno}: print without its output as a comment"
                _compare(f"{block.page}:{statement.lineno}", shown, text.getvalue())


def _comments(code: str) -> dict[int, str]:
    """Returns the comments of some code by the number of their line."""
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return {token.start[0]: token.string.removeprefix("# ") for token in tokens if token.type == tokenize.COMMENT}


def _shown(comments: dict[int, str], line: int) -> str:
    """Returns the output that a comment shows: at the end of the line, or on the lines after it."""
    if line in comments:
        return comments[line]
    lines = []
    while line + 1 + len(lines) in comments:
        lines.append(comments[line + 1 + len(lines)])
    return "\n".join(lines)


def _is_print(statement: ast.stmt) -> bool:
    call = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "print"


def _without_numbers(text: str) -> str:
    """Counts and times differ from machine to machine; what a command prints is compared without them."""
    return re.sub(r"\d[\d.,]*", "0", text)


def _compare(where: str, expected: str, got: str) -> None:
    expected, got = expected.strip() + "\n", got.strip() + "\n"
    assert doctest.OutputChecker().check_output(expected, got, _OUTPUT), f"{where}\nshown:\n{expected}\ngot:\n{got}"
