"""Pictures that a language model only reads: continuous tokens, projected, as a prefix of embeddings before the
text.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dyntok.errors import CodeError, ConfigError
from dyntok.features import Features
from dyntok.llm.packing import IGNORED
from dyntok.structure import require_whole


@dataclass(frozen=True)
class Prefixed:
    """What `model(**vars(prefixed))` takes: rows of a picture's tokens and then the text, padded to one length.

    inputs_embeds   float [B, L, E]
    attention_mask  int64 [B, L]
    labels          int64 [B, L], -100 on pictures and padding; None where none were given
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    labels: Tensor | None


class VisualPrefix(nn.Module):
    """Projects `Features` of width D to a model's width E and puts them before the embedded text.

    kind: "linear", or "mlp" (linear, GELU, linear)

    >>> prefix = VisualPrefix(tok.backbone.embed_dim, model.config.hidden_size)
    >>> rows = prefix(tok.features(photos), model.get_input_embeddings()(ids), mask, labels)
    >>> model(**vars(rows)).loss.backward()
    """

    def __init__(self, width: int, embed_dim: int, *, kind: Literal["linear", "mlp"] = "linear") -> None:
        super().__init__()
        if kind not in ("linear", "mlp"):
            raise ConfigError(f"kind is {kind!r}, expected 'linear' or 'mlp'")
        require_whole("width", width, 1)
        require_whole("embed_dim", embed_dim, 1)
        layers: list[nn.Module] = [nn.Linear(width, embed_dim)]
        if kind == "mlp":
            layers += [nn.GELU(), nn.Linear(embed_dim, embed_dim)]
        self.projection = nn.Sequential(*layers)

    def forward(
        self,
        features: Features,
        text: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        side: Literal["right", "left"] = "right",
    ) -> Prefixed:
        """Returns the text with its picture before it, without padding between the two.

        text: embeddings [B, L, E] of one text per image. attention_mask: [B, L], false at padding (None: no padding).
        side: of the new padding, "left" for `generate`.

        Raises `CodeError` if there is no image, or the numbers of images and texts, or the shapes, differ.
        """
        if text.dim() != 3 or len(features) != len(text) or not len(text):
            raise CodeError(
                f"{len(features)} images came with text embeddings {list(text.shape)}, expected at least one, and "
                f"[{len(features)}, L, E]"
            )
        for name, given in (("attention_mask", attention_mask), ("labels", labels)):
            if given is not None and given.shape != text.shape[:2]:
                raise CodeError(f"{name} has shape {list(given.shape)}, expected {list(text.shape[:2])}, as the text")
        mask = (
            torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
            if attention_mask is None
            else attention_mask.bool()
        )
        visual = (
            self.projection(features.tokens.to(next(self.projection.parameters()).dtype))
            .to(text.dtype)
            .split(features.lengths.tolist())
        )
        rows = [torch.cat([image, row[kept]]) for image, row, kept in zip(visual, text, mask, strict=True)]
        ones = [torch.ones(len(row), dtype=torch.long, device=text.device) for row in rows]
        targets = None
        if labels is not None:
            texts = [row[kept] for row, kept in zip(labels, mask, strict=True)]
            ignored = [row.new_full((len(image),), IGNORED) for row, image in zip(texts, visual, strict=True)]
            targets = _padded([torch.cat(pair) for pair in zip(ignored, texts, strict=True)], IGNORED, side)
        return Prefixed(_padded(rows, 0, side), _padded(ones, 0, side), targets)


def _padded(rows: list[Tensor], fill: int, side: str) -> Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill, padding_side=side)
