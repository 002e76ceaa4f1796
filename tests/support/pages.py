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
                _compare(f"{block}: {command}", output, text.getvalue())

    def _python(self, block: Block) -> None:
        tree = ast.increment_lineno(ast.parse(block.code), block.line - 1)
        comments = {
            token.start[0] + block.line - 1: token.string.removeprefix("#").strip()
            for token in tokenize.generate_tokens(io.StringIO(block.code).readline)
            if token.type == tokenize.COMMENT
        }
        for statement in tree.body:
            text = io.StringIO()
            with contextlib.redirect_stdout(text):
                exec(compile(ast.Module([statement], []), block.page, "exec"), self.names)
            if _is_print(statement):
                where = f"{block.page}:{statement.lineno}"
                assert statement.end_lineno in comments, f"{where}: print without its output as a comment"
                _compare(where, comments[statement.end_lineno], text.getvalue())


def _is_print(statement: ast.stmt) -> bool:
    call = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "print"


def _compare(where: str, expected: str, got: str) -> None:
    expected, got = expected.strip() + "\n", got.strip() + "\n"
    assert doctest.OutputChecker().check_output(expected, got, _OUTPUT), f"{where}\nshown:\n{expected}\ngot:\n{got}"
