"""What a type checker sees of the public names, in a small program of a user."""

import subprocess
import sys
from pathlib import Path

import pytest

import dyntok

ROOT = Path(dyntok.__file__).parents[1]
SCRIPT = Path(__file__).with_name("user_script.py")


def check(path):
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_a_users_program_has_the_types_that_it_states(tmp_path):
    pytest.importorskip("mypy")
    done = check(SCRIPT)
    assert str(SCRIPT.relative_to(ROOT)) not in done.stdout, done.stdout
    assert "source file" in done.stdout, done.stderr
    wrong = tmp_path / "wrong.py"
    wrong.write_text(SCRIPT.read_text().replace("enc.codes, list[Tensor]", "enc.codes, list[int]"))
    done = check(wrong)
    assert done.returncode == 1 and 'not "list[int]"' in done.stdout
