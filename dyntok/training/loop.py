"""The training loop: stages, optimiser, progress line, checkpoints; on `accelerate`, so on one CPU, one GPU or many.

A run's folder holds `state.pt` (everything needed to go on, written atomically), `log.jsonl` (one line per report) and, at the end of
every stage, `tokenizer/` (an ordinary checkpoint).
"""

import json
import os
import time
from collections import defaultdict
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from dyntok.codebook import gather_rows_of_ranks, perplexity
from dyntok.errors import CheckpointError
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.training.data import TrainingImages, find_samples
from dyntok.training.objective import Objective, StepResult, TeacherFeatures
from dyntok.training.recipe import Recipe, Stage
from dyntok.training.start import linear_start

_START_BATCHES = 8  # for the linear start's statistics
_KMEANS_VECTORS_PER_CODE = 16


class Trainer:
    """One run of a recipe in a folder. `run()` goes on from where the folder's last checkpoint stands.

    tokenizer: start from these weights instead of from scratch.
    """

    def __init__(self, recipe: Recipe, folder: str | Path, *, tokenizer: DynamicVisualTokenizer | None = None, cpu: bool = False) -> None:
        self.recipe, self.folder = recipe, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(mixed_precision=recipe.precision, cpu=cpu)
        torch.manual_seed(recipe.seed)
        samples = find_samples(recipe.data, recipe.split)
        started = tokenizer is not None
        tokenizer = tokenizer or self._new_tokenizer()
        image = tokenizer.config.image
        self.data = TrainingImages(
            samples, image, recipe.batch_size, seed=recipe.seed, min_crop=recipe.min_crop,
            rank=self.accelerator.process_index, world=self.accelerator.num_processes,
        )  # fmt: skip
        if recipe.linear_start and not started:
            linear_start(tokenizer, torch.cat([self.data[step] for step in range(_START_BATCHES)]))
        teacher = TeacherFeatures(recipe.teacher, image.mean, image.std) if recipe.teacher.name else None
        self.objective = Objective(tokenizer, teacher)
        self.quantizing = started and recipe.stages[0].quantize
        self.step = 0  # of the whole run
        self._build(recipe.stages[0])
        self._resume()

    def _new_tokenizer(self) -> DynamicVisualTokenizer:
        tokenizer = DynamicVisualTokenizer(self.recipe.config, pretrained_backbone=self.recipe.backbone_weights == "hub")
        if self.recipe.backbone_weights not in ("", "hub"):
            tokenizer.backbone.load_weights(self.recipe.backbone_weights)
        return tokenizer

    def _build(self, stage: Stage) -> None:
        self.objective.set_stage(stage)
        named = [(name, p) for name, p in self.objective.named_parameters() if not name.startswith("teacher.")]
        decayed = [p for _, p in named if p.ndim > 1]
        others = [p for _, p in named if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": self.recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.98))
        self.model = self.accelerator.prepare_model(self.objective)

    def _stage_at(self, step: int) -> tuple[Stage, int] | None:
        """The stage of a step and the step's number inside it; None after the last."""
        for stage in self.recipe.stages:
            steps = self._steps(stage)
            if step < steps:
                return stage, step
            step -= steps
        return None

    def _steps(self, stage: Stage) -> int:
        return -(-stage.images // (self.recipe.batch_size * self.accelerator.num_processes))

    def run(self) -> None:
        """Train to the end of the recipe."""
        total = sum(self._steps(stage) for stage in self.recipe.stages)
        loader = torch.utils.data.DataLoader(
            self.data, batch_size=None, sampler=range(self.step, total), num_workers=self.recipe.workers, prefetch_factor=4 if self.recipe.workers else None
        )
        report = _Report(self)
        current = None
        for pixels in loader:
            stage, step = self._stage_at(self.step)
            if stage is not current:
                current = stage
                self.objective.set_stage(stage)
            if stage.quantize and not self.quantizing:
                self._kmeans()
            result = self.train_step(pixels.to(self.accelerator.device), stage, step)
            self.step += 1
            report.add(result, len(pixels))
            if self.step % self.recipe.log_every == 0 or self.step == total:
                report.print(stage)
            last_of_stage = step + 1 == self._steps(stage)
            if self.step % self.recipe.save_every == 0 or last_of_stage:
                self.save()

    def train_step(self, pixels: Tensor, stage: Stage, step: int) -> StepResult:
        # every step has a seed of its own, so that a resumed run draws what an undisturbed one would
        torch.manual_seed((self.recipe.seed * 1_000_003 + self.step) * 1_009 + self.accelerator.process_index)
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = stage.lr * self._schedule(stage, step)
        with self.accelerator.autocast():
            result: StepResult = self.model(pixels)
        self.accelerator.backward(result.loss)
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), 1.0)
        result.metrics["grad"] = norm.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if result.codes is not None:
            generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
            revived = self.objective.codebook_trainer.update(self.objective.tokenizer.codebook, result.vectors, result.codes, generator)
            result.metrics["revived"] = torch.tensor(float(revived))
        return result

    def _schedule(self, stage: Stage, step: int) -> float:
        per_step = self.recipe.batch_size * self.accelerator.num_processes
        factor = min(1.0, (step + 1) * per_step / stage.warmup) if stage.warmup else 1.0
        return factor * (1 - step / self._steps(stage)) if stage.decay == "linear" else factor

    @torch.no_grad()
    def _kmeans(self) -> None:
        """Start the codebook from vectors of the next batches' training choice."""
        tokenizer = self.objective.tokenizer
        wanted = _KMEANS_VECTORS_PER_CODE * len(tokenizer.codebook.embedding)
        vectors: list[Tensor] = []
        step = self.step
        while sum(map(len, vectors)) < wanted:
            pixels = self.data[step].to(self.accelerator.device)
            torch.manual_seed(self.recipe.seed * 1_000_003 + step)
            with self.accelerator.autocast():
                features = tokenizer.backbone(pixels)
                keep, gate = self.objective.masks(tokenizer.selector(features))
                found = tokenizer.projection(tokenizer.merger(features, keep, gate)).float()
            vectors.append(gather_rows_of_ranks(found))
            step += 1
        generator = torch.Generator().manual_seed(self.recipe.seed)
        self.objective.codebook_trainer.start(tokenizer.codebook, torch.cat(vectors)[:wanted], generator=generator)
        self.quantizing = True

    def save(self) -> None:
        """Write `state.pt`: first to another name, then renamed, so that a kill leaves the old one."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "step": self.step,
            "quantizing": self.quantizing,
            "objective": {name: value for name, value in self.objective.state_dict().items() if not name.startswith("teacher.")},
            "optimizer": self.optimizer.state_dict(),
        }
        target, temporary = self.folder / "state.pt", self.folder / "state.pt.tmp"
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)

    def _resume(self) -> None:
        path = self.folder / "state.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            _, unexpected = self.objective.load_state_dict(state["objective"], strict=False)
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path} does not fit this recipe: {error}; train into another folder") from error
        self.step, self.quantizing = state["step"], state["quantizing"]


class _Report:
    """Averages between two progress lines, over all ranks."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, list[float]] = defaultdict(list)
        self.lengths: list[Tensor] = []
        self.counts = torch.zeros(len(self.trainer.objective.tokenizer.codebook.embedding))
        self.images, self.since = 0, time.perf_counter()

    def add(self, result: StepResult, images: int) -> None:
        for name, value in result.metrics.items():
            if value == value:  # a batch without known positions has no PSNR
                self.sums[name].append(float(value))
        self.lengths.append(result.lengths)
        if result.codes is not None:
            self.counts += torch.bincount(result.codes.cpu(), minlength=len(self.counts))
        self.images += images

    def print(self, stage: Stage) -> None:
        accelerator = self.trainer.accelerator
        values = {name: sum(v) / len(v) for name, v in self.sums.items()}
        lengths = accelerator.gather_for_metrics(torch.cat(self.lengths)).float()
        counts = accelerator.reduce(self.counts.to(accelerator.device))
        world = accelerator.num_processes
        line = {
            "stage": stage.name, "step": self.trainer.step, "images": self.trainer.step * self.trainer.recipe.batch_size * world, **values,
            "tokens": float(lengths.mean()), "tokens_std": float(lengths.std()) if len(lengths) > 1 else 0.0,
            "usage": float((counts > 0).float().mean()), "perplexity": perplexity(counts),
            "images_per_second": self.images * world / (time.perf_counter() - self.since),
        }  # fmt: skip
        if accelerator.is_main_process:
            with open(self.trainer.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            accelerator.print("  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in line.items()), flush=True)
        self._clear()
