"""What all benchmarks share: the clock, and the machine a figure comes from."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch


def seconds(work: Callable[[], Any], repeats: int = 5) -> tuple[float, float]:
    """Median and spread (max - min) of the seconds of `work()`."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times), max(times) - min(times)


def environment() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "date": date.today().isoformat(), "commit": commit, "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip


def append(output: Path | None, row: dict[str, Any]) -> None:
    """One more line of JSON, where an output was asked for."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(output, "a") as file:
            file.write(json.dumps(row) + "\n")
