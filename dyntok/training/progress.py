"""The progress line and `log.jsonl`: averages between two reports, over all ranks."""

import json
import math
import os
import time
from collections import defaultdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from dyntok.errors import CheckpointError
from dyntok.model.codebook import perplexity
from dyntok.training.objective import StepResult


def open_log(path: Path, step: int) -> None:
    """Make the log's file, or drop its lines beyond `step` (they will be written again) and a torn one, atomically.

    Raises `CheckpointError` where the folder can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            file.seek(0)
            lines = file.readlines()
        kept = [line for line in lines if _step_of(line) <= step]
        if len(kept) < len(lines):
            temporary = path.with_suffix(".tmp")
            temporary.write_bytes(b"".join(kept))
            os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(
            f"can't write {path}: {error.strerror or error}; choose a folder that can be written"
        ) from error


def _step_of(line: bytes) -> float:
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


class Progress:
    """Collects results of steps. Every rank must call `report` at the same steps."""

    def __init__(self, accelerator: Accelerator, path: Path, codebook_size: int) -> None:
        self.accelerator, self.path, self.codebook_size = accelerator, path, codebook_size
        self._clear()

    def _clear(self) -> None:
        self.values: dict[str, list[Tensor]] = defaultdict(list)
        self.lengths: list[Tensor] = []
        self.counts = torch.zeros(self.codebook_size, device=self.accelerator.device)
        self.images, self.since = 0, time.perf_counter()

    def add(self, result: StepResult, images: int) -> None:
        for name, value in result.metrics.items():
            self.values[name].append(value)
        self.lengths.append(result.lengths)
        if result.codes is not None:
            self.counts += torch.bincount(result.codes, minlength=self.codebook_size)
        self.images += images

    def report(self, stage: str, step: int, images: int, unreadable: list[int]) -> None:
        """Write and print one line; step and images are those of the whole run, unreadable the indices that this rank met.

        Raises `CheckpointError` where the log can't be written.
        """
        seconds = time.perf_counter() - self.since
        # a batch without known positions has no PSNR, and a step that was left out may have no loss
        finite = {name: [float(v) for v in values if v.isfinite()] for name, values in self.values.items()}
        mine = {
            "values": finite,
            "lengths": torch.cat(self.lengths).tolist(),
            "images": self.images,
            "unreadable": unreadable,
        }
        ranks = gather_object([mine])
        counts = self.accelerator.reduce(self.counts)
        self._clear()
        if not self.accelerator.is_main_process:
            return
        names = dict.fromkeys(name for rank in ranks for name in rank["values"])  # ranks draw masks of different kinds
        merged = {name: [value for rank in ranks for value in rank["values"].get(name, [])] for name in names}
        means = {name: sum(values) / len(values) for name, values in merged.items() if values}
        lengths = torch.tensor([length for rank in ranks for length in rank["lengths"]], dtype=torch.float32)
        unreadable = sorted({index for rank in ranks for index in rank["unreadable"]})
        line = {
            "stage": stage, "step": step, "images": images, **means,
            "tokens": float(lengths.mean()), "tokens_std": float(lengths.std(correction=0)),
            "usage": float((counts > 0).float().mean()), "perplexity": perplexity(counts),
            "images_per_second": sum(rank["images"] for rank in ranks) / seconds,
            **({"unreadable": len(unreadable)} if unreadable else {}),
        }  # fmt: skip
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise CheckpointError(f"can't write {self.path}: {error.strerror or error}") from error
        shown = (
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in line.items()
        )
        self.accelerator.print("  ".join(shown), flush=True)
