"""The last pictures of a run, with which the semantic loss compares those of a batch."""

import torch
from torch import Tensor, nn

from dyntok.training import losses

_PICTURES = 256


class PictureBank(nn.Module):
    """Pooled code vectors and teacher features of the last 256 pictures.

    A batch alone has too few pairs of pictures: what it says about similarities is mostly chance.
    """

    vectors: Tensor
    targets: Tensor
    added: Tensor

    def __init__(self, vector_dim: int, target_dim: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(_PICTURES, vector_dim))
        self.register_buffer("targets", torch.zeros(_PICTURES, target_dim))
        self.register_buffer("added", torch.zeros((), dtype=torch.int64))

    def compare(self, vectors: Tensor, targets: Tensor) -> Tensor | None:
        """Returns the loss of a batch's similarities to the bank's pictures, and puts the batch into the bank.

        vectors [B, C], targets [B, D] -> scalar in 0..2; None until the bank is full.
        """
        full = self.added >= _PICTURES
        loss = losses.similarities(vectors, targets, self.vectors, self.targets) if full else None
        kept = vectors.detach()[-_PICTURES:].float()
        places = (self.added + torch.arange(len(kept), device=kept.device)) % _PICTURES
        self.vectors[places], self.targets[places] = kept, targets[-_PICTURES:].float()
        self.added += len(kept)
        return loss
