"""Feature distillation: small heads predict a fixed teacher's features of the original from the tokenizer's own.

A loss on the painted picture reaches the encoder through the pixels and the decoder. Here the path is shorter: the
teacher's features must be predictable from those of the backbone and of the decoder. The heads serve training alone;
no checkpoint of a tokenizer has them. Not here: losses on the painted picture (`losses.py`).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HIDDEN = 384  # channels of a head
_BACKBONE = 0.5  # factor of the backbone's term, beside 1 of the decoder's


class Distillation(nn.Module):
    """The loss `weights.distill`, with a head for the backbone's features and one for the decoder's.

    backbone, decoder: channels of the two. maps: channels of the teacher's feature maps. pooled: channels of its pooled
    features.
    """

    def __init__(self, backbone: int, decoder: int, maps: Sequence[int], pooled: int) -> None:
        super().__init__()
        self.backbone_head = _Head(backbone, maps, pooled)
        self.decoder_head = _Head(decoder, maps, pooled)

    def forward(
        self,
        features: Tensor,
        decoded: Tensor,
        grid: tuple[int, int],
        maps: Sequence[Tensor],
        pooled: Tensor,
        known: Tensor,
    ) -> Tensor:
        """Returns the loss, a scalar in 0..6: 1 - cosine of predicted and of real features, at all places of the maps
        and of the pooled ones.

        features: [B, N, D] of the backbone; their term is skipped if they need no gradient.
        decoded: [B, N, D'] of the decoder, before the pixels.
        maps: the teacher's, of the originals, [B, C, h, w] each. pooled: the same, [B, P].
        known: bool [B], which pictures were decoded with positions. The decoder does not know where the content of the
            others lies, and their maps do not count for it.

        Targets are centered over this rank's batch: every channel of a map gets mean 0 and standard deviation 1, pooled
        features get mean 0. A batch of one picture has no pooled term.
        """
        targets = [_standardized(target.detach().float()) for target in maps]
        pooled = pooled.detach().float() - pooled.detach().float().mean(0)
        sizes = [(target.shape[2], target.shape[3]) for target in targets]
        every, total = torch.ones_like(known), pooled.new_zeros(())
        for head, own, counted, factor in (
            (self.backbone_head, features, every, _BACKBONE),
            (self.decoder_head, decoded, known, 1.0),
        ):
            if not own.requires_grad:
                continue
            found, found_pooled = head(own, grid, sizes)
            distances = [_distance(a, b).mean((1, 2)) for a, b in zip(found, targets, strict=True)]  # [B] each
            total = total + factor * (torch.stack(distances).mean(0) * counted).sum() / counted.sum().clamp(min=1)
            if len(pooled) > 1:
                total = total + factor * _distance(found_pooled, pooled).mean()
        return total


class _Head(nn.Module):
    """Features of patches [B, N, D] -> maps [B, C, h, w] of the sizes that are asked for, pooled features [B, P]."""

    def __init__(self, width: int, maps: Sequence[int], pooled: int) -> None:
        super().__init__()
        self.norm, self.hidden = nn.LayerNorm(width), nn.Linear(width, _HIDDEN)
        self.maps = nn.ModuleList(nn.Conv2d(_HIDDEN, channels, 1) for channels in maps)
        self.pooled = nn.Sequential(nn.Linear(_HIDDEN, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, pooled))

    def forward(
        self, features: Tensor, grid: tuple[int, int], sizes: Sequence[tuple[int, int]]
    ) -> tuple[list[Tensor], Tensor]:
        x = F.gelu(self.hidden(self.norm(features)))
        patches = x.mT.unflatten(2, grid)  # [B, hidden, rows, columns]
        maps = [layer(F.adaptive_avg_pool2d(patches, size)) for layer, size in zip(self.maps, sizes, strict=True)]
        return maps, self.pooled(x.mean(1))


def _distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Returns 1 - cosine over the channels: [B, C, ...] -> [B, ...]."""
    return 1 - F.cosine_similarity(found.float(), wanted, dim=1)


def _standardized(maps: Tensor) -> Tensor:
    """Returns maps [B, C, h, w] with mean 0 and standard deviation 1 in every channel."""
    variance, mean = torch.var_mean(maps, (0, 2, 3), correction=0, keepdim=True)
    return (maps - mean) / (variance + 1e-6).sqrt()
