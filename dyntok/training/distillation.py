"""Feature distillation: heads predict what a teacher finds in the original, from the tokenizer's own features.

A loss on the painted picture reaches the encoder through the decoder, the pixels and the teacher. This one is shorter:
features from which a teacher's features can be told carry what the picture shows. The heads are for training alone and
are in no checkpoint of a tokenizer. Not here: losses on the painted picture (`losses.py`).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HIDDEN = 384  # channels of a head
_MEMORY = 100  # batches over which means and variances are taken
_BACKBONE = 0.5  # share of the loss on the backbone's features, beside 1 on the decoder's


class Distillation(nn.Module):
    """The loss `weights.distill`, and its two heads: on the backbone's features and on the decoder's.

    backbone, decoder: channels of the two. maps: channels of the teacher's feature maps that are predicted, the last
    ones. pooled: channels of its pooled features.
    """

    def __init__(self, backbone: int, decoder: int, maps: Sequence[int], pooled: int) -> None:
        super().__init__()
        self.of_backbone = _Head(backbone, maps, pooled)
        self.of_decoder = _Head(decoder, maps, pooled)
        self.scales = nn.ModuleList(_RunningScale(channels) for channels in maps)
        self.pooled_scale = _RunningScale(pooled)

    def forward(
        self, features: Tensor, decoded: Tensor, grid: tuple[int, int], maps: Sequence[Tensor], pooled: Tensor
    ) -> Tensor:
        """Returns the loss, a scalar in 0..6: 1 - cosine, of the maps' positions and of pooled features.

        features: [B, N, D] of the backbone. decoded: [B, N, D'] of the decoder, before pixels. maps: the teacher's last
        maps of the originals, [B, C, h, w]. pooled: its pooled features, [B, P]. Targets are compared after their mean
        over the last batches was subtracted, and maps are divided by their deviation.
        """
        wanted = []
        for scale, target in zip(self.scales, maps, strict=True):
            centered, deviation = scale(target.movedim(1, -1))
            wanted.append(centered / deviation)
        wanted_pooled, _ = self.pooled_scale(pooled)
        sizes = [(target.shape[1], target.shape[2]) for target in wanted]
        total = pooled.new_zeros((), dtype=torch.float32)
        for head, own, weight in ((self.of_backbone, features, _BACKBONE), (self.of_decoder, decoded, 1.0)):
            found, found_pooled = head(own, grid, sizes)
            distances = [_distance(a, b) for a, b in zip(found, wanted, strict=True)]
            total = total + weight * (torch.stack(distances).mean() + _distance(found_pooled, wanted_pooled))
        return total


class _Head(nn.Module):
    """Features of patches [B, N, D] -> maps [B, h, w, C] of the sizes that are asked for, pooled features [B, P]."""

    def __init__(self, width: int, maps: Sequence[int], pooled: int) -> None:
        super().__init__()
        self.norm, self.hidden = nn.LayerNorm(width), nn.Linear(width, _HIDDEN)
        self.maps = nn.ModuleList(nn.Linear(_HIDDEN, channels) for channels in maps)
        self.pooled = nn.Sequential(nn.Linear(_HIDDEN, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, pooled))

    def forward(
        self, features: Tensor, grid: tuple[int, int], sizes: Sequence[tuple[int, int]]
    ) -> tuple[list[Tensor], Tensor]:
        x = F.gelu(self.hidden(self.norm(features)))
        lattice = x.mT.unflatten(2, grid)  # [B, hidden, rows, columns]
        resized = [F.adaptive_avg_pool2d(lattice, size).movedim(1, -1) for size in sizes]
        return [layer(rows) for layer, rows in zip(self.maps, resized, strict=True)], self.pooled(x.mean(1))


class _RunningScale(nn.Module):
    """Mean and deviation of every channel over the last batches of rows [..., C]. No gradient flows."""

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the rows less the mean, in float32, and the deviation [C]."""
        rows = rows.float()
        if self.training:
            flat = rows.flatten(0, -2)
            mean, variance = flat.mean(0), flat.var(0, correction=0)
            if bool((mean + variance).isfinite().all()):  # a bad batch must not spoil those after it
                self.batches += 1
                share = 1 / min(int(self.batches), _MEMORY)
                self.mean.lerp_(mean, share)
                self.variance.lerp_(variance, share)
        return rows - self.mean, (self.variance + 1e-6).sqrt()


def _distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Returns the mean of 1 - cosine over all rows [..., C]."""
    return (1 - F.cosine_similarity(found.float(), wanted, dim=-1)).mean()
