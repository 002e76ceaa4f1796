"""The training loop: stages, optimiser, k-means, checkpoints; on `accelerate`, so on one CPU, one GPU or many.

A run's folder holds `log.jsonl` (one line per report, see `progress.py`) and, from the first save on, `state.pt` (everything needed to go
on, see `state.py`) and `tokenizer/` (an ordinary checkpoint).
"""

import dataclasses
import logging
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

from dyntok.checkpoint import format as checkpoint
from dyntok.errors import CheckpointError, ConfigError, DataError, DyntokError
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.training.codebook import gather_rows_of_ranks
from dyntok.training.data import TrainingImages, find_samples
from dyntok.training.objective import Objective, StepResult, TeacherFeatures
from dyntok.training.optimizer import Optimizer
from dyntok.training.pca_init import pca_init
from dyntok.training.progress import Progress, open_log
from dyntok.training.recipe import Recipe, Stage, differences
from dyntok.training.state import check_same_run, describe_run, read_state, write_state

_START_BATCHES = 8  # for the linear start's statistics
_KMEANS_VECTORS_PER_CODE = 16
_CODEBOOK_DECAY = 0.98
_GIVE_UP = 20  # steps in a row whose gradient is not finite
_log = logging.getLogger(__name__)


class Trainer:
    """One run of a recipe in a folder. `run()` goes on from where the folder's last checkpoint stands.

    tokenizer: start from these weights instead of from scratch; they are changed in place. cpu: even where there is a GPU.

    Raises `ConfigError` where recipe and tokenizer do not fit, `DataError` without images, `CheckpointError` where the folder can't be
    written or holds a run of another recipe.
    """

    def __init__(
        self, recipe: Recipe, folder: str | Path, *, tokenizer: DynamicVisualTokenizer | None = None, cpu: bool = False
    ) -> None:
        self.recipe, self.folder = recipe, Path(folder)
        self.accelerator = _make_accelerator(recipe, cpu)
        self.images_per_step = recipe.batch_size * self.accelerator.num_processes
        samples = find_samples(recipe.data, recipe.split)
        self._run = describe_run(recipe, samples, self.images_per_step)
        state = read_state(self.folder / "state.pt")
        if state is not None:
            check_same_run(self.folder / "state.pt", state, self._run)
        if self.accelerator.is_main_process:
            open_log(self.folder / "log.jsonl", state["step"] if state else 0)

        torch.manual_seed(recipe.seed)
        started = tokenizer is not None
        if not started:
            tokenizer = self._new_tokenizer(with_weights=state is None)
        elif changes := differences(tokenizer.config.to_dict(), recipe.config.to_dict()):
            raise ConfigError(
                f"the tokenizer to start from is not the recipe's: {'; '.join(changes[:5])}; change the recipe's tokenizer"
            )
        image = tokenizer.config.image
        self.data = TrainingImages(
            samples, image, recipe.batch_size, seed=recipe.seed, min_crop=recipe.min_crop,
            rank=self.accelerator.process_index, world=self.accelerator.num_processes,
        )  # fmt: skip
        if recipe.pca_init and not started and state is None:
            pca_init(tokenizer, torch.cat([self.data.batch(step) for step in range(_START_BATCHES)]))
        teacher = TeacherFeatures(recipe.teacher, image.mean, image.std) if recipe.teacher.name else None
        self.objective = Objective(tokenizer, teacher)
        self.quantizing = started and recipe.stages[0].quantize
        self.step = 0  # of the whole run
        self._unusable = 0  # steps in a row
        self._build()
        if state is not None:
            self._resume(state)

    def _new_tokenizer(self, with_weights: bool) -> DynamicVisualTokenizer:
        weights = self.recipe.backbone_weights if with_weights else ""
        tokenizer = DynamicVisualTokenizer(self.recipe.config, pretrained_backbone=weights == "hub")
        if weights not in ("", "hub"):
            tokenizer.backbone.load_weights(weights)
        return tokenizer

    def _build(self) -> None:
        recipe, stages = self.recipe, self.recipe.stages
        for stage in stages:
            self.objective.set_stage(stage)  # refuses what does not fit now instead of hours later
        # data-parallel training looks at what is to be trained once: what the first stage freezes must count, too
        self.objective.set_stage(dataclasses.replace(stages[0], freeze=()))
        named = [(name, p) for name, p in self.objective.named_parameters() if not name.startswith("teacher.")]
        self.optimizer = Optimizer(named, recipe.optimizer, lr=stages[0].lr, weight_decay=recipe.weight_decay)
        self.model = self.accelerator.prepare_model(self.objective)
        self.objective.set_stage(stages[0])

    def _stage_at(self, step: int) -> tuple[Stage, int] | None:
        """The stage of a step and the step's number inside it; None after the last."""
        for stage in self.recipe.stages:
            steps = self._steps(stage)
            if step < steps:
                return stage, step
            step -= steps
        return None

    def _steps(self, stage: Stage) -> int:
        return -(-stage.images // self.images_per_step)

    def run(self) -> None:
        """Train to the end of the recipe. Raises `DataError` where no images can be read."""
        workers, total = self.recipe.workers, sum(self._steps(stage) for stage in self.recipe.stages)
        if self.step >= total:
            self.save()
            return
        loader = torch.utils.data.DataLoader(
            self.data,
            batch_size=None,
            sampler=range(self.step, total),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
        )
        progress = Progress(
            self.accelerator, self.folder / "log.jsonl", len(self.objective.tokenizer.codebook.embedding)
        )
        current = None
        for pixels in loader:
            if isinstance(pixels, DataError):
                raise pixels
            stage, step = self._stage_at(self.step)
            if stage is not current:
                current = stage
                self.objective.set_stage(stage)
            if stage.quantize and not self.quantizing:
                self._kmeans()
            result = self.train_step(pixels.to(self.accelerator.device), stage, step)
            self.step += 1
            progress.add(result, len(pixels))
            if self.step % self.recipe.log_every == 0 or self.step == total:
                progress.report(stage.name, self.step, self.step * self.images_per_step, self.data.unreadable)
            if self.step % self.recipe.save_every == 0 or step + 1 == self._steps(stage):
                self.save()

    def train_step(self, pixels: Tensor, stage: Stage, step: int) -> StepResult:
        """One step on normalized pixels [B, 3, S, S]. A gradient that is not finite is left out; `DyntokError` after many in a row."""
        # every step has a seed of its own, so that a resumed run draws what an undisturbed one would
        torch.manual_seed((self.recipe.seed * 1_000_003 + self.step) * 1_009 + self.accelerator.process_index)
        self.model.train()
        schedule = self._schedule(stage, step)
        with self.accelerator.autocast():
            result: StepResult = self.model(pixels)
        self.accelerator.backward(result.loss)
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), 1.0)
        result.metrics["grad"] = norm.detach()
        usable = bool(norm.isfinite())  # the same on every rank
        if usable:
            self.optimizer.step(stage.lr * schedule)
        self.optimizer.zero_grad()
        if not usable:
            self._leave_out(result)
        elif result.codes is not None and "codebook" not in stage.freeze:
            generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
            trainer, codebook = self.objective.codebook_trainer, self.objective.tokenizer.codebook
            # as the weights come to rest, rows are averaged over more vectors
            trainer.decay = 1 - (1 - _CODEBOOK_DECAY) * max(schedule, 0.1)
            revived = trainer.update(codebook, result.vectors, result.codes, generator)
            result.metrics["revived"] = torch.tensor(float(revived))
        self._unusable = 0 if usable else self._unusable
        return result

    def _leave_out(self, result: StepResult) -> None:
        self._unusable += 1
        _log.warning("step %d left out: its gradient is not finite (loss %g)", self.step, result.loss.item())
        if self._unusable >= _GIVE_UP:
            raise DyntokError(
                f"the gradients of {_GIVE_UP} steps in a row were not finite, the last at step {self.step}; lower the learning rate, "
                f"or try precision 'no'. The state saved before is in {self.folder}"
            )

    def _schedule(self, stage: Stage, step: int) -> float:
        factor = min(1.0, (step + 1) * self.images_per_step / stage.warmup) if stage.warmup else 1.0
        return factor * (1 - step / self._steps(stage)) if stage.decay == "linear" else factor

    @torch.no_grad()
    def _kmeans(self) -> None:
        """Start the codebook from vectors of the next batches' training choice."""
        tokenizer = self.objective.tokenizer
        wanted = _KMEANS_VECTORS_PER_CODE * len(tokenizer.codebook.embedding)
        vectors: list[Tensor] = []
        step = self.step
        while sum(map(len, vectors)) < wanted:
            pixels = self.data.batch(step).to(self.accelerator.device)
            torch.manual_seed(self.recipe.seed * 1_000_003 + step)
            with self.accelerator.autocast():
                features = tokenizer.backbone(pixels)
                keep, gate, _ = self.objective.masks(tokenizer.selector(features))
                found = tokenizer.projection(tokenizer.merger(features, keep, gate)).float()
            vectors.append(gather_rows_of_ranks(found))
            step += 1
        generator = torch.Generator().manual_seed(self.recipe.seed)
        self.objective.codebook_trainer.start(tokenizer.codebook, torch.cat(vectors)[:wanted], generator=generator)
        self.quantizing = True

    def save(self) -> None:
        """Write `tokenizer/`, which `dyntok.load` opens, and `state.pt`. Raises `CheckpointError` where they can't be written."""
        if not self.accelerator.is_main_process:
            return
        tokenizer = self.objective.tokenizer
        # before the state: a run killed in between goes on from the old one, and comes back here
        checkpoint.save(self.folder / "tokenizer", tokenizer.config, tokenizer.state_dict())
        state = {
            "step": self.step,
            "quantizing": self.quantizing,
            "objective": {
                name: value for name, value in self.objective.state_dict().items() if not name.startswith("teacher.")
            },
            "optimizer": self.optimizer.state_dict(),
            "run": self._run,
        }
        write_state(self.folder / "state.pt", state)

    def _resume(self, state: dict) -> None:
        path = self.folder / "state.pt"
        try:
            missing, unexpected = self.objective.load_state_dict(state["objective"], strict=False)
            wrong = [name for name in (*missing, *unexpected) if not name.startswith("teacher.")]
            if wrong:
                raise KeyError(f"{len(wrong)} tensors missing or not expected: {', '.join(wrong[:5])}")
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path} does not fit this recipe: {error}; train into another folder") from error
        self.step, self.quantizing = state["step"], state["quantizing"]


def _make_accelerator(recipe: Recipe, cpu: bool) -> Accelerator:
    # a batch need not use every parameter: masks without gradient, images without positions, parts that a stage freezes
    options = DistributedDataParallelKwargs(find_unused_parameters=True)
    try:
        return Accelerator(mixed_precision=recipe.precision, cpu=cpu, kwargs_handlers=[options])
    except ValueError as error:  # accelerate keeps one state per process
        raise ConfigError(f"precision {recipe.precision!r} does not work here: {error}") from error
