"""The last pictures of a stage, with which the semantic loss compares those of a batch."""

import torch
from torch import Tensor, nn

from dyntok.training import losses
from dyntok.training.codebook import gather_rows_of_ranks

_PICTURES = 256


class PictureBank(nn.Module):
    """Pooled code vectors and teacher features of the last 256 pictures.

    A batch alone has too few pairs of pictures: what it says about similarities is mostly chance. All ranks of a
    data-parallel run hold the same pictures.
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
        """Returns the loss of a batch's similarities to the bank's pictures; None until the bank is full.

        vectors [B, C], targets [B, D] -> scalar in 0..2.
        """
        if self.added < len(self.vectors):
            return None
        return losses.similarities(vectors, targets, self.vectors, self.targets)

    @torch.no_grad()
    def add(self, vectors: Tensor, targets: Tensor) -> None:
        """Puts the pictures of all ranks into the bank, in place of the oldest: vectors [B, C], targets [B, D]."""
        size = len(self.vectors)
        vectors, targets = (gather_rows_of_ranks(rows.float())[-size:] for rows in (vectors, targets))
        places = (self.added + torch.arange(len(vectors), device=vectors.device)) % size
        self.vectors[places], self.targets[places] = vectors, targets
        self.added += len(vectors)

    def clear(self) -> None:
        """Forgets all pictures: vectors of another stage may mean something else."""
        self.added.zero_()
