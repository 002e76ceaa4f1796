"""The training loop: stages, optimizer, k-means, checkpoints; through `accelerate` on one CPU, one GPU or many.

A run's folder holds `log.jsonl` (see `log.py`), and from the first checkpoint on `state.pt`, from which the run resumes
(see `state.py`), and `tokenizer/`, an ordinary checkpoint.
"""

import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

from dyntok.checkpoint import format as checkpoint
from dyntok.errors import CheckpointError, ConfigError, DataError, DyntokError
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.training.codebook import gather_rows_of_ranks
from dyntok.training.data import TrainingImages
from dyntok.training.display import Display, closing_line, opening_line
from dyntok.training.log import StepAverages, append_line, open_log
from dyntok.training.objective import Objective, StepResult
from dyntok.training.optimizer import Optimizer
from dyntok.training.pca_init import pca_init
from dyntok.training.precision import best_dtype, supports_bf16
from dyntok.training.recipe import Recipe, differences
from dyntok.training.schedule import Schedule
from dyntok.training.sources import take_inventory
from dyntok.training.stage import Stage
from dyntok.training.state import check_same_run, describe_run, read_state, write_state
from dyntok.training.teacher import TeacherFeatures

_PCA_BATCHES = 8
_KMEANS_VECTORS_PER_CODE = 16
_CODEBOOK_DECAY = 0.98
_GIVE_UP = 20  # steps in a row whose gradient is not finite
_log = logging.getLogger(__name__)


