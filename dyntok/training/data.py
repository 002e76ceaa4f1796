"""Random crops of training images, batch by batch.

Order, shape and augmentation depend on a seed and a step alone, so that a resumed run sees what an uninterrupted one
would. Not here: finding the images (`sources.py`), decoding a single one (`dyntok/image.py`), shapes (`grids.py`).
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dyntok.config import ImageConfig
from dyntok.errors import DataError, ImageError
from dyntok.fitting import target_size
from dyntok.image import load_image, normalized
from dyntok.training.grids import Grids
from dyntok.training.sources import ImageSample

_GIVE_UP = 100  # unreadable images in a row: then the disk or the path is at fault
_MAX_WARNINGS = 10
_MAX_SMALL = 8  # pictures that are looked at for one with enough pixels
_JUMP = 7919  # places between them
_log = logging.getLogger(__name__)


class TrainingImages(torch.utils.data.Dataset):
    """Random crops of `samples`: item i is batch number i, float32 [B, 3, H, W].

    Without `grids`, B is `batch_size` and pictures have the tokenizer's own size. With `grids`, each batch has a grid
    of its own, and as many pictures as make up the patches of `batch_size` pictures of the tokenizer's own size.

    Each pass over the data is a new permutation. A crop has the batch's aspect ratio and is `min_crop` to 1 times as
    large as the largest one; half of the crops are mirrored. Rank r of a world of w ranks takes the images r, r + w,
    ... of every global batch.

    An image that can't be read is replaced by the next one of the permutation. `unreadable` lists such images.
    """

    def __init__(
        self,
        samples: Sequence[ImageSample],
        config: ImageConfig,
        batch_size: int,
        *,
        seed: int,
        min_crop: float,
        rank: int = 0,
        world: int = 1,
        grids: Grids | None = None,
    ) -> None:
        self.samples, self.config, self.batch_size = samples, config, batch_size
        self.seed, self.min_crop, self.rank, self.world, self.grids = seed, min_crop, rank, world, grids
        self._order: tuple[int, Tensor] | None = None  # an epoch and its permutation
        self._failed = torch.zeros(len(samples), dtype=torch.bool).share_memory_()  # seen from worker processes, too
        self._firsts = [0]  # with grids: the place of the first image of every step so far

    @property
    def unreadable(self) -> list[int]:
        """Indices of samples that were drawn and could not be read."""
        return self._failed.nonzero()[:, 0].tolist()

    def __getitem__(self, step: int) -> Tensor | DataError:
        try:
            return self.batch(step)
        except DataError as error:  # raised by the loop, not by a worker process, which would add its traceback
            return error

    def batch(self, step: int) -> Tensor:
        """Returns a batch. Raises `DataError` if too many images in a row can't be read."""
        first, count, size = self._first(step), self._count(step) * self.world, self.size(step)
        return torch.stack([self._item(first + i, size) for i in range(self.rank, count, self.world)])

    def size(self, step: int) -> tuple[int, int]:
        """Returns (height, width) in pixels of a step's pictures."""
        if self.grids is None:
            return target_size(self.config)
        rows, columns = self.grids.grid(self.seed, step)
        return rows * self._patch_size, columns * self._patch_size

    @property
    def _patch_size(self) -> int:
        assert self.config.patch_size is not None  # a recipe with grids has a tokenizer that takes any grid
        return self.config.patch_size

    def _count(self, step: int) -> int:
        """The number of a step's images on each rank."""
        if self.grids is None:
            return self.batch_size
        height, width = target_size(self.config)
        usual = height // self._patch_size * (width // self._patch_size)
        return max(1, round(self.batch_size * usual / self.grids.patches(self.seed, step)))

    def _first(self, step: int) -> int:
        """The place of a step's first image, counted from the beginning of the run."""
        if self.grids is None:
            return step * self.batch_size * self.world
        while len(self._firsts) <= step:
            self._firsts.append(self._firsts[-1] + self._count(len(self._firsts) - 1) * self.world)
        return self._firsts[step]

    def _item(self, place: int, size: tuple[int, int]) -> Tensor:
        height, width = size
        image = self._large_enough(*divmod(place, len(self.samples)), size)
        draw = torch.rand(4, generator=torch.Generator().manual_seed(self.seed * 2_000_003 + place)).tolist()
        share = self.min_crop + (1 - self.min_crop) * draw[0]
        crop_width = min(image.width, image.height * width / height) * share
        crop_height = crop_width * height / width
        left, top = draw[1] * (image.width - crop_width), draw[2] * (image.height - crop_height)
        box = (left, top, min(left + crop_width, image.width), min(top + crop_height, image.height))
        crop = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
        if draw[3] < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return normalized(np.asarray(crop), self.config)

    def _large_enough(self, epoch: int, place: int, size: tuple[int, int]) -> Image.Image:
        """Returns the image at a place, or one from another place where its pixels are too few for large grids.

        Where none of those looked at is large enough, the largest of them.
        """
        image = self._image(epoch, place)
        if self.grids is None:
            return image
        best, most = image, _scale(image, size)
        for i in range(1, _MAX_SMALL):
            if most >= self.grids.min_scale:
                break
            image = self._image(epoch, place + i * _JUMP)
            if _scale(image, size) > most:
                best, most = image, _scale(image, size)
        return best

    def _image(self, epoch: int, place: int) -> Image.Image:
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(len(self.samples), generator=generator)
        tries = min(_GIVE_UP, len(self.samples))
        for i in range(tries):
            index = int(self._order[1][(place + i) % len(self.samples)])
            try:
                return load_image(self.samples[index].read(), color=self.config.color)
            except (ImageError, OSError) as error:
                self._warn_once(index, error)
                last, sample = error, self.samples[index]
        raise DataError(f"{tries} images in a row can't be read, the last one {sample.key} of {sample.path}: {last}")

    def _warn_once(self, index: int, error: Exception) -> None:
        if self._failed[index]:
            return
        self._failed[index] = True
        count, sample = int(self._failed.sum()), self.samples[index]
        if count <= _MAX_WARNINGS:
            _log.warning("left out %s of %s, unreadable image number %d: %s", sample.key, sample.path, count, error)
        if count == _MAX_WARNINGS:
            _log.warning("further unreadable images are only counted")


def _scale(image: Image.Image, size: tuple[int, int]) -> float:
    """The share of a side's pixels that the largest crop of the batch's aspect ratio has."""
    return min(image.width / size[1], image.height / size[0])
