"""What a person sees of a training run: a progress bar on a terminal, a line every half minute in a log.

Not here: the record for machines (`log.py`).
"""

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from dyntok.addresses import is_remote
from dyntok.training.recipe import Recipe
from dyntok.training.schedule import Schedule

_FIRST_SECONDS = 10.0  # until the first line, which needs a measured speed
_SECONDS = 30.0  # between two lines


def format_duration(seconds: float) -> str:
    """Returns seconds in words.

    >>> format_duration(42.3), format_duration(754), format_duration(7300)
    ('42 s', '13 min', '2 h 02 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


class Display:
    """Shows how far a run is, how fast it is and when it ends. Other ranks show nothing (`enabled=False`)."""

    def __init__(self, total: int, done: int, *, enabled: bool) -> None:
        self.total, self.done, self.enabled = total, done, enabled
        self._start = self._last = time.monotonic()
        self._since = done  # images at the last line
        self._shown = False
        on_terminal = enabled and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, unit=" images", smoothing=0.1) if on_terminal else None

    def note(self, text: str) -> None:
        """Prints a line at once."""
        if self._bar is not None:
            self._bar.write(text)
        elif self.enabled:
            print(text, flush=True)

    def advance(self, images: int, stage: str, facts: Callable[[], str]) -> None:
        """Counts images that were trained on. facts: gives the latest figures, for people; called only to be shown."""
        self.done += images
        now = time.monotonic()
        if self._bar is not None:
            if now - self._last >= 1:
                self._bar.set_description(stage, refresh=False)
                self._bar.set_postfix_str(facts(), refresh=False)
                self._last = now
            self._bar.update(images)
        elif self.enabled and now - self._last >= (_SECONDS if self._shown else _FIRST_SECONDS):
            rate = (self.done - self._since) / (now - self._last)
            share = f"{self.done:,} of {self.total:,} images ({self.done / self.total:.0%})"
            left = format_duration((self.total - self.done) / rate)
            self.note(f"{share}, {rate:.1f} images/s, {left} left; stage {stage}: {facts()}")
            self._last, self._since, self._shown = now, self.done, True

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start


def opening_line(
    recipe: Recipe,
    schedule: Schedule,
    step: int,
    pictures: str,
    folder: Path,
    device: str,
    processes: int,
    dtype: torch.dtype,
) -> str:
    """Returns what a run is about to do: what is trained, on how many images, where and in which precision."""
    verb = f"resuming at image {step * schedule.images_per_step:,}" if step else "training"
    what = recipe.description or f"a tokenizer with {recipe.config.codebook.size:,} codes"
    stages = f"{len(recipe.stages)} stage{'s' if len(recipe.stages) > 1 else ''}"
    where = f"{device} x {processes}" if processes > 1 else device
    precision = "fp32" if dtype == torch.float32 else "bf16"
    total = f"{schedule.total_images:,} images in {stages}, from {pictures}"
    return f"{verb}: {what}; {total}, on {where} in {precision}, into {folder}"


def closing_line(recipe: Recipe, folder: Path, fingerprint: str, unreadable: int, seconds: float) -> str:
    """Returns what a run has made, where it is, and what to do next."""
    made, data = folder / "tokenizer", " ".join(map(shlex.quote, recipe.data))
    if any(is_remote(source) or source.endswith(".parquet") for source in recipe.data):
        data = "PICTURES"  # `dyntok eval` reads local folders and tars
    left_out = f", {unreadable:,} unreadable images left out" if unreadable else ""
    model = shlex.quote(str(made))
    others = {"train": "validation", "validation": "train"}.get(recipe.split)
    if others:
        measure = f"measure it with `dyntok eval {data} --split {others} --model {model}`"
    else:
        measure = f"no picture was held out, measure it on others with `dyntok eval PICTURES --model {model}`"
    return (
        f"trained in {format_duration(seconds)}{left_out}: {made}, fingerprint {fingerprint}; {measure}, "
        f"use it with dyntok.load({str(made)!r})"
    )
