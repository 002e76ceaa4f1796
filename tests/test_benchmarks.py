"""What benchmarks write down beside their figures."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dyntok

ROOT = Path(dyntok.__file__).parents[1]
pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks").exists(), reason="the package was installed without its benchmarks"
)


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    if not hasattr(sys.modules.get("kernels"), "CASES"):  # the folder kernels/, which another test may have imported
        monkeypatch.delitem(sys.modules, "kernels", raising=False)


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


def test_the_gpu_benchmark_tells_sections_and_failures(benchmarks, monkeypatch):
    import gpu

    def fail(device, scale):
        raise SystemExit("off by 1")

    chosen = {title: gpu.SECTIONS[title] for title in ("A training step", "Same image, same codes")}
    monkeypatch.setattr(gpu, "SECTIONS", {**chosen, "Operations": fail})
    results = gpu.run("cpu", gpu.SMALL)
    assert set(results["sections"]) == set(chosen) and results["failed"] == {"Operations": "SystemExit: off by 1"}
    step, batches = results["sections"].values()
    assert step[0]["images/s"] > 0 and [row["differ"] for row in batches] == [0] * 7
    assert [row["batch_invariant"] for row in batches] == ["True"] * 3 + ["False"] * 3 + ["-"]
    text = gpu.markdown(results)
    assert (
        "## A training step" in text
        and "| fp32 | True | batches of 4 | 4 | 0 | 0 |" in text
        and "Operations failed" in text
    )


def test_rooflines_are_known_for_some_gpus(benchmarks):
    import gpu

    for name in gpu.CASES:
        narrow, wide = (gpu.predicted_ms(name, 64, "NVIDIA H100 80GB HBM3", dtype) for dtype in ("bf16", "fp32"))
        assert 0 < narrow <= wide and gpu.predicted_ms(name, 64, "Example GPU", "bf16") is None


def test_the_pipeline_counts_what_pytorch_counts(benchmarks):
    import roofline

    tokenizer = dyntok.load("tiny")
    stages = roofline.stages(tokenizer)
    pixels, keep = torch.rand(1, 3, 128, 128), (torch.arange(256) % 3 == 0)[None]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        features = tokenizer.backbone(pixels)
    assert stages["backbone"].flops == pytest.approx(counted.get_total_flops(), rel=0.02)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        tokenizer.merger(features, keep)  # without the attention, which is an operation of ours
    assert counted.get_total_flops() < stages["merger"].flops < 1.3 * counted.get_total_flops()
    assert stages["search"].flops == pytest.approx(2 * 256 / 3 * 8192 * 16)


@pytest.mark.slow
def test_the_gpu_benchmark_runs_from_end_to_end_on_a_cpu(tmp_path):
    output = tmp_path / "results" / "gpu"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu.py"),
        "--device",
        "cpu",
        "--small",
        "--output",
        str(output),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(output.with_suffix(".json").read_text())
    assert results["device_name"] and not results["failed"]
    assert len(results["sections"]["Operations"]) == 8 and len(results["sections"]["Encoding"]) == 4
    assert "| tiny | fp32 | learned |" in output.with_suffix(".md").read_text()


def test_operations_are_checked_before_they_are_timed(benchmarks):
    import kernels

    setting = kernels.Setting("cpu", 3)
    lengths = setting.keep().sum(1).tolist()
    assert lengths == sorted(lengths) and lengths[0] < 85 == lengths[1] < lengths[2]
    assert kernels.Setting("cpu", 3, equal=True).keep().sum(1).tolist() == [85] * 3
    found = kernels.measure("compact", setting)
    assert found["off"] == 0 and found["ours_ms"] > 0
    with pytest.raises(SystemExit, match="off by"):
        kernels.check("a sum", torch.ones(3), torch.ones(3) * 1.1, 1e-4)
    with pytest.raises(SystemExit, match="off by"):
        kernels.check("a sum", torch.full((3,), torch.nan), torch.ones(3), 1e-4)


def test_masks_of_a_dictionary_and_both_orders(benchmarks):
    import layouts

    masks = torch.rand(3, 256, generator=torch.Generator().manual_seed(0)) < 0.3
    dictionary = layouts.blocks(masks[:1])[0].unique(dim=0)
    snapped, entries = layouts.snap(masks, dictionary)
    assert torch.equal(snapped[0], masks[0]) and torch.equal(layouts.blocks(snapped), dictionary[entries])
    assert layouts.coverage(masks, masks[:1])["held by 64"] == 1
    encoding = dyntok.Encoding.pack(
        [mask.nonzero()[:, 0] for mask in snapped], [mask.nonzero()[:, 0] for mask in snapped], (16, 16)
    )
    first, between = (layouts.sequences(encoding, entries, 1000, order) for order in (False, True))
    for (ids, is_code), (mixed, mixed_codes), values in zip(first, between, entries, strict=True):
        assert ids[:16].tolist() == (values + 1000).tolist() and not is_code[:16].any() and is_code[16:].all()
        assert sorted(mixed.tolist()) == sorted(ids.tolist()) and not mixed_codes[0]
        counts = torch.diff(torch.cat([(~mixed_codes).nonzero()[:, 0], torch.tensor([len(mixed)])])) - 1
        assert counts.tolist() == dictionary[values].sum(1).tolist()


@pytest.mark.slow
def test_the_figures_of_a_tokenizer(tmp_path):
    if "DYNTOK_DATA" not in os.environ:
        pytest.skip("DYNTOK_DATA names no folder of photographs")
    output = tmp_path / "figures.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "figures.py"), "--limit", "3", "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    only = ["--only", "recognition", "memory", "speed", "lengths"]
    done = subprocess.run([*command, *only], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    forms = [row["form"] for row in rows if row["figure"] == "recognition"]
    each = ["map, with positions", "map, from ids", "lattice", "map, before the codebook"]
    assert forms == ["originals", *each * 2, "codes alone"]
    quality = {(row["form"], row["ids"]): row["psnr"] for row in rows if "psnr" in row}
    for ids in (100, 160):  # the same decoder, with less to guess
        assert quality["map, before the codebook", ids] > quality["map, with positions", ids] + 0.3
    (memory,) = [row["peak_mb"] for row in rows if row["figure"] == "memory"]
    assert 300 < memory < 1500
