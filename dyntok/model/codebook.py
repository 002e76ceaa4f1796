"""Vectors to codes and back: l2-normalized nearest-neighbour lookup (paper section 3.1), and the statistics that train a codebook.

`Codebook` is what a tokenizer holds; `CodebookTrainer` updates it by exponential moving averages, never by gradients.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dyntok.errors import CodeError, ConfigError
from dyntok_kernels import codebook_stats, nearest_code


class Codebook(nn.Module):
    """K rows of dimension C. Search compares l2-normalized vectors with the rows as stored; the lowest index wins a tie."""

    embedding: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("embedding", F.normalize(torch.randn(size, dim), dim=-1))

    def forward(self, vectors: Tensor) -> Tensor:
        """Vectors [T, C] of any length, on any scale -> codes, LongTensor [T]. Computed in the codebook's dtype, at least float32."""
        with torch.autocast(vectors.device.type, enabled=False):
            rows = self.embedding if self.embedding.dtype == torch.float64 else self.embedding.float()
            return nearest_code(vectors.to(rows.dtype), rows)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [T] -> rows [T, C]. Raises `CodeError` on a code outside 0..K-1."""
        if codes.numel():
            low, high = int(codes.min()), int(codes.max())
            if low < 0 or high >= len(self.embedding):
                wrong = low if low < 0 else high
                raise CodeError(f"code {wrong} is out of range, this codebook has codes 0 to {len(self.embedding) - 1}")
        return self.embedding[codes]

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """For training: vectors [T, C] -> (rows [T, C] with the gradient of the normalized vectors, codes [T])."""
        codes = self(vectors)
        z = F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)
        return z + (self.embedding[codes] - z).detach(), codes


def perplexity(counts: Tensor) -> float:
    """exp(entropy) of code counts [K]: the number of codes that, equally used, would be as varied. 0 where nothing was counted."""
    total = counts.sum()
    if total == 0:
        return 0.0
    p = counts[counts > 0].double() / total
    return float((-(p * p.log()).sum()).exp())


class CodebookTrainer(nn.Module):
    """Running counts and sums per code, from which its rows are made; the same on every rank of a data-parallel run.

    decay: of the moving averages per update. Codes whose running share falls below `revive_below` times the average are given a recent
    input instead (dead-code revival).
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
        """One step from vectors [T, C] and their codes [T]. Returns how many codes were revived.

        generator: seeded alike on every rank.
        """
        z = F.normalize(vectors.detach().float(), dim=-1)
        counts, sums = codebook_stats(z, codes, len(self.counts))
        if dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        seen = self.counts > 0
        codebook.embedding[seen] = F.normalize(self.sums[seen], dim=-1).to(codebook.embedding.dtype)
        return self._revive(codebook, z, generator)

    def _revive(self, codebook: Codebook, z: Tensor, generator: torch.Generator) -> int:
        average = self.counts.mean()
        dead = (self.counts < self.revive_below * average).nonzero()[:, 0]
        candidates = gather_rows_of_ranks(z)
        dead = dead[: len(candidates)]
        if len(dead) == 0:
            return 0
        picked = candidates[torch.randperm(len(candidates), generator=generator)[: len(dead)].to(z.device)]
        codebook.embedding[dead] = picked.to(codebook.embedding.dtype)
        share = average * max(0.5, 2 * self.revive_below)  # long enough alive to win vectors of its own
        self.counts[dead] = share
        self.sums[dead] = picked * share
        return len(dead)

    @torch.no_grad()
    def start(self, codebook: Codebook, vectors: Tensor, *, iterations: int = 10, generator: torch.Generator) -> None:
        """k-means on the sphere from vectors [T, C] (T of at least K wants to be several times K); fills the codebook.

        The same vectors and generator must be given on every rank. Raises `CodeError` with fewer vectors than codes, `ConfigError` without
        iterations.
        """
        size = len(codebook.embedding)
        if iterations < 1:
            raise ConfigError(f"k-means got {iterations} iterations, expected at least 1")
        if len(vectors) < size:
            raise CodeError(
                f"k-means got {len(vectors)} vectors for {size} codes, expected at least as many vectors as codes"
            )
        z = F.normalize(vectors.float(), dim=-1)
        codebook.embedding.copy_(z[torch.randperm(len(z), generator=generator)[:size].to(z.device)])
        for _ in range(iterations):
            codes = torch.cat([codebook(part) for part in z.split(8192)])
            counts, sums = codebook_stats(z, codes, size)
            empty = (counts == 0).nonzero()[:, 0]
            rows = F.normalize(sums, dim=-1)
            rows[empty] = z[torch.randperm(len(z), generator=generator)[: len(empty)].to(z.device)]
            codebook.embedding.copy_(rows)
        self.counts.copy_(counts.clamp(min=1e-3 * float(counts.mean())))
        self.counts.div_(self.counts.mean())
        self.sums.copy_(codebook.embedding * self.counts[:, None])


def gather_rows_of_ranks(rows: Tensor) -> Tensor:
    """[T, C] on each rank, T differing -> all of them [sum T, C] on every rank, in rank order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = int(torch.cat(counts).max())
    padded = [rows.new_zeros(longest, rows.shape[1]) for _ in counts]
    dist.all_gather(padded, F.pad(rows, (0, 0, 0, longest - len(rows))))
    return torch.cat([part[: int(n)] for part, n in zip(padded, counts, strict=True)])
