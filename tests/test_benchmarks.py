"""What benchmarks write down beside their figures."""

import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import dyntok

ROOT = Path(dyntok.__file__).parents[1]
pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks").exists(), reason="the package was installed without its benchmarks"
)


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def test_figures_name_commit_machine_memory_and_versions(benchmarks, tmp_path, monkeypatch):
    import timing

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    monkeypatch.chdir(tmp_path)
    told = timing.environment()
    assert told["commit"] == commit and 100 < told["peak_mib"] < 1e5
    assert [told[name] for name in ("torch", "timm", "Pillow")] == [
        torch.__version__,
        version("timm"),
        version("Pillow"),
    ]
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nmodel name\t: Example CPU @ 2.00GHz\n\nprocessor\t: 1\nmodel name\t: Another\n"
    )
    assert timing.processor(tmp_path / "cpuinfo") == "Example CPU @ 2.00GHz"
    assert timing.processor(tmp_path / "none")  # the little that Python knows


def test_runs_of_another_model_or_limit_are_not_mixed(benchmarks, tmp_path):
    import table

    output, what = tmp_path / "table.json", {"fingerprint": "ab", "limit": 100}
    assert table.kept_runs(None, what) == table.kept_runs(output, what) == {}
    output.write_text(json.dumps({**what, "runs": {"even": 1}}))
    assert table.kept_runs(output, what) == {"even": 1}
    assert (
        table.kept_runs(output, what | {"limit": None}) == table.kept_runs(output, what | {"fingerprint": "cd"}) == {}
    )
    output.write_text(
        json.dumps({"fingerprint": "ab", "runs": {"even": 1}})
    )  # as it was written before there was a limit
    assert table.kept_runs(output, what) == {} and table.kept_runs(output, what | {"limit": None}) == {"even": 1}
