"""Learns a codebook from vectors: k-means at the start, then exponential moving averages and revival of dead codes.

Rows never receive gradients. Not here: the search for the nearest row (`dyntok/model/codebook.py`).
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dyntok.errors import CodeError
from dyntok.model.codebook import Codebook
from dyntok_kernels import codebook_stats

KMEANS_ITERATIONS = 10
VECTORS_PER_SEARCH = 8192  # bounds the memory of one search during k-means


class CodebookTrainer(nn.Module):
    """Keeps running counts and sums per code and makes the codebook's rows from them.

    All ranks of a data-parallel run hold the same state.

    decay: weight of the old averages in each update.
    revive_below: a code whose running count falls below this fraction of the average is dead; it is replaced by a
    recent vector.
    """

    counts: Tensor
    sums: Tensor

    def __init__(self, codebook: Codebook, *, decay: float = 0.98, revive_below: float = 0.1) -> None:
        super().__init__()
        self.decay, self.revive_below = decay, revive_below
        self.register_buffer("counts", torch.ones(len(codebook.embedding)))
        self.register_buffer("sums", codebook.embedding.detach().clone().float())

    @torch.no_grad()
    def update(self, codebook: Codebook, vectors: Tensor, codes: Tensor, generator: torch.Generator) -> int:
        """Update the rows from vectors [T, C] and their codes [T]; returns the number of revived codes.

        generator: must have the same seed on every rank.

        Raises `CodeError`, and changes nothing, if a vector of any rank is NaN or infinite.
        """
        z = F.normalize(vectors.detach().float(), dim=-1)
        counts, sums = codebook_stats(z, codes, len(self.counts))
        if dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        _check_finite(sums, "CodebookTrainer.update")  # the same sums on every rank, so all of them raise
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        seen = self.counts > 0
        codebook.embedding[seen] = F.normalize(self.sums[seen], dim=-1).to(codebook.embedding.dtype)
        return self._revive(codebook, z, generator)

    def _revive(self, codebook: Codebook, z: Tensor, generator: torch.Generator) -> int:
        average = self.counts.mean()
        dead = (self.counts < self.revive_below * average).nonzero()[:, 0]
        if len(dead) == 0:  # on every rank alike: the counts are the same
            return 0
        candidates = gather_rows_of_ranks(z)
        dead = dead[: len(candidates)]
        picked = candidates[
            torch.randperm(len(candidates), generator=generator, device="cpu")[: len(dead)].to(z.device)
        ]
        codebook.embedding[dead] = picked.to(codebook.embedding.dtype)
        # a count high enough that the code survives until it wins vectors of its own
        count = average * max(0.5, 2 * self.revive_below)
        self.counts[dead] = count
        self.sums[dead] = picked * count
        return len(dead)

    @torch.no_grad()
    def start(self, codebook: Codebook, vectors: Tensor, *, generator: torch.Generator) -> None:
        """Fill the codebook by k-means on the sphere from vectors [T, C]; T should be several times K.

        Every rank must pass the same vectors and generator.

        Raises `CodeError` if there are fewer vectors than codes, or if a vector is NaN or infinite.
        """
        size = len(codebook.embedding)
        if len(vectors) < size:
            raise CodeError(f"k-means got {len(vectors)} vectors for {size} codes, expected at least {size} vectors")
        _check_finite(vectors, "k-means")
        z = F.normalize(vectors.float(), dim=-1)
        codebook.embedding.copy_(z[torch.randperm(len(z), generator=generator, device="cpu")[:size].to(z.device)])
        for _ in range(KMEANS_ITERATIONS):
            codes = torch.cat([codebook(part) for part in z.split(VECTORS_PER_SEARCH)])
            counts, sums = codebook_stats(z, codes, size)
            empty = (counts == 0).nonzero()[:, 0]
            rows = F.normalize(sums, dim=-1)
            rows[empty] = z[torch.randperm(len(z), generator=generator, device="cpu")[: len(empty)].to(z.device)]
            codebook.embedding.copy_(rows)
        self.counts.copy_(counts.clamp(min=1e-3 * float(counts.mean())))
        self.counts.div_(self.counts.mean())
        self.sums.copy_(codebook.embedding * self.counts[:, None])


def _check_finite(values: Tensor, receiver: str) -> None:
    if not values.isfinite().all():
        raise CodeError(
            f"{receiver} got vectors with NaN or infinite values, expected finite ones; the network diverged or half "
            "precision overflowed: lower the learning rate, or set precision: fp32"
        )


def gather_rows_of_ranks(rows: Tensor) -> Tensor:
    """Returns the rows [T, C] of all ranks, in rank order; T may differ between ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = int(torch.cat(counts).max())
    padded = [rows.new_zeros(longest, rows.shape[1]) for _ in counts]
    dist.all_gather(padded, F.pad(rows, (0, 0, 0, longest - len(rows))))
    return torch.cat([part[: int(n)] for part, n in zip(padded, counts, strict=True)])
