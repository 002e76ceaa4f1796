"""The drawing of the folders in CONTRIBUTING.md: it has every file, and no others."""

from pathlib import Path

import pytest

import dyntok

ROOT = Path(dyntok.__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the package was installed without its checkout")


def drawn():
    """Returns path -> purpose of every line of the drawing."""
    found, folders = {}, []
    for line in PAGE.read_text(encoding="utf-8").partition("```text\n")[2].partition("```")[0].splitlines():
        name, _, purpose = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 4
        folders[depth:] = [name.rstrip("/")]
        found["/".join(folders)] = purpose.strip()
    return found


def test_the_drawing_has_every_file_with_its_purpose():
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in ("dyntok", "kernels", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml") and path.name != "__init__.py" and "egg-info" not in str(path)
    }
    files.add("dyntok/__init__.py")
    drawing = drawn()
    assert {path for path in drawing if "." in path.rsplit("/", 1)[-1]} == files
    assert [path for path, purpose in drawing.items() if len(purpose) < 3] == []


def test_every_folder_of_the_drawing_exists():
    folders = [path for path in drawn() if "." not in path.rsplit("/", 1)[-1]]
    assert "dyntok/model" in folders and all((ROOT / path).is_dir() for path in folders)
