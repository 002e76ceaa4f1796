"""What the README promises by its form: short, complete, and with links that also work on a package index."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from support.pages import PAGES, ROOT, blocks

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short():
    assert len(README.splitlines()) < 110


def test_it_says_what_a_new_user_asks_first():
    for wanted in (
        "pip install dyntok",
        "git+",
        "make demo",
        "make test",
        "128 x 128",
        "Apache-2.0",
        "@inproceedings{",
    ):
        assert wanted in README


def test_no_placeholder_is_left():
    for page in PAGES:
        assert not re.findall(r"\bTODO\b|\bFIXME\b|\bTBD\b|lorem ipsum", page.read_text(encoding="utf-8")), page


@pytest.mark.parametrize("address", ["https://example.org/dyntok", ""], ids=["address", "no address"])
def test_no_relative_link_reaches_a_package_index(address, tmp_path):
    """`DYNTOK_URL` is the repository's address when a release is built; without it, links become plain text."""
    pytest.importorskip("setuptools")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "dyntok/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "kernels" / "dyntok_kernels").mkdir(parents=True)
    code = "from setuptools import build_meta; print('made', build_meta.prepare_metadata_for_build_wheel('.'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "DYNTOK_URL": address},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    metadata = (tmp_path / done.stdout.rpartition("made ")[2].strip() / "METADATA").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", metadata)
    assert links and all(link.startswith("https://") for link in links)
    assert (
        (f"{address}/raw/HEAD/docs/demo.png" in links)
        == (f"{address}/blob/HEAD/docs/batch.md" in links)
        == bool(address)
    )
    assert (f"Project-URL: Source, {address}" in metadata) == bool(address)
    assert "| encode and decode pictures, choose their length |" in metadata


def test_code_fits_the_width_of_a_page():
    wide = [
        f"{block.page}:{block.line + i}"
        for page in PAGES
        for block in blocks(page)
        if block.language in ("python", "sh", "console", "yaml")
        for i, line in enumerate(block.code.splitlines())
        if len(line) > 90
    ]
    assert wide == []
