"""`encode(refine=)`: codes near each vector are tried, and those from which the decoder paints a closer picture stay.

The nearest code of a vector need not be the best one, because the decoder looks at the codes around it, too, and these
are rounded as well. Here the decoder decides (analysis by synthesis). Not here: the search for the nearest code
(`model/codebook.py`), and which patches are kept (`policy.py`, `target.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dyntok.device import sent_to
from dyntok.errors import ConfigError

MOST = 15  # rounds
_NEAR = MOST + 1  # codes of a token: the nearest, and those that the rounds try
_APART = 3  # patches between tokens that change at once; each is judged by the 3 x 3 patches around it
_FEATURES = 0.1  # weight of the features' relative error: with pixels alone, pictures are recognized less often
_ROWS = 1024  # vectors that are compared with the whole codebook at once


def check_rounds(rounds: int, *, margins: bool) -> None:
    """Raises `ConfigError` where `refine` is not an int from 0 to 15, or comes with `margins`."""
    if type(rounds) is not int or not 0 <= rounds <= MOST:
        raise ConfigError(f"refine is {rounds!r}, expected a number of rounds from 0 to {MOST}")
    if rounds and margins:
        raise ConfigError("refine and margins were both given; margins are of the nearest codes: give one of them")


@dataclass(frozen=True)
class Pictures:
    """The pictures of a batch, and how codes of theirs are painted.

    originals: float [B, 3, H, W], from 0 to 1. wanted: their features, [B, N, D]. paint: code vectors [T, C] ->
    pictures like the originals. features: pictures -> features. Both can be differentiated.
    image: int64 [T], the picture of each token. cells: int64 [T, 2], the row and column of its patch. grid: (rows,
    columns) of patches.
    """

    originals: Tensor
    wanted: Tensor
    paint: Callable[[Tensor], Tensor]
    features: Callable[[Tensor], Tensor]
    image: Tensor
    cells: Tensor
    grid: tuple[int, int]

    def errors(self, vectors: Tensor) -> Tensor:
        """Returns the error of each patch, [B, rows, columns].

        It is the mean squared error of the pixels, and a tenth of the features' one relative to their variance.
        """
        painted, (rows, columns) = self.paint(vectors), self.grid
        squared = (painted - self.originals).square().mean(1)
        error = squared.unflatten(1, (rows, -1)).unflatten(3, (columns, -1)).mean((2, 4))
        variance = self.wanted.flatten(1).var(1).clamp(min=1e-6)[:, None]
        relative = (self.features(painted) - self.wanted).square().mean(-1) / variance  # [B, N]
        return error + _FEATURES * relative.unflatten(1, self.grid)

    def gradient(self, vectors: Tensor) -> Tensor:
        """Returns the gradient of the sum of all errors with respect to the vectors, [T, C]."""
        with torch.enable_grad():
            vectors = vectors.detach().requires_grad_()
            return torch.autograd.grad(self.errors(vectors).sum(), vectors)[0]

    def sensitivity(self, vectors: Tensor) -> Tensor:
        """Returns an estimate of J^T J, [B, C, C], the mean over the tokens of each picture.

        J is the derivative of all pixels with respect to one vector, in units in which the pixels' part of the errors
        is a sum of squares. For signs s drawn for every pixel, J^T s has the
        expected outer product J^T J (Hutchinson's estimator).
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
    """Returns codes [T] whose pictures are closer to the originals than those of `codes`, or as close; and the error.

    The error [B] is that of each picture. It is not finite where the decoder's numbers are not.

    A round tries one code for every token: that of the 16 nearest, not tried before, for which the error is predicted
    to fall most. Nine decodings change one token in nine each, and a token keeps its new code if the error of the
    patches around it falls. A picture that the round as a whole did not bring closer gets back its codes from before.
    A round takes about as long as 15 decodings, the first one somewhat longer.

    codes: int64 [T], the nearest ones of vectors [T, C]. codebook: [K, C].
    """
    near = nearest_codes(vectors, codebook, min(_NEAR, len(codebook)))
    tried = near == codes[:, None]
    metric = pictures.sensitivity(codebook[codes])[pictures.image]  # [T, C, C]
    image, (row, column) = pictures.image, pictures.cells.unbind(1)
    groups = row % _APART * _APART + column % _APART
    error = pictures.errors(codebook[codes])
    for _ in range(min(rounds, near.shape[1] - 1)):
        # a step changes the error by gradient . step + step . J^T J step, as far as the decoder is linear
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
            better = (groups == group) & (_around(found - error)[image, row, column] < 0)
            codes = torch.where(better, trial, codes)
            changed = torch.zeros_like(error).index_put_((image, row, column), better.to(error.dtype))
            error = torch.where(_around(changed) > 0, found, error)
        error = pictures.errors(codebook[codes])
        closer = error.sum((1, 2)) < before.sum((1, 2))  # [B]
        codes = torch.where(closer[image], codes, start)
        error = torch.where(closer[:, None, None], error, before)
    return codes, error.sum((1, 2))


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
