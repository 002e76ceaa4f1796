"""What all benchmarks share: timing, and a description of the machine."""

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("timm", "numpy", "Pillow")


def seconds(work: Callable[[], Any], repeats: int = 5, device: str = "cpu") -> tuple[float, float]:
    """Median and spread (max - min) of the seconds of `work()`. On a GPU it is done once before, to be compiled."""
    if not device.startswith("cpu"):
        work()
    times = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times), max(times) - min(times)


def wait(device: str) -> None:
    """Waits until a GPU has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def device_name(device: str) -> str:
    """The model of a GPU, else that of the processor."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()


def environment() -> dict[str, Any]:
    """Returns date, commit, machine, library versions and peak memory of the process so far. Call it after the work."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "date": date.today().isoformat(), "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "processor": processor(), "threads": torch.get_num_threads(), "peak_mib": round(peak / 2**20),
        "python": platform.python_version(), "torch": torch.__version__, **{name: version(name) for name in LIBRARIES},
    }  # fmt: skip


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The model's name, where Linux tells it."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def append(output: Path | None, row: dict[str, Any]) -> None:
    """One more line of JSON, where an output was asked for."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(output, "a") as file:
            file.write(json.dumps(row) + "\n")
