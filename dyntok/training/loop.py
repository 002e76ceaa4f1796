"""The training loop: stages, optimizer, k-means, checkpoints; through `accelerate` on one CPU, one GPU or many.

A run's folder holds `lock` (see `folder.py`), `log.jsonl` (see `log.py`), and from the first checkpoint on `state.pt`,
from which the run resumes (see `state.py`), and `tokenizer/`, an ordinary checkpoint. With validation, `best/` is the
one that was best at it.
"""

import dataclasses
import functools
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object
from torch import Tensor

from dyntok.checkpoint import format as checkpoint
from dyntok.errors import CheckpointError, DyntokError
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.training.average import WeightAverage
from dyntok.training.codebook import gather_rows_of_ranks
from dyntok.training.crops import Crops
from dyntok.training.data import held_out, open_data
from dyntok.training.display import Display, closing_line, opening_line
from dyntok.training.folder import own
from dyntok.training.log import StepAverages, append_line, open_log
from dyntok.training.objective import Objective, StepResult
from dyntok.training.optimizer import Optimizer
from dyntok.training.pca_init import pca_init
from dyntok.training.precision import supports_bf16
from dyntok.training.recipe import Recipe
from dyntok.training.schedule import Schedule
from dyntok.training.stage import Stage
from dyntok.training.start import first_tokenizer
from dyntok.training.state import check_same_run, describe_run, read_state, write_state
from dyntok.training.teacher import TeacherFeatures
from dyntok.training.trackers import check_trackers, finish_trackers, start_trackers, track
from dyntok.training.validation import quality, validate

_PCA_BATCHES = 8
_KMEANS_VECTORS_PER_CODE = 16
_CODEBOOK_DECAY = 0.98
_GIVE_UP = 20  # steps in a row whose gradient is not finite
_log = logging.getLogger(__name__)


