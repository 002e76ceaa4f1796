"""`log.jsonl`: one JSON line per report, with averages over the steps since the last one and over all ranks.

Not here: what a person sees during a run (`display.py`).
"""

import json
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from dyntok.errors import CheckpointError
from dyntok.model.codebook import perplexity
from dyntok.training.objective import StepResult


def open_log(path: Path, step: int) -> None:
    """Creates the log, or removes its lines after `step` and an incomplete last line, atomically.

    A resumed run writes the removed lines again. Raises `CheckpointError` if the log can't be written.
    """
    try:
        with open(path, "a+b") as file:
            file.seek(0)
            lines = file.readlines()
        kept = [line for line in lines if _step_of(line) <= step]
        if len(kept) < len(lines):
            temporary = path.with_suffix(".tmp")
            temporary.write_bytes(b"".join(kept))
            os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"can't write {path}: {reason}; choose a folder that can be written") from error


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Raises `CheckpointError` if the log can't be written."""
    try:
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise CheckpointError(f"can't write {path}: {error.strerror or error}") from error


def _step_of(line: bytes) -> float:
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


class StepAverages:
    """Collects the results of steps on every rank, and averages them."""

    def __init__(self, accelerator: Accelerator, codebook_size: int) -> None:
        self.accelerator, self.codebook_size = accelerator, codebook_size
        self._clear()

    def _clear(self) -> None:
        self.values: dict[str, list[Tensor]] = defaultdict(list)
        self.lengths: list[Tensor] = []
        self.counts = torch.zeros(self.codebook_size, device=self.accelerator.device)

    def add(self, result: StepResult) -> None:
        for name, value in result.metrics.items():
            self.values[name].append(value)
        self.lengths.append(result.lengths)
        if result.codes is not None:
            self.counts += torch.bincount(result.codes, minlength=self.codebook_size)

    def collect(self, unreadable: list[int]) -> dict[str, float]:
        """Returns the averages since the last call. Every rank must call this at the same step.

        unreadable: indices of the images that this rank could not read so far.
        """
        # a batch without known positions has no PSNR, and a step that was skipped may have no finite loss
        finite = {name: [float(v) for v in values if v.isfinite()] for name, values in self.values.items()}
        lengths = torch.cat(self.lengths).tolist()
        ranks = gather_object([(finite, lengths, unreadable)])
        counts = self.accelerator.reduce(self.counts)
        self._clear()
        names = dict.fromkeys(name for values, _, _ in ranks for name in values)  # ranks draw different masks
        merged = {name: [value for values, _, _ in ranks for value in values.get(name, [])] for name in names}
        tokens = torch.tensor([length for _, lengths, _ in ranks for length in lengths], dtype=torch.float32)
        missing = {index for _, _, indices in ranks for index in indices}
        return {
            **{name: sum(values) / len(values) for name, values in merged.items() if values},
            "tokens": float(tokens.mean()),
            "tokens_std": float(tokens.std(correction=0)),
            "usage": float((counts > 0).float().mean()),
            "perplexity": perplexity(counts),
            **({"unreadable": len(missing)} if missing else {}),
        }
