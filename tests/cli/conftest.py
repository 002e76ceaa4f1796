"""Fixtures of the command line tests: a command in this process, photographs as files, a file that is no image."""

import pytest
from PIL import Image

from dyntok.cli.main import main


@pytest.fixture
def run(checkpoint_folder, capsys):
    """Returns a function that runs a command with the small tokenizer and returns (exit code, stdout, stderr)."""

    def run(command, *arguments):
        code = main([command, "--model", str(checkpoint_folder), *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def folder(photos, tmp_path_factory):
    """A folder with three photographs."""
    folder = tmp_path_factory.mktemp("photographs")
    for name, photo in zip(("astronaut", "coffee", "cat"), photos, strict=False):
        Image.fromarray(photo).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def bad(tmp_path):
    """A file with the name of an image that isn't one."""
    path = tmp_path / "bad.jpg"
    path.write_bytes(b"not an image")
    return path
