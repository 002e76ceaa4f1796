"""One training step's forward pass: choose masks, encode, decode, add up the losses."""

import math
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyntok.backbone import load_timm_weights
from dyntok.codebook import CodebookTrainer
from dyntok.merger import cu_seqlens_of
from dyntok.selector import KEEP, KeepPolicy, straight_through
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.training import losses
from dyntok.training.recipe import Stage, Teacher


class TeacherFeatures(nn.Module):
    """Feature maps of a fixed timm network, from pixels normalised as the tokenizer's."""

    def __init__(self, teacher: Teacher, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        model = timm.create_model(teacher.name, pretrained=teacher.weights == "hub", num_classes=0, **teacher.kwargs)
        if teacher.weights != "hub":
            load_timm_weights(model, teacher.weights)
        self.layers = list(teacher.layers) or None
        config = model.pretrained_cfg
        old_mean, old_std, new_mean, new_std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std, config["mean"], config["std"]))
        self.register_buffer("factor", old_std / new_std)
        self.register_buffer("shift", (old_mean - new_mean) / new_std)
        self.model = model.to(memory_format=torch.channels_last).requires_grad_(False).eval()
        self.out_dim = model.feature_info[self.layers[-1] if self.layers else -1]["num_chs"]

    def train(self, mode: bool = True) -> "TeacherFeatures":
        return super().train(False)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> feature maps [B, D, h, w], from fine to coarse."""
        pixels = (pixels * self.factor + self.shift).contiguous(memory_format=torch.channels_last)
        return self.model.forward_intermediates(pixels, indices=self.layers, output_fmt="NCHW", intermediates_only=True)


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
        width = tokenizer.backbone.embed_dim
        # predicts each patch's error if kept and if dropped, given the share of kept patches: the selector's critic
        self.critic_in = nn.Linear(width + 1, width // 2)
        self.critic_out = nn.Linear(width // 2, 2)
        self.semantic = nn.Linear(tokenizer.codebook.embedding.shape[1], teacher.out_dim) if teacher else None
        self.codebook_trainer = CodebookTrainer(tokenizer.codebook)
        self.stage: Stage | None = None

    def set_stage(self, stage: Stage) -> None:
        self.stage = stage
        self.requires_grad_(True)
        for module in (self.tokenizer.backbone if self.tokenizer.backbone.frozen else None, self.teacher):
            if module is not None:
                module.requires_grad_(False)
        for name in stage.freeze:
            getattr(self.tokenizer, name).requires_grad_(False)

    def forward(self, pixels: Tensor) -> StepResult:
        """pixels: [B, 3, S, S]. Draws from the global random generator."""
        stage, tok, weights = self.stage, self.tokenizer, self.stage.weights
        features = tok.backbone(pixels)
        log_probs = tok.selector(features)
        keep, gate = self.masks(log_probs)
        vectors = tok.projection(tok.merger(features, keep, gate)).float()
        codes = None
        if stage.quantize:
            rows, codes = tok.codebook.quantize(vectors)
        else:
            rows = F.normalize(vectors, dim=-1)
        cu_seqlens = cu_seqlens_of(keep)
        positions = keep.nonzero()[:, 1]
        if stage.position_drop:
            unknown = torch.rand(len(pixels), device=pixels.device) < stage.position_drop
            positions = torch.where(unknown.repeat_interleave(keep.sum(1)), -1, positions)
        decoded = tok.decoder(rows, cu_seqlens, positions)

        metrics: dict[str, Tensor] = {}
        loss = pixels.new_zeros(())
        error = None
        if weights.feature:
            metrics["feature"] = losses.feature_cosine(decoded, features)
            loss = loss + weights.feature * metrics["feature"]
            error = 1 - F.cosine_similarity(decoded.detach().float(), features.detach().float(), dim=-1)
        if tok.pixel_head is not None:
            painted = tok.pixel_head(decoded).float()
            patch_error = losses.patch_error(painted, pixels, tok.backbone.patch_size)
            metrics["pixel"] = patch_error.mean()
            known = positions.new_zeros(len(pixels), dtype=torch.bool).index_put_((keep.nonzero()[:, 0],), positions >= 0)
            peak = 1 / max(tok.config.image.std)
            metrics["psnr"] = (10 * (peak**2 / patch_error.detach().mean(1)).log10())[known].mean() if known.any() else patch_error.new_tensor(math.nan)
            loss = loss + weights.pixel * metrics["pixel"]
            error = patch_error.detach() if error is None else error
            if self.teacher is not None and (weights.perceptual or weights.semantic):
                loss, error = self._teach(pixels, painted, rows, keep, loss, error, metrics)
        if codes is not None:
            metrics["commitment"] = losses.commitment(F.normalize(vectors, dim=-1), tok.codebook.lookup(codes))
            loss = loss + weights.commitment * metrics["commitment"]
        loss = loss + self._selector_losses(features, log_probs, keep, error, metrics)
        metrics["loss"] = loss
        lengths = (log_probs[..., KEEP] > log_probs[..., 1]).sum(1).clamp(min=1)
        return StepResult(loss, {name: value.detach() for name, value in metrics.items()}, lengths, vectors.detach(), codes)

    def masks(self, log_probs: Tensor) -> tuple[Tensor, Tensor | None]:
        masks, (low, high) = self.stage.masks, self.stage.budgets
        draw = float(torch.rand(())) * (masks.learned + masks.budget + masks.random)
        count = max(1, round(log_probs.shape[1] * low * (high / low) ** float(torch.rand(()))))
        if draw < masks.learned:
            keep, gate = straight_through(log_probs)
            empty = ~keep.any(1)
            if empty.any():  # never without a token: the best patch stays
                best = KeepPolicy(budget=1)(log_probs.detach()) & empty[:, None]
                keep, gate = keep | best, torch.where(best, gate - gate.detach() + 1, gate)
            return keep, gate
        if draw < masks.learned + masks.budget:
            return KeepPolicy(budget=count)(log_probs.detach()), None
        noise = torch.rand_like(log_probs[..., 0])
        return noise.argsort(1).argsort(1) < count, None

    def _teach(self, pixels, painted, rows, keep, loss, error, metrics):
        weights = self.stage.weights
        with torch.no_grad():
            targets = self.teacher(pixels)
        if weights.perceptual:
            maps = self.teacher(painted)
            metrics["perceptual"] = losses.perceptual(maps, targets)
            loss = loss + weights.perceptual * metrics["perceptual"]
            with torch.no_grad():
                per_patch = losses.perceptual_per_patch(maps, targets, self.tokenizer.backbone.grid)
                error = error / error.mean() + per_patch / per_patch.mean()
        if weights.semantic:
            image = keep.nonzero()[:, 0]
            pooled = rows.new_zeros(len(pixels), rows.shape[1]).index_add(0, image, rows) / keep.sum(1, keepdim=True)
            wanted = targets[-1].float().mean((2, 3))
            pooled = (pooled - pooled.mean(0)) / (pooled.std(0) + 1e-4)  # codes differ little from image to image in the mean
            metrics["semantic"] = (1 - F.cosine_similarity(self.semantic(pooled).float(), wanted - wanted.mean(0), dim=-1)).mean()
            loss = loss + weights.semantic * metrics["semantic"]
        return loss, error

    def _selector_losses(self, features: Tensor, log_probs: Tensor, keep: Tensor, error: Tensor, metrics: dict) -> Tensor:
        stage = self.stage
        probability = log_probs[..., KEEP].exp()
        # the deterministic choice with the gradient of its probability: the rate is set for what inference does
        chosen = (log_probs[..., KEEP] > log_probs[..., 1]).to(probability.dtype) + probability - probability.detach()
        metrics["rate"] = losses.rate(chosen, stage.rho)
        metrics["keep"] = chosen.mean()
        total = stage.weights.rate * metrics["rate"]
        if stage.weights.local:
            target = (error / error.mean()).clamp(min=1e-3).log()
            predicted = self._critic(features, keep.float().mean(1))
            metrics["critic"] = F.mse_loss(torch.where(keep, predicted[..., 0], predicted[..., 1]), target)
            with torch.no_grad():
                kept, dropped = self._critic(features, torch.full_like(features[:, 0, 0], stage.rho).float()).exp().unbind(-1)
            metrics["gain"] = (dropped - kept).mean()
            total = total + metrics["critic"] + stage.weights.local * losses.local_choice(log_probs, dropped - kept)
        return total

    def _critic(self, features: Tensor, share: Tensor) -> Tensor:
        """Log of the relative error of each patch, kept and dropped: [B, N, D], [B] -> [B, N, 2]."""
        share = share[:, None, None].expand(*features.shape[:2], 1)
        x = torch.cat([F.layer_norm(features.detach().float(), features.shape[-1:]), share], dim=-1)
        return self.critic_out(F.gelu(self.critic_in(x))).float()
