"""The tables of engines and loaders: every cell has a test, and every test that is named exists."""

import re

import pytest
from support.pages import FOLDER, ROOT

PAGE = FOLDER / "engines.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the package was installed without its checkout")
NUMBERS = "¹²³⁴⁵⁶⁷⁸⁹"


def table():
    """The rows of the table of engines, cell by cell."""
    text = PAGE.read_text(encoding="utf-8")
    lines = text.partition("| engine | exact budget")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_cell_has_its_test():
    numbered = re.findall(r"^(\d)\. `tests/", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert numbered == [str(i) for i in range(1, len(NUMBERS) + 1)]
    for name, *cells in table():
        assert len(cells) == 7, name
        for cell in cells:
            assert re.fullmatch(rf"(works|shape only)[{NUMBERS}]|no[{NUMBERS}]?", cell), (name, cell)


def test_every_test_that_is_named_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 15
    for path, test in named:
        assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{test}"
