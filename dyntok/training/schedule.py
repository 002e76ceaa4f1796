"""Which stage each step of a run belongs to, and its learning rate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dyntok.training.stage import Stage


@dataclass(frozen=True)
class Schedule:
    """The stages of a run, counted in steps of `images_per_step` images (of all processes together)."""

    stages: Sequence[Stage]
    images_per_step: int

    @property
    def total_steps(self) -> int:
        return sum(map(self.steps, self.stages))

    @property
    def total_images(self) -> int:
        return self.total_steps * self.images_per_step

    def steps(self, stage: Stage) -> int:
        return -(-stage.images // self.images_per_step)

    def locate(self, step: int) -> tuple[Stage, int]:
        """Returns the stage of a step, and the step's number within it. Raises `IndexError` after the last step."""
        for stage in self.stages:
            if step < self.steps(stage):
                return stage, step
            step -= self.steps(stage)
        raise IndexError("the step is beyond the end of the run")

    def lr_factor(self, stage: Stage, step: int) -> float:
        """Returns the share of `stage.lr` at a step of the stage, 0 to 1: warm-up times decay."""
        warmup = min(1.0, (step + 1) * self.images_per_step / stage.warmup) if stage.warmup else 1.0
        done = step / self.steps(stage)
        if stage.decay == "linear":
            return warmup * (1 - done)
        return warmup * (1 + math.cos(math.pi * done)) / 2 if stage.decay == "cosine" else warmup
