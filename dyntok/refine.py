"""`encode(refine=)`: codes near each vector are tried, and those from which the decoder paints a closer picture stay.

The nearest code of a vector need not be the best one, because the decoder looks at the codes around it, too, and these
are rounded as well. Here the painted picture decides (analysis by synthesis): its pixels, and the features that the
backbone finds in it. Not here: the search for the nearest code (`model/codebook.py`), and which patches are kept
(`policy.py`, `target.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dyntok.device import sent_to
from dyntok.errors import ConfigError

MOST = 15  # rounds
_NEAR = MOST + 1  # codes of a token: the nearest, and those that the rounds try
_APART = 3  # patches between tokens that change at once; each is judged by the 3 x 3 patches around it
# Weight of the features' relative error, which then makes up about two thirds of the sum. With pixels alone, networks
# recognize fewer pictures.
_FEATURES = 0.1
_ROWS = 1024  # vectors that are compared with the whole codebook at once


def check_rounds(rounds: int, *, margins: bool) -> int:
    """Returns the number of rounds.

    Raises `ConfigError` where `refine` is not an int from 0 to 15, or comes with `margins`.
    """
    whole = isinstance(rounds, int | np.integer) and not isinstance(rounds, bool)
    if not whole or not 0 <= rounds <= MOST:
        raise ConfigError(f"refine is {rounds!r}, expected an int from 0 to {MOST}: the number of rounds")
    if rounds and margins:
        raise ConfigError("refine and margins were both given; margins are of the nearest codes: give one of them")
    return int(rounds)


@dataclass(frozen=True)
class Pictures:
    """The pictures of a batch, and how codes of theirs are painted.

    originals: float [B, 3, H, W], from 0 to 1. original_features: theirs, [B, N, D]. paint: code vectors [T, C] ->
    pictures like the originals. features: pictures -> features. Both can be differentiated.
    image: int64 [T], the picture of each token. cells: int64 [T, 2], the row and column of its patch. grid: (rows,
    columns) of patches.
    """

    originals: Tensor
    original_features: Tensor
    paint: Callable[[Tensor], Tensor]
    features: Callable[[Tensor], Tensor]
    image: Tensor
    cells: Tensor
    grid: tuple[int, int]

    @cached_property
    def variance(self) -> Tensor:
        """The variance of each picture's original features, [B, 1]."""
        return self.original_features.flatten(1).var(1).clamp(min=1e-6)[:, None]

    def errors(self, vectors: Tensor) -> Tensor:
        """Returns two errors of each patch, whose sum counts: [2, B, rows, columns].

        The first is the mean squared error of its pixels. The second is a tenth of its features' mean squared error,
        relative to the variance of the picture's features.
        """
        painted, (rows, columns) = self.paint(vectors), self.grid
        squared = (painted - self.originals).square().mean(1)
        pixels = squared.unflatten(1, (rows, -1)).unflatten(3, (columns, -1)).mean((2, 4))
        features = (self.features(painted) - self.original_features).square().mean(-1) / self.variance  # [B, N]
        return torch.stack([pixels, _FEATURES * features.unflatten(1, self.grid)])

    def gradient(self, vectors: Tensor) -> Tensor:
        """Returns the gradient of the sum of all errors with respect to the vectors, [T, C]."""
        with torch.enable_grad():
            vectors = vectors.detach().requires_grad_()
            return torch.autograd.grad(self.errors(vectors).sum(), vectors)[0]

    def sensitivity(self, vectors: Tensor) -> Tensor:
        """Returns an estimate of J^T J, [B, C, C], the mean over the tokens of each picture.

        J is the derivative of all pixels with respect to one vector, divided by the root of the number of values in a
        patch. For signs s drawn for every pixel, J^T s has the expected outer product J^T J (Hutchinson's estimator).
        """
        device, generator = self.originals.device, torch.Generator("cpu").manual_seed(0)
        bits = torch.randint(2, self.originals.shape[1:], generator=generator, dtype=torch.float32, device="cpu")
        signs = sent_to(device, 2 * bits - 1)
        with torch.enable_grad():
            vectors = vectors.detach().requires_grad_()
            gradient = torch.autograd.grad((self.paint(vectors) * signs).sum(), vectors)[0]
        # a picture with a NaN must not spoil the sums of the others
        products = (gradient[:, :, None] * gradient[:, None]).nan_to_num(0.0, 0.0, 0.0)  # [T, C, C]
        images = torch.arange(len(self.originals), device=device)
        belongs = (self.image == images[:, None]).to(products.dtype)  # [B, T]
        with torch.autocast(device.type, enabled=False):
            sums = (belongs @ products.flatten(1)).unflatten(1, products.shape[1:])
        rows, columns = self.grid
        per_patch = self.originals[0].numel() / (rows * columns)
        return sums / belongs.sum(1)[:, None, None] / per_patch