class Trainer:
    """One run of a recipe in a folder. Nothing is written before `run()`, which resumes from the folder's checkpoint.

    tokenizer: start from these weights instead of random ones; they are changed in place.
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
        self.accelerator = Accelerator(mixed_precision="no", cpu=cpu, kwargs_handlers=[options])
        self.schedule = Schedule(recipe.stages, recipe.batch_size * self.accelerator.num_processes)
        inventory = take_inventory(recipe.data, recipe.split)
        self._run = describe_run(recipe, inventory.samples, self.schedule.images_per_step)
        state = read_state(self.folder / "state.pt")
        if state is not None:
            check_same_run(self.folder / "state.pt", state, self._run)
        self.step = state["step"] if state else 0  # of the whole run
        self.autocast_dtype = self._choose_dtype()
        where = self.accelerator.device.type, self.accelerator.num_processes, self.autocast_dtype
        opening = opening_line(recipe, self.schedule, self.step, len(inventory.samples), self.folder, *where)
        for line in [opening, *inventory.report()]:
            self.accelerator.print(line, flush=True)

        torch.manual_seed(recipe.seed)
        given = tokenizer is not None
        if not given:
            tokenizer = self._new_tokenizer(with_weights=state is None)
        elif changes := differences(tokenizer.config.to_dict(), recipe.config.to_dict()):
            raise ConfigError(
                f"the tokenizer to start from differs from the recipe's: {'; '.join(changes[:5])}; "
                "change the recipe's tokenizer"
            )
        image = tokenizer.config.image
        self.data = TrainingImages(
            inventory.samples, image, recipe.batch_size, seed=recipe.seed, min_crop=recipe.min_crop,
            rank=self.accelerator.process_index, world=self.accelerator.num_processes,
        )  # fmt: skip
        if recipe.pca_init and not given and state is None:
            pca_init(tokenizer, torch.cat([self.data.batch(step) for step in range(_PCA_BATCHES)]))
        teacher = TeacherFeatures(recipe.teacher, image.mean, image.std) if recipe.teacher.name else None
        self.objective = Objective(tokenizer, teacher)
        self.quantizing = given and recipe.stages[0].quantize
        self._unusable = 0  # steps in a row
        self._build()
        if state is not None:
            self._load(state)

    def _choose_dtype(self) -> torch.dtype:
        device, wanted = self.accelerator.device, self.recipe.precision
        if wanted == "bf16" and not supports_bf16(device):
            self.accelerator.print(f"precision bf16 is slow on this {device.type}, using fp32 instead", flush=True)
        return torch.float32 if wanted == "fp32" else best_dtype(device)

    def _new_tokenizer(self, with_weights: bool) -> DynamicVisualTokenizer:
        weights = self.recipe.backbone_weights if with_weights else ""
        tokenizer = DynamicVisualTokenizer(self.recipe.config, pretrained_backbone=weights == "hub")
        if weights not in ("", "hub"):
            tokenizer.backbone.load_weights(weights)
        return tokenizer

    def _build(self) -> None:
        recipe, stages = self.recipe, self.recipe.stages
        for stage in stages:
            self.objective.set_stage(stage)  # refuses now what would fail hours later
        # data-parallel training decides once what is trained: include what the first stage freezes
        self.objective.set_stage(dataclasses.replace(stages[0], freeze=()))
        named = [(name, p) for name, p in self.objective.named_parameters() if not name.startswith("teacher.")]
        self.optimizer = Optimizer(named, recipe.optimizer, lr=stages[0].lr, weight_decay=recipe.weight_decay)
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
        except (RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path} does not fit this recipe: {error}; train into another folder") from error
        self.quantizing = state["quantizing"]

    def run(self) -> None:
        """Trains to the end of the recipe.

        Raises `CheckpointError` if the folder can't be written, `DataError` if no images can be read.
        """
        if self.accelerator.is_main_process:
            open_log(self.folder / "log.jsonl", self.step)
        size, main = self.schedule.images_per_step, self.accelerator.is_main_process
        display = Display(self.schedule.total_images, self.step * size, enabled=main)
        try:
            self._train(display)
        finally:
            display.close()
        fingerprint, unreadable = self.save(), len(self.data.unreadable)
        display.note(closing_line(self.recipe, self.folder, fingerprint, unreadable, display.elapsed))

    def _train(self, display: Display) -> None:
        averages = StepAverages(self.accelerator, len(self.objective.tokenizer.codebook.embedding))
        saved = reported = time.monotonic()
        since, current = self.step, None
        for pixels in self.batches(self.step, self.schedule.total_steps):
            stage, step = self.schedule.locate(self.step)
            if stage is not current:
                current = stage
                self.objective.set_stage(stage)
            if stage.quantize and not self.quantizing:
                display.note(f"starting the codebook by k-means on {self.kmeans_vectors:,} vectors")
                self._kmeans()
            result = self.train_step(pixels.to(self.accelerator.device), stage, step)
            self.step += 1
            averages.add(result)
            display.advance(self.schedule.images_per_step, stage.name, result.summary)
            now, ended = time.monotonic(), self.step == self.schedule.total_steps
            if self.step % self.recipe.log_every == 0 or ended:
                images = self.step * self.schedule.images_per_step
                line = {"stage": stage.name, "step": self.step, "images": images}
                line |= averages.collect(self.data.unreadable)
                speed = (self.step - since) * self.schedule.images_per_step / (now - reported)
                if self.accelerator.is_main_process:
                    append_line(self.folder / "log.jsonl", {**line, "images_per_second": speed})
                since, reported = self.step, now
            due = now - saved >= 60 * self.recipe.save_minutes
            by_steps = self.recipe.save_every and self.step % self.recipe.save_every == 0
            if (due or by_steps or step + 1 == self.schedule.steps(stage)) and not ended:
                self.save()
                saved = now

    def batches(self, first: int, last: int) -> Iterator[Tensor]:
        """Yields this rank's batches of the steps `first` to `last`. Raises `DataError` if no images can be read."""
        workers = self.recipe.workers
        loader = torch.utils.data.DataLoader(
            self.data, batch_size=None, sampler=range(first, last), num_workers=workers,
            prefetch_factor=4 if workers else None,
        )  # fmt: skip
        for pixels in loader:
            if isinstance(pixels, DataError):
                raise pixels
            yield pixels

    def autocast(self) -> torch.autocast:
        dtype = self.autocast_dtype
        return torch.autocast(self.accelerator.device.type, dtype, enabled=dtype != torch.float32)

    def train_step(self, pixels: Tensor, stage: Stage, step: int) -> StepResult:
        """Takes one step on normalized pixels [B, 3, S, S].

        A step whose gradient is not finite is skipped. Raises `DyntokError` after many of them in a row.
        """
        # every step has a seed of its own, so that a resumed run draws what an uninterrupted one would
        torch.manual_seed((self.recipe.seed * 1_000_003 + self.step) * 1_009 + self.accelerator.process_index)
        self.model.train()
        factor = self.schedule.lr_factor(stage, step)
        with self.autocast():
            result: StepResult = self.model(pixels)
        self.accelerator.backward(result.loss)
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), 1.0)
        result.metrics["grad"] = norm.detach()
        usable = bool(norm.isfinite())  # the same on every rank
        if usable:
            self.optimizer.step(stage.lr * factor)
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
        self._unusable = 0 if usable else self._unusable
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
        """The number of vectors from which k-means starts the codebook."""
        return _KMEANS_VECTORS_PER_CODE * len(self.objective.tokenizer.codebook.embedding)

    def code_vectors(self, step: int) -> Tensor:
        """Returns the vectors [T, C], of all ranks, that a step would quantize."""
        pixels = self.data.batch(step).to(self.accelerator.device)
        torch.manual_seed(self.recipe.seed * 1_000_003 + step)
        with self.autocast():
            return gather_rows_of_ranks(self.objective.code_vectors(pixels))

    def _kmeans(self) -> None:
        """Starts the codebook from the vectors of the next batches."""
        vectors: list[Tensor] = []
        step = self.step
        while sum(map(len, vectors)) < self.kmeans_vectors:
            vectors.append(self.code_vectors(step))
            step += 1
        generator, codebook = torch.Generator().manual_seed(self.recipe.seed), self.objective.tokenizer.codebook
        start = torch.cat(vectors)[: self.kmeans_vectors]
        self.objective.codebook_trainer.start(codebook, start, generator=generator)
        self.quantizing = True

    def save(self) -> str:
        """Writes `tokenizer/` and `state.pt`, and returns the tokenizer's fingerprint ("" on other ranks).

        Raises `CheckpointError` if they can't be written.
        """
        if not self.accelerator.is_main_process:
            return ""
        tokenizer = self.objective.tokenizer
        # before the state: a run killed in between resumes from the old state, and writes both again
        fingerprint = checkpoint.save(self.folder / "tokenizer", tokenizer.config, tokenizer.state_dict())
        weights = {name: v for name, v in self.objective.state_dict().items() if not name.startswith("teacher.")}
        state = {"step": self.step, "quantizing": self.quantizing, "objective": weights}
        state |= {"optimizer": self.optimizer.state_dict(), "run": self._run}
        write_state(self.folder / "state.pt", state)
        return fingerprint
