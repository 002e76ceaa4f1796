"""The forward pass of a training step: choose masks, encode, decode, add up the losses.

Not here: the losses (`losses.py`), the kinds of masks (`choices.py`), the teacher (`teacher.py`), gradients and steps
(`loop.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dyntok.errors import ConfigError
from dyntok.model.merger import SimilarMerger
from dyntok.model.selector import DROP, KEEP
from dyntok.ragged import cu_seqlens_from_mask
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.training import losses
from dyntok.training.bank import PictureBank
from dyntok.training.choices import Choice, Mask, draw_choice, make_mask
from dyntok.training.codebook import CodebookTrainer
from dyntok.training.distillation import Distillation
from dyntok.training.stage import Stage
from dyntok.training.teacher import TeacherFeatures, View

_PREDICTED = 2  # of the teacher's maps, the deepest ones: content rather than appearance


@dataclass
class StepResult:
    """The loss to minimize, figures for the log, and the codebook's inputs."""

    loss: Tensor
    metrics: dict[str, Tensor]
    lengths: Tensor  # [B], of the learned, deterministic choice
    vectors: Tensor | None
    codes: Tensor | None
    pictures: tuple[Tensor, ...] | None  # for the bank: vectors [B', 2C], targets [B', D]; None without semantic loss

    @classmethod
    def of(cls, results: Sequence["StepResult"]) -> "StepResult":
        """Returns the result of a step that had several batches."""
        if len(results) == 1:
            return results[0]
        names = dict.fromkeys(name for result in results for name in result.metrics)
        metrics = {
            name: torch.stack([result.metrics[name] for result in results if name in result.metrics]).nanmean()
            for name in names
        }
        vectors = [result.vectors for result in results if result.vectors is not None]
        codes = [result.codes for result in results if result.codes is not None]
        pictures = [result.pictures for result in results if result.pictures is not None]
        return cls(
            torch.stack([result.loss.detach() for result in results]).mean(),
            metrics,
            torch.cat([result.lengths for result in results]),
            torch.cat(vectors) if vectors else None,
            torch.cat(codes) if codes else None,
            tuple(torch.cat(rows) for rows in zip(*pictures, strict=True)) or None,
        )

    def summary(self) -> str:
        """Returns the figures that a person follows, as text."""
        shown = {name: float(value) for name, value in self.metrics.items() if name in ("loss", "psnr")}
        shown["tokens"] = float(self.lengths.float().mean())
        return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())


@dataclass(frozen=True)
class _Seen:
    """The pictures of a batch that the teacher sees, with what became of them."""

    pixels: Tensor  # [B, 3, H, W]
    painted: Tensor | None  # the same; None where no loss looks at pixels
    keep: Tensor  # bool [B, N]
    known: Tensor  # bool [B]: decoded with positions
    error: Tensor | None  # of each patch, [B, N]
    rows: Tensor  # code vectors of the kept patches, [T, C]
    features: Tensor  # of the backbone, [B, N, D]
    decoded: Tensor  # features of the decoder, [B, N, D']


@dataclass(frozen=True)
class Draw:
    """What chance decides for the pictures of all ranks together."""

    choice: Choice
    view: View | None  # None without a teacher


