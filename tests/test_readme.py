"""What the README says: its Python runs, and no placeholder is left in it."""

import re
from pathlib import Path

import pytest
from PIL import Image

import dyntok

ROOT = Path(dyntok.__file__).parents[1]
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="the package was installed without its README")


def test_the_ten_lines_run(tmp_path, monkeypatch, capsys):
    code = re.search(r"## Ten lines\n\n```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    (tmp_path / "dyntok").symlink_to(ROOT / "dyntok")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert Image.open(tmp_path / "again.png").size == (128, 128)
    assert len(names["short"].codes[0]) == 48 and names["ids"][0] == 32000 and names["mask"].all()
    assert str(names["enc"].positions[0]) in capsys.readouterr().out


def test_no_placeholder_is_left():
    for page in (README, ROOT / "dyntok" / "pretrained" / "tiny" / "README.md"):
        assert not re.findall(r"\{[A-Za-z_]+\d*\}", page.read_text()), page


def test_every_file_is_listed():
    text = README.read_text()
    assert [path.name for path in (ROOT / "dyntok").glob("*.py") if path.name != "__init__.py" and f"{path.name}`" not in text] == []
