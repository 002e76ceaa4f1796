"""One training step's forward pass: choose masks, encode, decode, add up the losses."""

from dataclasses import dataclass

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dyntok.errors import CheckpointError, ConfigError
from dyntok.model.backbone import load_timm_weights
from dyntok.model.selector import DROP, KEEP, straight_through
from dyntok.policy import KeepPolicy
from dyntok.ragged import cu_seqlens_from_mask
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.training import losses
from dyntok.training.codebook import CodebookTrainer
from dyntok.training.recipe import Stage, Teacher


class TeacherFeatures(nn.Module):
    """Feature maps of a fixed timm network, from pixels normalized as the tokenizer's.

    Raises `ConfigError` where timm can't make it, `CheckpointError` where its weights can't be had.
    """

    def __init__(self, teacher: Teacher, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.layers, self.sizes = list(teacher.layers) or None, teacher.sizes
        try:
            model = timm.create_model(
                teacher.name, pretrained=teacher.weights == "hub", num_classes=0, **teacher.kwargs
            )
            self.out_dim = model.feature_info[self.layers[-1] if self.layers else -1]["num_chs"]
        except OSError as error:  # of the hub's client
            raise CheckpointError(
                f"can't fetch the teacher {teacher.name}: {error}; give a file as teacher.weights"
            ) from error
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ConfigError(
                f"timm can't make the teacher {teacher.name!r} ({teacher.kwargs}, layers {self.layers}): {error}"
            ) from error
        if teacher.weights != "hub":
            load_timm_weights(model, teacher.weights)
        config = model.pretrained_cfg
        old_mean, old_std, new_mean, new_std = (
            torch.tensor(v).view(3, 1, 1) for v in (mean, std, config["mean"], config["std"])
        )
        self.register_buffer("factor", old_std / new_std)
        self.register_buffer("shift", (old_mean - new_mean) / new_std)
        self.model = model.to(memory_format=torch.channels_last).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "TeacherFeatures":
        return super().train(False)

    def draw_view(self) -> "View":
        """How one step's pictures are shown to it. Draws from the global random generator."""
        top, left = torch.randint(2, (2,)).tolist()
        return View(top, left, self.sizes[int(torch.randint(len(self.sizes), ()))] if self.sizes else None)

    def forward(self, pixels: Tensor, view: "View") -> tuple[list[Tensor], Tensor]:
        """[B, 3, H, W] -> feature maps [B, D, h, w], from fine to coarse; pooled features [B, D]."""
        pixels = (view(pixels) * self.factor + self.shift).contiguous(memory_format=torch.channels_last)
        last, maps = self.model.forward_intermediates(pixels, indices=self.layers, output_fmt="NCHW")
        return maps, self.model.forward_head(last)


@dataclass(frozen=True)
class View:
    """A picture moved up and to the left by a pixel or none (or a teacher's strides leave a grid), and scaled to `size` where given."""

    top: int = 0
    left: int = 0
    size: int | None = None

    def __call__(self, pixels: Tensor) -> Tensor:
        moved = F.pad(pixels[..., self.top :, self.left :], (0, self.left, 0, self.top), mode="replicate")
        return moved if self.size is None else F.interpolate(moved, size=self.size, mode="bicubic", antialias=True)


@dataclass
class StepResult:
    """What a step leaves: the loss to minimise, numbers for the log, and the codebook's inputs."""

    loss: Tensor
    metrics: dict[str, Tensor]
    lengths: Tensor  # [B]: learned, deterministic
    vectors: Tensor | None
    codes: Tensor | None


class Objective(nn.Module):
    """A tokenizer with everything that only its training needs. `forward` works for one stage at a time (`set_stage`)."""

    def __init__(self, tokenizer: DynamicVisualTokenizer, teacher: TeacherFeatures | None) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.teacher = teacher
        self.semantic = nn.Linear(tokenizer.codebook.embedding.shape[1], teacher.out_dim) if teacher else None
        self.codebook_trainer = CodebookTrainer(tokenizer.codebook)
        self.register_buffer("pixel_std", torch.tensor(tokenizer.config.image.std).view(3, 1, 1), persistent=False)
        self.stage: Stage | None = None

    def set_stage(self, stage: Stage) -> None:
        """Everything is trained from here on but the teacher, a backbone that is configured as frozen, and the stage's `freeze`.

        Raises `ConfigError` where the tokenizer lacks what the stage's losses need.
        """
        tok, weights = self.tokenizer, stage.weights
        if tok.config.decoder is None:
            raise ConfigError(
                "the tokenizer has no decoder, so nothing can be learned from what it makes; leave `decoder: null` out"
            )
        if tok.pixel_head is None and (
            weights.pixel or weights.perceptual or weights.recognition or "pixel_head" in stage.freeze
        ):
            raise ConfigError(
                f"stage {stage.name!r} trains pixels, but the tokenizer makes none; set decoder.pixels: true"
            )
        if self.teacher is None and weights.teaches:
            raise ConfigError(
                f"stage {stage.name!r} has a perceptual, recognition or semantic loss, but there is no teacher"
            )
        decoder, width = tok.config.decoder, tok.backbone.embed_dim
        if weights.feature and decoder.head == "none" and decoder.embed_dim not in (None, width):
            raise ConfigError(
                f"stage {stage.name!r} compares features, but the decoder's have {decoder.embed_dim} channels and the backbone's {width}; "
                "set decoder.head: mlp, or leave decoder.embed_dim out"
            )
        self.stage = stage
        self.requires_grad_(True)
        for part in self._frozen():
            part.requires_grad_(False)
        self.train(self.training)

    def _frozen(self) -> list[nn.Module]:
        parts = [getattr(self.tokenizer, name) for name in self.stage.freeze]
        parts += [self.tokenizer.backbone] * self.tokenizer.backbone.frozen
        return parts if self.teacher is None else [*parts, self.teacher]

    def train(self, mode: bool = True) -> "Objective":
        """Frozen parts stay in evaluation mode: batch statistics are not to move, either."""
        super().train(mode)
        for part in self._frozen() if self.stage else ():
            part.eval()
        return self

    def forward(self, pixels: Tensor) -> StepResult:
        """pixels: [B, 3, S, S]. Draws from the global random generator."""
        stage, tok, weights = self.stage, self.tokenizer, self.stage.weights
        features = tok.backbone(pixels)
        log_probs = tok.selector(features)
        keep, gate, blind = self.masks(log_probs)
        vectors = tok.projection(tok.merger(features, keep, gate)).float()
        codes = None
        if stage.quantize:
            rows, codes = tok.codebook.quantize(vectors)
        else:
            rows = F.normalize(vectors, dim=-1)
        cu_seqlens = cu_seqlens_from_mask(keep)
        known = torch.rand(len(pixels), device=pixels.device) >= stage.position_drop
        positions = torch.where(known.repeat_interleave(keep.sum(1)), keep.nonzero()[:, 1], -1)
        decoded = tok.decoder(rows, cu_seqlens, positions)

        metrics: dict[str, Tensor] = {}
        loss = pixels.new_zeros(())
        error = painted = None
        if weights.feature:
            metrics["feature"] = losses.feature_cosine(decoded, features)
            loss = loss + weights.feature * metrics["feature"]
            error = 1 - F.cosine_similarity(decoded.detach().float(), features.detach().float(), dim=-1)
        if tok.pixel_head is not None:
            painted = tok.pixel_head(decoded).float()
            patch_error = losses.patch_error(painted, pixels, tok.backbone.patch_size)
            metrics["pixel"] = patch_error.mean()
            squared = ((painted.detach() - pixels) * self.pixel_std).square().mean((1, 2, 3))  # [B], of values 0 to 1
            metrics["psnr"] = -10 * squared[known].log10().mean()  # NaN where no image has positions
            loss = loss + weights.pixel * metrics["pixel"]
            error = patch_error.detach() if error is None else error
        if weights.teaches:
            loss, error = self._teach(pixels, painted, rows, keep, known, loss, error, metrics)
        if codes is not None:
            metrics["commitment"] = losses.commitment(F.normalize(vectors, dim=-1), tok.codebook.lookup(codes))
            loss = loss + weights.commitment * metrics["commitment"]
        loss = loss + self._selector_losses(log_probs, error[known] if blind else None, known, metrics)
        metrics["loss"] = loss
        lengths = (log_probs[..., KEEP] > log_probs[..., DROP]).sum(1).clamp(min=1)
        return StepResult(
            loss, {name: value.detach() for name, value in metrics.items()}, lengths, vectors.detach(), codes
        )

    def masks(self, log_probs: Tensor) -> tuple[Tensor, Tensor | None, bool]:
        """By the stage's shares: (keep mask bool [B, N]; gate where the choice is the learned one; whether they are random)."""
        masks, (low, high) = self.stage.masks, self.stage.budgets
        draw = float(torch.rand(())) * (masks.learned + masks.budget + masks.random)
        count = max(1, round(log_probs.shape[1] * low * (high / low) ** float(torch.rand(()))))
        if draw < masks.learned:
            keep, gate = straight_through(log_probs)
            empty = ~keep.any(1)
            if empty.any():  # never without a token: the best patch stays
                best = KeepPolicy(budget=1)(log_probs.detach()) & empty[:, None]
                keep, gate = keep | best, torch.where(best, gate - gate.detach() + 1, gate)
            return keep, gate, False
        if draw < masks.learned + masks.budget:
            return KeepPolicy(budget=count)(log_probs.detach()), None, False
        noise = torch.rand_like(log_probs[..., 0])
        return noise.argsort(1).argsort(1) < count, None, True

    def _teach(
        self, pixels: Tensor, painted: Tensor | None, rows: Tensor, keep: Tensor, known: Tensor, loss: Tensor, error: Tensor | None,
        metrics: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Adds the losses with the teacher, and the perceptual one to each patch's error."""
        weights = self.stage.weights
        view = self.teacher.draw_view()
        with torch.no_grad():
            targets, wanted = self.teacher(pixels, view)
        if weights.perceptual or weights.recognition:
            maps, seen = self.teacher(painted, view)
            recognition = losses.centred_cosine(seen, wanted)  # [B]
            metrics["recognition"] = recognition.mean()
            loss = (
                loss
                + weights.recognition * (recognition * torch.where(known, 1.0, weights.recognition_unplaced)).mean()
            )
            distances = losses.perceptual(maps, targets)  # [B]
            metrics["perceptual"] = distances.mean()
            loss = loss + weights.perceptual * (distances * torch.where(known, 1.0, weights.perceptual_unplaced)).mean()
            with torch.no_grad():
                per_patch = losses.perceptual_per_patch(maps, targets, self.tokenizer.backbone.grid)
                error = error / error.mean() + 0.5 * per_patch / per_patch.mean()
        if weights.semantic:
            image = keep.nonzero()[:, 0]
            pooled = rows.new_zeros(len(pixels), rows.shape[1]).index_add(0, image, rows) / keep.sum(1, keepdim=True)
            wanted = targets[-1].float().mean((2, 3))
            pooled = (pooled - pooled.mean(0)) / (
                pooled.std(0, correction=0) + 1e-4
            )  # codes differ little from image to image in the mean
            metrics["semantic"] = (
                1 - F.cosine_similarity(self.semantic(pooled).float(), wanted - wanted.mean(0), dim=-1)
            ).mean()
            loss = loss + weights.semantic * metrics["semantic"]
        return loss, error

    def _selector_losses(
        self, log_probs: Tensor, error: Tensor | None, known: Tensor, metrics: dict[str, Tensor]
    ) -> Tensor:
        """error: [B', N], what random masks left, of the images with known positions; None where the masks were not random."""
        stage = self.stage
        probability = log_probs[..., KEEP].exp()
        # the deterministic choice with the gradient of its probability: the rate is set for what inference does
        chosen = (
            (log_probs[..., KEEP] > log_probs[..., DROP]).to(probability.dtype) + probability - probability.detach()
        )
        metrics["keep"] = _mean_over_ranks(chosen.mean())
        metrics["rate"] = losses.rate(metrics["keep"], stage.rho)
        total = stage.weights.rate * metrics["rate"]
        if stage.weights.local and error is not None and len(error):
            score = (log_probs[..., KEEP] - log_probs[..., DROP])[known]
            bias = self.tokenizer.selector.position_bias
            score = score if bias is None else score - bias.detach()
            metrics["local"] = losses.local(score, losses.around(error, self.tokenizer.backbone.grid))
            total = total + stage.weights.local * metrics["local"]
        return total


def _mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a scalar over all ranks, with the gradient of this rank's own: data-parallel training averages gradients."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return value + (total / dist.get_world_size() - value.detach())