class Trainer:
    """One run of a recipe in a folder. Nothing is written before `run()`, which resumes from the folder's checkpoint.

    tokenizer: start from these weights instead of random ones. Where it is configured as the recipe wants, it is
        trained itself; otherwise a new tokenizer takes what fits (see `start.py`).
    cpu: do not use a GPU.

    Raises `ConfigError` if recipe and tokenizer do not fit, `DataError` if there are no images, `CheckpointError` if
    the folder holds a run of another recipe.
    """

    def __init__(
        self, recipe: Recipe, folder: str | Path, *, tokenizer: DynamicVisualTokenizer | None = None, cpu: bool = False
    ) -> None:
        self.recipe, self.folder = recipe, Path(folder)
        # a batch need not use every parameter: masks without gradient, images without positions, frozen parts
        options = DistributedDataParallelKwargs(find_unused_parameters=True)
        check_trackers(recipe.trackers)
        self.accelerator = Accelerator(
            mixed_precision="no", cpu=cpu or _is_rank_without_gpu(), kwargs_handlers=[options],
            log_with=list(recipe.trackers) or None, project_dir=self.folder,
        )  # fmt: skip
        self.schedule = Schedule(recipe.stages, recipe.batch_size * recipe.accumulate * self.accelerator.num_processes)
        crops = Crops(
            recipe.config.image, recipe.batch_size, recipe.seed, recipe.min_crop,
            self.accelerator.process_index, self.accelerator.num_processes, recipe.grids,
        )  # fmt: skip
        self.data, left_out = open_data(recipe, crops)
        self.validation = held_out(recipe) if recipe.validate_every else []
        self._best = -math.inf  # quality of the best weights so far
        self._run = describe_run(recipe, self.data.keys, self.schedule.images_per_step, self.accelerator.num_processes)
        self._read = _stamp(self.folder / "state.pt")
        state = read_state(self.folder / "state.pt")
        if state is not None:
            check_same_run(self.folder / "state.pt", state, self._run)
        self.step = state["step"] if state else 0  # of the whole run
        steps = set(gather_object([self.step]))
        if len(steps) > 1:
            raise CheckpointError(
                f"processes of this run found checkpoints of different steps in {self.folder} ({sorted(steps)}); use a "
                "folder that all machines share, and start no second run into it"
            )
        self.autocast_dtype = self._choose_dtype()
        where = self.accelerator.device.type, self.accelerator.num_processes, self.autocast_dtype
        opening = opening_line(recipe, self.schedule, self.step, self.data.extent, self.folder, *where)
        for line in [opening, *left_out]:
            self.accelerator.print(line, flush=True)

        torch.manual_seed(recipe.seed)
        given = tokenizer is not None
        tell = functools.partial(self.accelerator.print, flush=True)
        tokenizer, has_codes = first_tokenizer(recipe, tokenizer, resuming=state is not None, tell=tell)
        if recipe.pca_init and not given and state is None:
            pca_init(tokenizer, islice(self.data.batches(0), _PCA_BATCHES))
        image = tokenizer.config.image
        teacher = TeacherFeatures(recipe.teacher, image.mean, image.std) if recipe.teacher.name else None
        self.objective = Objective(tokenizer, teacher)
        self.quantizing = has_codes and recipe.stages[0].quantize
        self._unusable = 0  # steps in a row
        self._build()
        self.average = WeightAverage(tokenizer, recipe.ema) if recipe.ema else None
        if state is not None:
            self._load(state)

    def _choose_dtype(self) -> torch.dtype:
        device, wanted = self.accelerator.device, self.recipe.precision
        if wanted == "bf16" and not supports_bf16(device):
            self.accelerator.print(f"precision bf16 is slow on this {device.type}, using fp32 instead", flush=True)
        fast = torch.tensor([wanted != "fp32" and supports_bf16(device)], device=device)
        # ranks on other machines may find otherwise, but all must take the same steps
        return torch.bfloat16 if bool(self.accelerator.gather(fast).all()) else torch.float32

    def _build(self) -> None:
        recipe, stages = self.recipe, self.recipe.stages
        for stage in stages:
            self.objective.set_stage(stage)  # refuses now what would fail hours later
        # data-parallel training decides once what is trained: include what the first stage freezes
        self.objective.set_stage(dataclasses.replace(stages[0], freeze=()))
        named = [(name, p) for name, p in self.objective.named_parameters() if not name.startswith("teacher.")]
        options = {"lr": stages[0].lr, "weight_decay": recipe.weight_decay}
        self.optimizer = Optimizer(named, recipe.optimizer, dtype=self.autocast_dtype, **options)
        self.model = self.accelerator.prepare_model(self.objective)
        self.objective.set_stage(stages[0])

    def _load(self, state: dict) -> None:
        path = self.folder / "state.pt"
        try:
            missing, unexpected = self.objective.load_state_dict(state["objective"], strict=False)
            wrong = [name for name in (*missing, *unexpected) if not name.startswith("teacher.")]
            if wrong:
                raise KeyError(f"{len(wrong)} tensors missing or not expected: {', '.join(wrong[:5])}")
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                self.average.load(state["average"] or self.objective.tokenizer.state_dict())
        except (RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path} does not fit this recipe: {error}; train into another folder") from error
        self.quantizing = state["quantizing"]
        self._best = -math.inf if state["best"] is None else state["best"]

    def run(self) -> None:
        """Trains to the end of the recipe.

        Raises `CheckpointError` if the folder can't be written or another run is or has been writing there, `DataError`
        if no images can be read.
        """
        if not self.accelerator.is_main_process:
            return self._run_to_end()
        with own(self.folder):
            if _stamp(self.folder / "state.pt") != self._read:
                message = f"another run has trained into {self.folder} meanwhile; run the same command again"
                raise CheckpointError(message)
            self._run_to_end()

    def _run_to_end(self) -> None:
        if self.accelerator.is_main_process:
            open_log(self.folder / "log.jsonl", self.step)
        start_trackers(self.accelerator, self.recipe.to_dict())
        size, main = self.schedule.images_per_step, self.accelerator.is_main_process
        display = Display(self.schedule.total_images, self.step * size, enabled=main)
        try:
            self._train(display)
        finally:
            display.close()
        finish_trackers(self.accelerator)
        fingerprint, unreadable = self.save(), len(self.data.unreadable)
        display.note(closing_line(self.recipe, self.folder, fingerprint, unreadable, display.elapsed))

    def _train(self, display: Display) -> None:
        averages = StepAverages(self.accelerator, len(self.objective.tokenizer.codebook.embedding))
        saved = reported = time.monotonic()
        since, current = self.step, None
        for batches in self.batches(self.step, self.schedule.total_steps):
            stage, step = self.schedule.locate(self.step)
            if stage is not current:
                current = stage
                self.objective.set_stage(stage)
            if step == 0 and self.objective.bank is not None:
                self.objective.bank.clear()
            if stage.quantize and not self.quantizing:
                display.note(f"starting the codebook by k-means on {self.kmeans_vectors:,} vectors")
                self._kmeans()
            result = self.train_step(batches, stage, step)
            self.step += 1
            averages.add(result)
            display.advance(self.schedule.images_per_step, stage.name, result.summary)
            now, ended = time.monotonic(), self.step == self.schedule.total_steps
            if self.step % self.recipe.log_every == 0 or ended:
                speed = (self.step - since) * self.schedule.images_per_step / (now - reported)
                self._report(stage, averages.collect(self.data.unreadable) | {"images_per_second": speed})
                since, reported = self.step, now
            if self.recipe.validate_every and (self.step % self.recipe.validate_every == 0 or ended):
                self._validate(stage, display)
            due = now - saved >= 60 * self.recipe.save_minutes
            by_steps = self.recipe.save_every and self.step % self.recipe.save_every == 0
            if (due or by_steps or step + 1 == self.schedule.steps(stage)) and not ended:
                self.save()
                saved = now

    def _report(self, stage: Stage, figures: dict[str, float]) -> None:
        """Writes a line of the log."""
        images = self.step * self.schedule.images_per_step
        line = {"stage": stage.name, "step": self.step, "images": images, **figures}
        if self.accelerator.is_main_process:
            append_line(self.folder / "log.jsonl", line)
        track(self.accelerator, line)

    def _validate(self, stage: Stage, display: Display) -> None:
        """Measures on the main process, and keeps the weights in `best` if they are the best so far.

        Stages before the codebook is started are not measured.
        """
        without_codes = not self.quantizing and any(stage.quantize for stage in self.recipe.stages)
        if without_codes or not self.accelerator.is_main_process:
            return
        tokenizer = self.objective.tokenizer
        figures = validate(tokenizer, self.validation, None if self.average is None else self.average.values)
        self._report(stage, figures)
        reached = quality(figures)
        if reached > self._best:
            self._best = reached
            checkpoint.save(self.folder / "best", tokenizer.config, self._result())
        shown = ", ".join(f"{name.removeprefix('validation_')} {value:.4g}" for name, value in figures.items())
        display.note(f"validation after step {self.step}: {shown}; best {self._best:.4g}")

    def batches(self, first: int, last: int) -> Iterator[list[Tensor]]:
        """Yields this rank's batches of each of the steps `first` to `last`.

        Raises `DataError` if no images can be read.
        """
        workers, count = self.recipe.workers, self.recipe.accumulate
        dataset, sampler = self.data.for_loader(first * count, last * count)
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=None, sampler=sampler, num_workers=workers,
            prefetch_factor=4 if workers else None,
        )  # fmt: skip
        step: list[Tensor] = []
        for pixels in self.data.from_loader(loader, workers):
            step.append(pixels)
            if len(step) == count:
                yield step
                step = []

    def autocast(self) -> torch.autocast:
        dtype = self.autocast_dtype
        return torch.autocast(self.accelerator.device.type, dtype, enabled=dtype != torch.float32)

    def train_step(self, batches: Sequence[Tensor], stage: Stage, step: int) -> StepResult:
        """Takes one step on batches of normalized pixels [B, 3, H, W], whose gradients are averaged.

        A step whose gradient is not finite is skipped. Raises `DyntokError` after many of them in a row.
        """
        self.model.train()
        factor = self.schedule.lr_factor(stage, step)
        results = []
        for i, pixels in enumerate(batches):
            last = i + 1 == len(batches)
            with nullcontext() if last else self.accelerator.no_sync(self.model):  # ranks exchange gradients once
                results.append(self._add_gradients(pixels, self.step * len(batches) + i, len(batches)))
        result = StepResult.of(results)
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), 1.0)
        result.metrics["grad"] = norm.detach()
        usable = bool(norm.isfinite())  # the same on every rank
        if usable:
            self.optimizer.step(stage.lr * factor)
            if result.pictures is not None:
                self.objective.bank.add(*result.pictures)
        self.optimizer.zero_grad()
        if not usable:
            self._skip(result)
        elif result.codes is not None and "codebook" not in stage.freeze:
            generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
            trainer, codebook = self.objective.codebook_trainer, self.objective.tokenizer.codebook
            # as the weights settle, rows are averaged over more vectors
            trainer.decay = 1 - (1 - _CODEBOOK_DECAY) * max(factor, 0.1)
            revived = trainer.update(codebook, result.vectors, result.codes, generator)
            result.metrics["revived"] = torch.tensor(float(revived))
        if usable and self.average is not None:
            self.average.update(self.objective.tokenizer, self.step)
        self._unusable = 0 if usable else self._unusable
        return result

    def _add_gradients(self, pixels: Tensor, number: int, count: int) -> StepResult:
        """Adds the gradients of the run's batch of that number, as one of `count`."""
        # every batch has a seed of its own, so that a resumed run draws what an uninterrupted one would
        seed = (self.recipe.seed * 1_000_003 + number) * 1_009
        torch.manual_seed(seed)
        draw = self.objective.draw()  # the same on all ranks, so that none waits for another kind of mask
        torch.manual_seed(seed + 1 + self.accelerator.process_index)
        with self.autocast():
            result: StepResult = self.model(pixels.to(self.accelerator.device), draw)
        self.accelerator.backward(result.loss / count)
        return result

    def _skip(self, result: StepResult) -> None:
        self._unusable += 1
        _log.warning("step %d skipped: its gradient is not finite (loss %g)", self.step, result.loss.item())
        if self._unusable >= _GIVE_UP:
            raise DyntokError(
                f"the gradients of {_GIVE_UP} steps in a row were not finite, the last at step {self.step}; lower the "
                f"learning rate, or set precision: fp32. The last checkpoint is in {self.folder}"
            )

    @property
    def kmeans_vectors(self) -> int:
        """Returns the number of vectors from which k-means starts the codebook."""
        return _KMEANS_VECTORS_PER_CODE * len(self.objective.tokenizer.codebook.embedding)

    def code_vectors(self, first: int) -> Iterator[Tensor]:
        """Yields the vectors [T, C], of all ranks, that the run's batches from number `first` on would quantize."""
        for number, pixels in enumerate(self.data.batches(first), first):
            torch.manual_seed(self.recipe.seed * 1_000_003 + number)
            with self.autocast():
                yield gather_rows_of_ranks(self.objective.code_vectors(pixels.to(self.accelerator.device)))

    def _kmeans(self) -> None:
        """Starts the codebook from the vectors of the next batches."""
        vectors: list[Tensor] = []
        for found in self.code_vectors(self.step * self.recipe.accumulate):
            vectors.append(found)
            if sum(map(len, vectors)) >= self.kmeans_vectors:
                break
        generator, codebook = torch.Generator().manual_seed(self.recipe.seed), self.objective.tokenizer.codebook
        start = torch.cat(vectors)[: self.kmeans_vectors]
        self.objective.codebook_trainer.start(codebook, start, generator=generator)
        self.quantizing = True

    def _result(self) -> dict[str, Tensor]:
        """Returns the weights that the run is about: their average, where the recipe wants one."""
        return self.objective.tokenizer.state_dict() if self.average is None else self.average.values

    def save(self) -> str:
        """Writes `tokenizer/` and `state.pt`, and returns the tokenizer's fingerprint ("" on other ranks).

        Raises `CheckpointError` if they can't be written.
        """
        if not self.accelerator.is_main_process:
            return ""
        tokenizer = self.objective.tokenizer
        # before the state: a run killed in between resumes from the old state, and writes both again
        fingerprint = checkpoint.save(self.folder / "tokenizer", tokenizer.config, self._result())
        weights = {name: v for name, v in self.objective.state_dict().items() if not name.startswith("teacher.")}
        state = {"step": self.step, "quantizing": self.quantizing, "objective": weights}
        state |= {"optimizer": self.optimizer.state_dict(), "run": self._run}
        state |= {"average": None if self.average is None else self.average.values, "best": self._best}
        write_state(self.folder / "state.pt", state)
        self._read = _stamp(self.folder / "state.pt")
        return fingerprint


def _is_rank_without_gpu() -> bool:
    """Accelerate lets processes on CPUs find each other only if it is told to use CPUs.

    A Mac's GPU can't be shared by ranks, so they train on its CPU.
    """
    several = "LOCAL_RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    device = torch.accelerator.current_accelerator(check_available=True)
    return several and (device is None or device.type == "mps")


def _stamp(path: Path) -> tuple[int, int] | None:
    """Returns what changes when a file is written anew; None without a file."""
    if not path.exists():
        return None
    found = path.stat()
    return found.st_mtime_ns, found.st_size