def refine_codes(
    codes: Tensor, vectors: Tensor, codebook: Tensor, pictures: Pictures, rounds: int
) -> tuple[Tensor, Tensor]:
    """Returns codes [T] of pictures that are closer to the originals than those of `codes`, or as close; and the error.

    A picture is closer if the sum of its errors falls and that of its pixels does not rise. The error [B] is that sum.
    It is not finite where the decoder's or the backbone's numbers are not.

    A round tries one code for every token: that of the 16 nearest, not tried before, for which the error is predicted
    to fall most. Nine times it changes one token in nine, and a token keeps its new code if the error of the patches
    around it falls. A picture that the round as a whole did not bring closer gets back its codes from before.

    The first round takes about as long as 22 decodings, every other one as 18: the backbone looks at what is painted.

    codes: int64 [T], the nearest ones of vectors [T, C]. codebook: [K, C].
    """
    near = nearest_codes(vectors, codebook, min(_NEAR, len(codebook)))
    tried = near == codes[:, None]
    metric = pictures.sensitivity(codebook[codes])[pictures.image]  # [T, C, C]
    image, (row, column) = pictures.image, pictures.cells.unbind(1)
    groups = row % _APART * _APART + column % _APART
    error = pictures.errors(codebook[codes])
    for _ in range(min(rounds, near.shape[1] - 1)):
        # predicted change: gradient . step, and step . J^T J step for the curvature, in which only pixels count
        step = codebook[near] - codebook[codes][:, None]  # [T, near, C]
        slope = pictures.gradient(codebook[codes])[:, None]
        with torch.autocast(step.device.type, enabled=False):
            change = (step * (slope + step @ metric)).sum(-1)
        best = change.masked_fill(tried, torch.inf).argmin(1, keepdim=True)
        tried = tried.scatter(1, best, True)
        other = near.gather(1, best)[:, 0]
        before, start = error, codes
        for group in range(_APART * _APART):
            trial = torch.where(groups == group, other, codes)
            found = pictures.errors(codebook[trial])
            better = (groups == group) & (_around((found - error).sum(0))[image, row, column] < 0)
            codes = torch.where(better, trial, codes)
            changed = torch.zeros_like(error[0]).index_put_((image, row, column), better.to(error.dtype))
            error = torch.where(_around(changed) > 0, found, error)
        error = pictures.errors(codebook[codes])
        change_of = (error - before).sum((2, 3))  # [2, B]
        closer = (change_of.sum(0) < 0) & (change_of[0] <= 0)
        codes = torch.where(closer[image], codes, start)
        error = torch.where(closer[:, None, None], error, before)
    return codes, error.sum((0, 2, 3))


def nearest_codes(vectors: Tensor, codebook: Tensor, count: int) -> Tensor:
    """Returns the `count` nearest codes of each vector, int64 [T, count], in no particular order.

    vectors: [T, C] of any norm. codebook: [K, C].
    """
    with torch.autocast(vectors.device.type, enabled=False):
        parts = [F.normalize(part.to(codebook.dtype), dim=-1) for part in vectors.split(_ROWS)]
        half = codebook.square().sum(-1) / 2
        return torch.cat([(z @ codebook.T - half).topk(count).indices for z in parts])


def _around(values: Tensor) -> Tensor:
    """Returns the sum of each patch and its eight neighbors, [B, rows, columns]."""
    return F.avg_pool2d(values[:, None], _APART, stride=1, padding=1, divisor_override=1)[:, 0]
