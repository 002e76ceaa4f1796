"""The estimate of `dyntok train --dry-run`: checks a run, times a few steps of each stage, and writes nothing."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from dyntok.errors import CheckpointError
from dyntok.training.codebook import KMEANS_ITERATIONS, VECTORS_PER_SEARCH
from dyntok.training.display import format_duration
from dyntok.training.loop import Trainer

_STEPS = 3  # timed in each stage, after one that is not


@dataclass(frozen=True)
class StageEstimate:
    """What is left of one stage, and how long a step takes."""

    name: str
    steps: int
    seconds_per_step: float

    @property
    def seconds(self) -> float:
        return self.steps * self.seconds_per_step


@dataclass(frozen=True)
class RunEstimate:
    """What is left of a run. kmeans_seconds: for the start of the codebook; 0 if it has been started."""

    stages: tuple[StageEstimate, ...]
    kmeans_seconds: float
    unreadable: int  # images, of those that were drawn
    images_per_step: int

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages) + self.kmeans_seconds

    def table(self) -> str:
        """Returns a line per stage and the total, for people."""
        rows = [
            (stage.name or "-", f"{stage.steps * self.images_per_step:,} images", format_duration(stage.seconds))
            for stage in self.stages
        ]
        rows += [("k-means", "", format_duration(self.kmeans_seconds))] if self.kmeans_seconds else []
        rows.append(("total", "", format_duration(self.seconds)))
        lines = [f"{name:<12}{images:>20}{duration:>14}" for name, images, duration in rows]
        lines += [f"{self.unreadable} of the images drawn could not be read"] if self.unreadable else []
        return "\n".join([*lines, "dry run: nothing was written"])


def estimate(trainer: Trainer) -> RunEstimate:
    """Times a few steps of each stage that is left. The trainer's weights change, so it must not be used afterwards.

    Raises `CheckpointError` if its folder could not be written.
    """
    _check_writable(trainer.folder)
    stages, begin, kmeans_seconds = [], 0, 0.0
    for stage in trainer.recipe.stages:
        steps = trainer.schedule.steps(stage)
        done, begin = min(max(trainer.step - begin, 0), steps), begin + steps
        if done == steps:
            continue
        if stage.quantize and not trainer.quantizing:
            kmeans_seconds = _estimate_kmeans(trainer)
            trainer.quantizing = True
        trainer.objective.set_stage(stage)
        seconds = []
        start = time.perf_counter()
        for batches in trainer.batches(0, _STEPS + 1):
            trainer.train_step(batches, stage, done)
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
        stages.append(StageEstimate(stage.name, steps - done, sum(seconds[1:]) / _STEPS))
    return RunEstimate(tuple(stages), kmeans_seconds, len(trainer.data.unreadable), trainer.schedule.images_per_step)


def _estimate_kmeans(trainer: Trainer) -> float:
    """Returns the seconds to collect the vectors, from one batch, and to search them, from one search."""
    start = time.perf_counter()
    vectors = next(trainer.code_vectors(0))
    collecting = (time.perf_counter() - start) * -(-trainer.kmeans_vectors // len(vectors))
    part = vectors.repeat(-(-VECTORS_PER_SEARCH // len(vectors)), 1)[:VECTORS_PER_SEARCH]
    start = time.perf_counter()
    trainer.objective.tokenizer.codebook(part)
    searching = (time.perf_counter() - start) * KMEANS_ITERATIONS * trainer.kmeans_vectors / len(part)
    return collecting + searching


def _check_writable(folder: Path) -> None:
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise CheckpointError(f"can't write {folder}: {existing} is no folder that can be written; choose another")
