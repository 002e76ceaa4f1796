"""What `import dyntok` gives and costs, and what a wheel holds."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import dyntok

ROOT = Path(dyntok.__file__).parents[1]
PUBLIC = {
    "CheckpointError",
    "CodeError",
    "ConfigError",
    "DynamicVisualTokenizer",
    "DyntokError",
    "Encoding",
    "Features",
    "FingerprintError",
    "ImageError",
    "KeepPolicy",
    "TokenizerConfig",
    "VisualVocab",
    "example_image",
    "list_models",
    "load",
}
OPTIONAL = [
    "triton",
    "transformers",
    "ray",
    "pyarrow",
    "accelerate",
    "timm",
    "matplotlib",
    "scipy",
    "skimage",
    "sklearn",
]


def test_the_names_are_these():
    names = {name for name in dyntok.__all__ if not name.startswith("_")}
    assert names == PUBLIC
    assert all(getattr(dyntok, name).__doc__ for name in PUBLIC)


def test_type_checkers_see_the_same_names():
    """The names under TYPE_CHECKING and the table of lazy names agree."""
    tree = ast.parse((ROOT / "dyntok" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.name: node.module for node in block.body for alias in node.names if alias.name == alias.asname}
    assert seen == {name: f"dyntok.{home}" for name, home in dyntok._HOMES.items()}


def test_every_error_is_a_dyntok_error():
    errors = [getattr(dyntok, name) for name in PUBLIC if name.endswith("Error")]
    assert len(errors) == 6 and all(issubclass(error, dyntok.DyntokError) for error in errors)
    assert issubclass(dyntok.ImageError, ValueError) and issubclass(dyntok.CheckpointError, OSError)


def test_importing_loads_nothing_optional_and_wakes_no_device():
    code = f"import sys, dyntok, torch; print([m for m in {OPTIONAL} if m in sys.modules], torch.cuda.is_initialized())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"


def test_the_wheel_holds_two_packages_and_their_data(tmp_path):
    """Built from a copy, so that nothing is left in the working tree."""
    pytest.importorskip("setuptools")  # a virtual environment of Python 3.12 and newer begins without it
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("dyntok", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"dyntok", "dyntok_kernels"}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dyntok").rglob("*.*") if path.suffix != ".pyc"}
    assert "dyntok/assets/astronaut.jpg" in expected and expected <= set(names)
    assert {"dyntok/py.typed", "dyntok_kernels/py.typed"} <= set(names)
    (metadata,) = (message_from_bytes(archive.read(name)) for name in names if name.endswith("/METADATA"))
    assert metadata["Version"] == dyntok.__version__ and metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown" and "# dyntok" in str(metadata.get_payload())
    extras = {
        "train",
        "diffusion",
        "export",
        "transformers",
        "batch",
        "ray",
        "s3",
        "litdata",
        "energon",
        "vllm",
        "sglang",
        "docs",
        "test",
        "dev",
    }
    assert set(metadata.get_all("Provides-Extra")) == extras
    needed = [line for line in metadata.get_all("Requires-Dist") if not line.startswith("dyntok[")]
    assert [line for line in needed if ">=" not in line.partition(";")[0]] == []  # every package has a lower limit
    minors = {line.rsplit(".", 1)[1] for line in metadata.get_all("Classifier") if "Python :: 3." in line}
    assert minors == {"10", "11", "12", "13"} and metadata["Keywords"]
    (entry_points,) = (archive.read(name).decode() for name in names if name.endswith("/entry_points.txt"))
    assert "dyntok = dyntok.cli.main:main" in entry_points
