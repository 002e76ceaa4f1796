"""The forward pass of a training step: choose masks, encode, decode, add up the losses.

Not here: the losses (`losses.py`), the teacher (`teacher.py`), gradients and steps (`loop.py`).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dyntok.errors import ConfigError
from dyntok.model.selector import DROP, KEEP, straight_through
from dyntok.policy import KeepPolicy
from dyntok.ragged import cu_seqlens_from_mask
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.training import losses
from dyntok.training.codebook import CodebookTrainer
from dyntok.training.stage import Stage
from dyntok.training.teacher import TeacherFeatures


@dataclass
class StepResult:
    """The loss to minimize, figures for the log, and the codebook's inputs."""

    loss: Tensor
    metrics: dict[str, Tensor]
    lengths: Tensor  # [B], of the learned, deterministic choice
    vectors: Tensor | None
    codes: Tensor | None

    def summary(self) -> str:
        """Returns the figures that a person follows, as text."""
        shown = {name: float(value) for name, value in self.metrics.items() if name in ("loss", "psnr")}
        shown["tokens"] = float(self.lengths.float().mean())
        return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())


class Objective(nn.Module):
    """A tokenizer with everything that only its training needs. `set_stage` decides what `forward` computes."""

    def __init__(self, tokenizer: DynamicVisualTokenizer, teacher: TeacherFeatures | None) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.teacher = teacher
        self.semantic = nn.Linear(tokenizer.codebook.embedding.shape[1], teacher.out_dim) if teacher else None
        self.codebook_trainer = CodebookTrainer(tokenizer.codebook)
        self.register_buffer("pixel_std", torch.tensor(tokenizer.config.image.std).view(3, 1, 1), persistent=False)
        self.stage: Stage | None = None

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
        needs_pixels = weights.pixel or weights.perceptual or weights.recognition or "pixel_head" in stage.freeze
        if tok.pixel_head is None and needs_pixels:
            raise ConfigError(f"{name} trains pixels, but the tokenizer makes none; set decoder.pixels: true")
        if self.teacher is None and weights.needs_teacher:
            raise ConfigError(f"{name} has a perceptual, recognition or semantic loss, but there is no teacher")
        if weights.feature and decoder.head == "none" and decoder.embed_dim not in (None, width):
            raise ConfigError(
                f"{name} compares features, but the decoder's have {decoder.embed_dim} channels and the backbone's "
                f"{width}; set decoder.head: mlp, or remove decoder.embed_dim"
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

    @torch.no_grad()
    def code_vectors(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] -> the vectors [T, C] that a step would quantize. Draws from the global generator."""
        features, grid = self.tokenizer.backbone(pixels), self.tokenizer.backbone.grid_of(pixels)
        keep, gate, _ = self.masks(self.tokenizer.selector(features, grid))
        return self.tokenizer.projection(self.tokenizer.merger(features, keep, gate, grid=grid)).float()

    def forward(self, pixels: Tensor) -> StepResult:
        """pixels: [B, 3, H, W]. Draws from the global random generator."""
        stage, tok, weights = self.stage, self.tokenizer, self.stage.weights
        features, grid = tok.backbone(pixels), tok.backbone.grid_of(pixels)
        log_probs = tok.selector(features, grid)
        keep, gate, is_random = self.masks(log_probs)
        vectors = tok.projection(tok.merger(features, keep, gate, grid=grid)).float()
        codes = None
        if stage.quantize:
            rows, codes = tok.codebook.quantize(vectors)
        else:
            rows = F.normalize(vectors, dim=-1)
        cu_seqlens = cu_seqlens_from_mask(keep)
        known = torch.rand(len(pixels), device=pixels.device) >= stage.position_drop  # [B]: decoded with positions
        positions = torch.where(known.repeat_interleave(keep.sum(1)), keep.nonzero()[:, 1], -1)
        decoded = tok.decoder(rows, cu_seqlens, positions, grid=grid)

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
            error = patch_error.detach() if error is None else error
        if weights.needs_teacher:
            added, error = self._teacher_losses(pixels, painted, rows, keep, known, error, metrics)
            loss = loss + added
        if codes is not None:
            metrics["commitment"] = losses.commitment(F.normalize(vectors, dim=-1), tok.codebook.lookup(codes))
            loss = loss + weights.commitment * metrics["commitment"]
        loss = loss + self._selector_losses(log_probs, grid, error[known] if is_random else None, known, metrics)
        metrics["loss"] = loss
        metrics = {name: value.detach() for name, value in metrics.items()}
        lengths = (log_probs[..., KEEP] > log_probs[..., DROP]).sum(1).clamp(min=1)
        return StepResult(loss, metrics, lengths, vectors.detach(), codes)

    def masks(self, log_probs: Tensor) -> tuple[Tensor, Tensor | None, bool]:
        """Draws the kind of masks by the stage's shares.

        Returns the keep mask, bool [B, N]; its gate [B, N] with the gradient, if the choice is the learned one; and
        whether the mask is random.
        """
        masks, (low, high) = self.stage.masks, self.stage.budgets
        draw = float(torch.rand(())) * (masks.learned + masks.budget + masks.random)
        count = max(1, round(log_probs.shape[1] * low * (high / low) ** float(torch.rand(()))))
        if draw < masks.learned:
            keep, gate = straight_through(log_probs)
            empty = ~keep.any(1)
            if empty.any():  # at least one token: keep the best patch
                best = KeepPolicy(budget=1)(log_probs.detach()) & empty[:, None]
                keep, gate = keep | best, torch.where(best, gate - gate.detach() + 1, gate)
            return keep, gate, False
        if draw < masks.learned + masks.budget:
            return KeepPolicy(budget=count)(log_probs.detach()), None, False
        noise = torch.rand_like(log_probs[..., 0])
        return noise.argsort(1).argsort(1) < count, None, True

    def _teacher_losses(
        self, pixels: Tensor, painted: Tensor | None, rows: Tensor, keep: Tensor, known: Tensor, error: Tensor | None,
        metrics: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Returns the weighted losses, and each patch's error [B, N] with the perceptual one added."""
        weights, loss = self.stage.weights, pixels.new_zeros(())
        view = self.teacher.draw_view()
        with torch.no_grad():
            targets, wanted = self.teacher(pixels, view)
        if weights.perceptual or weights.recognition:
            maps, pooled = self.teacher(painted, view)
            recognition = losses.centered_cosine(pooled, wanted)  # [B]
            metrics["recognition"] = recognition.mean()
            factors = torch.where(known, 1.0, weights.recognition_unplaced)
            loss = loss + weights.recognition * (recognition * factors).mean()
            distances = losses.perceptual(maps, targets)  # [B]
            metrics["perceptual"] = distances.mean()
            factors = torch.where(known, 1.0, weights.perceptual_unplaced)
            loss = loss + weights.perceptual * (distances * factors).mean()
            with torch.no_grad():
                per_patch = losses.perceptual_per_patch(maps, targets, self.tokenizer.backbone.grid_of(pixels))
                error = error / error.mean() + 0.5 * per_patch / per_patch.mean()
        if weights.semantic:
            metrics["semantic"] = self._semantic_loss(rows, keep, targets[-1].float().mean((2, 3)))
            loss = loss + weights.semantic * metrics["semantic"]
        return loss, error

    def _semantic_loss(self, rows: Tensor, keep: Tensor, wanted: Tensor) -> Tensor:
        """Distance of features [B, D], predicted from each image's mean code vector, to the teacher's."""
        image = keep.nonzero()[:, 0]
        pooled = rows.new_zeros(len(keep), rows.shape[1]).index_add(0, image, rows) / keep.sum(1, keepdim=True)
        # mean code vectors differ little between images: scale the differences up
        pooled = (pooled - pooled.mean(0)) / (pooled.std(0, correction=0) + 1e-4)
        return (1 - F.cosine_similarity(self.semantic(pooled).float(), wanted - wanted.mean(0), dim=-1)).mean()

    def _selector_losses(
        self, log_probs: Tensor, grid: tuple[int, int], error: Tensor | None, known: Tensor, metrics: dict[str, Tensor]
    ) -> Tensor:
        """error: [B', N] of the images with positions, as random masks left it; None if the masks were not random."""
        stage = self.stage
        score, probability = log_probs[..., KEEP] - log_probs[..., DROP], log_probs[..., KEEP].exp()
        # the deterministic choice with the gradient of its probability: the rate counts what inference keeps
        chosen = (score > 0).to(probability.dtype) + probability - probability.detach()
        metrics["keep"] = _mean_over_ranks(chosen.mean())
        metrics["rate"] = losses.rate(metrics["keep"], stage.rho)
        total = stage.weights.rate * metrics["rate"]
        if stage.weights.local and error is not None and len(error):
            bias = self.tokenizer.selector.bias(grid)
            unbiased = score[known] - (bias.detach() if isinstance(bias, Tensor) else bias)
            metrics["local"] = losses.local(unbiased, losses.around(error, grid))
            total = total + stage.weights.local * metrics["local"]
        return total


def _mean_over_ranks(value: Tensor) -> Tensor:
    """Returns the mean of a scalar over all ranks, with the gradient of this rank's own value.

    Data-parallel training then averages the gradients.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return value + (total / dist.get_world_size() - value.detach())