class Objective(nn.Module):
    """A tokenizer with everything that only its training needs. `set_stage` decides what `forward` computes."""

    def __init__(self, tokenizer: DynamicVisualTokenizer, teacher: TeacherFeatures | None) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.teacher = teacher
        self.bank = PictureBank(2 * tokenizer.codebook.embedding.shape[1], teacher.channels[-1]) if teacher else None
        self.distillation = self._distillation()
        self.codebook_trainer = CodebookTrainer(tokenizer.codebook)
        self.register_buffer("pixel_std", torch.tensor(tokenizer.config.image.std).view(3, 1, 1), persistent=False)
        self.stage: Stage | None = None

    def _distillation(self) -> Distillation | None:
        """Returns the heads, also if no stage has `weights.distill`: a resumed run may add it to a later stage."""
        tok, teacher = self.tokenizer, self.teacher
        if teacher is None or tok.decoder is None:
            return None
        maps = teacher.channels[-_PREDICTED:]
        return Distillation(tok.backbone.embed_dim, tok.decoder.out_dim, maps, teacher.pooled_dim)

    def set_stage(self, stage: Stage) -> None:
        """Trains everything from here on, except the teacher, a frozen backbone and the stage's `freeze`.

        Raises `ConfigError` if the tokenizer lacks what the stage's losses need.
        """
        self._check(stage)
        self.stage = stage
        self.requires_grad_(True)
        for part in self._frozen():
            part.requires_grad_(False)
        self.train(self.training)

    def _check(self, stage: Stage) -> None:
        tok, weights, name = self.tokenizer, stage.weights, f"stage {stage.name!r}"
        decoder, width = tok.config.decoder, tok.backbone.embed_dim
        if decoder is None:
            raise ConfigError(
                "the tokenizer has no decoder, so no reconstruction can be compared; remove decoder: null"
            )
        needs_pixels = (
            weights.pixel or weights.low or weights.perceptual or weights.recognition or "pixel_head" in stage.freeze
        )
        if tok.pixel_head is None and needs_pixels:
            raise ConfigError(f"{name} trains pixels, but the tokenizer makes none; set decoder.pixels: true")
        if self.teacher is None and weights.needs_teacher:
            raise ConfigError(
                f"{name} has a perceptual, recognition, semantic or distill loss, but there is no teacher"
            )
        bound = tok.config.selector.places != "free" or tok.config.merger.position == "rotary"
        if stage.masks.learned and bound and not isinstance(tok.merger, SimilarMerger):
            raise ConfigError(
                f"{name} has learned masks, which need selector.places: free and merger.position: none; "
                "set masks.learned: 0 and give the other kinds shares"
            )
        restored = tok.require_decoder().out_dim
        if weights.feature and restored != width:
            raise ConfigError(
                f"{name} compares features, but the decoder's have {restored} channels and the backbone's {width}; "
                "remove decoder.out_dim, and set decoder.head: mlp or remove decoder.embed_dim"
            )

    def _frozen(self) -> list[nn.Module]:
        parts = [getattr(self.tokenizer, name) for name in self.stage.freeze]
        parts += [self.tokenizer.backbone] * self.tokenizer.backbone.frozen
        return parts if self.teacher is None else [*parts, self.teacher]

    def train(self, mode: bool = True) -> "Objective":
        """Keeps frozen parts in evaluation mode, so that their batch statistics do not change."""
        super().train(mode)
        for part in self._frozen() if self.stage else ():
            part.eval()
        return self

    def draw(self) -> Draw:
        """Draws from the global random generator, which must have the same state on all ranks."""
        choice = draw_choice(self._current_stage)
        return Draw(choice, None if self.teacher is None else self.teacher.draw_view())

    @property
    def _current_stage(self) -> Stage:
        assert self.stage is not None, "set_stage comes before everything else"
        return self.stage

    def _mask(self, choice: Choice, log_probs: Tensor, grid: tuple[int, int]) -> Mask:
        return make_mask(choice, log_probs, grid, self.tokenizer.config.selector.places)

    @torch.no_grad()
    def code_vectors(self, pixels: Tensor) -> Tensor:
        """Returns, for pixels [B, 3, H, W], the vectors [T, C] that a step would quantize.

        Draws from the global generator.
        """
        tok = self.tokenizer
        features, grid = tok.backbone(pixels), tok.backbone.grid_of(pixels)
        mask = self._mask(draw_choice(self._current_stage), tok.selector(features, grid), grid)
        return tok.projection(tok.merger(features, mask.keep, mask.gate, grid=grid)).float()

    def forward(self, pixels: Tensor, draw: Draw | None = None) -> StepResult:
        """Returns the loss and the measures of one step. Draws from the global random generator.

        pixels: [B, 3, H, W]. draw: the same on all ranks; drawn here without it.
        """
        stage, tok = self._current_stage, self.tokenizer
        weights, draw = stage.weights, draw or self.draw()
        features, grid = tok.backbone(pixels), tok.backbone.grid_of(pixels)
        log_probs = tok.selector(features, grid)
        mask = self._mask(draw.choice, log_probs, grid)
        keep = mask.keep
        vectors = tok.projection(tok.merger(features, keep, mask.gate, grid=grid)).float()
        codes = None
        if stage.quantize:
            rows, codes = tok.codebook.quantize(vectors)
        else:
            rows = F.normalize(vectors, dim=-1)
        cu_seqlens = cu_seqlens_from_mask(keep)
        on_lattice = draw.choice.kind == "lattice"
        drop = stage.lattice_drop if on_lattice else stage.position_drop
        known = torch.rand(len(pixels), device=pixels.device) >= drop  # [B]: decoded with positions
        positions = torch.where(known.repeat_interleave(keep.sum(1)), keep.nonzero()[:, 1], -1)
        decoded = tok.decoder(rows, cu_seqlens, positions, grid=grid)
        if on_lattice and tok.decoder.dithered:  # unknown positions are guessed on the lattice
            known = torch.ones_like(known)

        metrics: dict[str, Tensor] = {}
        loss = pixels.new_zeros(())
        error = painted = None
        if weights.feature:
            metrics["feature"] = losses.feature_cosine(decoded, features)
            loss = loss + weights.feature * metrics["feature"]
            error = 1 - F.cosine_similarity(decoded.detach().float(), features.detach().float(), dim=-1)
        if tok.pixel_head is not None:
            painted = tok.pixel_head(decoded, grid).float()
            patch_error = losses.patch_error(painted, pixels, tok.backbone.patch_size)
            metrics["pixel"] = patch_error.mean()
            squared = ((painted.detach() - pixels) * self.pixel_std).square().mean((1, 2, 3))  # [B], of values 0 to 1
            metrics["psnr"] = -10 * squared[known].log10().mean()  # NaN where no image has positions
            loss = loss + weights.pixel * metrics["pixel"]
            if weights.low:
                metrics["low"] = losses.low_frequency(painted, pixels)
                loss = loss + weights.low * metrics["low"]
            error = patch_error.detach() if error is None else error
        seen, pictures = len(pixels), None
        if weights.needs_teacher:
            seen = self.teacher.seen(len(pixels))
            few_rows = rows if seen == len(pixels) else rows[: int(keep[:seen].sum())]
            few_painted, few_error = (None if x is None else x[:seen] for x in (painted, error))
            few = _Seen(
                pixels[:seen],
                few_painted,
                keep[:seen],
                known[:seen],
                few_error,
                few_rows,
                features[:seen],
                decoded[:seen],
            )
            added, error, pictures = self._teacher_losses(few, draw.view, metrics)
            loss = loss + added
        if codes is not None:
            metrics["commitment"] = losses.commitment(F.normalize(vectors, dim=-1), tok.codebook.lookup(codes))
            loss = loss + weights.commitment * metrics["commitment"]
        if error is not None and not draw.choice.measures:
            error = None
        loss = loss + self._selector_losses(log_probs, grid, error, known[:seen], metrics)
        metrics["loss"] = loss
        metrics = {name: value.detach() for name, value in metrics.items()}
        lengths = (log_probs[..., KEEP] > log_probs[..., DROP]).sum(1).clamp(min=1)
        return StepResult(loss, metrics, lengths, vectors.detach(), codes, pictures)

    def _teacher_losses(
        self, seen: _Seen, view: View, metrics: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...] | None]:
        """Returns the weighted losses, each patch's error [B, N] with the perceptual one added, and the bank's rows."""
        pixels, painted, known, error = seen.pixels, seen.painted, seen.known, seen.error
        grid = self.tokenizer.backbone.grid_of(pixels)
        weights, loss, pictures = self.stage.weights, pixels.new_zeros(()), None
        with torch.no_grad():
            targets, wanted = self.teacher(pixels, view)
        if weights.perceptual or weights.recognition:
            maps, pooled = self.teacher(painted, view)
            if len(pixels) > 1:  # a picture alone is the mean from which it would be told apart
                recognition = losses.centered_cosine(pooled, wanted)  # [B]
                metrics["recognition"] = recognition.mean()
                factors = torch.where(known, 1.0, weights.recognition_unplaced)
                loss = loss + weights.recognition * (recognition * factors).mean()
            distances = losses.perceptual(maps, targets)  # [B]
            metrics["perceptual"] = distances.mean()
            factors = torch.where(known, 1.0, weights.perceptual_unplaced)
            loss = loss + weights.perceptual * (distances * factors).mean()
            with torch.no_grad():
                per_patch = losses.perceptual_per_patch(maps, targets, grid)
                error = error / error.mean() + 0.5 * per_patch / per_patch.mean()
        if weights.distill:
            metrics["distill"] = self.distillation(
                seen.features, seen.decoded, grid, targets[-_PREDICTED:], wanted, known
            )
            loss = loss + weights.distill * metrics["distill"]
        if weights.semantic:
            pooled_rows, pooled_targets = _pooled(seen.rows, seen.keep), targets[-1].float().mean((2, 3))
            pictures = pooled_rows.detach(), pooled_targets
            semantic = self.bank.compare(pooled_rows, pooled_targets)
            if semantic is not None:
                metrics["semantic"] = semantic
                loss = loss + weights.semantic * semantic
        return loss, error, pictures

    def _selector_losses(
        self, log_probs: Tensor, grid: tuple[int, int], error: Tensor | None, known: Tensor, metrics: dict[str, Tensor]
    ) -> Tensor:
        """Returns the sum of the losses that only the selector learns from.

        error: [B', N] of the first images, as a mask without regard to the scores left it; None after other masks.
        known: [B'], which of these images were decoded with positions.
        """
        stage = self.stage
        score, probability = log_probs[..., KEEP] - log_probs[..., DROP], log_probs[..., KEEP].exp()
        # the deterministic choice with the gradient of its probability: the rate counts what inference keeps
        chosen = (score > 0).to(probability.dtype) + probability - probability.detach()
        metrics["keep"] = _mean_over_ranks(chosen.mean())
        metrics["rate"] = losses.rate(metrics["keep"], stage.rho)
        total = stage.weights.rate * metrics["rate"]
        if stage.weights.local and error is not None and known.any():
            bias = self.tokenizer.selector.bias(grid)
            unbiased = score[: len(known)][known] - (bias.detach() if isinstance(bias, Tensor) else bias)
            metrics["local"] = losses.local(unbiased, losses.around(error[known], grid), stage.local_slope)
            total = total + stage.weights.local * metrics["local"]
        return total


def _pooled(rows: Tensor, keep: Tensor) -> Tensor:
    """Returns mean and standard deviation of each image's code vectors: [T, C], [B, N] -> [B, 2C].

    As `probe.pooled_vectors`, with a gradient where all vectors of an image are equal.
    """
    image, count = keep.nonzero()[:, 0], keep.sum(1, keepdim=True)
    none = rows.new_zeros(len(keep), rows.shape[1])
    mean = none.index_add(0, image, rows) / count
    variance = none.index_add(0, image, (rows - mean[image]).square()) / count
    return torch.cat([mean, (variance + 1e-6).sqrt()], 1)


def _mean_over_ranks(value: Tensor) -> Tensor:
    """Returns the mean of a scalar over all ranks, with the gradient of this rank's own value.

    Data-parallel training then averages the gradients.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return value + (total / dist.get_world_size() - value.detach())
