"""Random crops of training images, batch by batch.

Order and augmentation depend on a seed and a step alone, so that a resumed run sees what an uninterrupted one would.
Not here: finding the images (`sources.py`), decoding a single one (`dyntok/image.py`).
"""

import logging
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from dyntok.config import ImageConfig
from dyntok.errors import DataError, ImageError
from dyntok.image import load_image, to_pixels
from dyntok.training.sources import ImageSample

_GIVE_UP = 100  # unreadable images in a row: then the disk or the path is at fault
_MAX_WARNINGS = 10
_log = logging.getLogger(__name__)


class TrainingImages(torch.utils.data.Dataset):
    """Random crops of `samples`: item i is batch number i, float32 [batch_size, 3, S, S].

    Each pass over the data is a new permutation. The side of a crop is `min_crop` to 1 times the image's short side;
    half of the crops are mirrored. Rank r of a world of w ranks takes the images r, r + w, ... of every global batch.

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
    ) -> None:
        self.samples, self.config, self.batch_size = samples, config, batch_size
        self.seed, self.min_crop, self.rank, self.world = seed, min_crop, rank, world
        self._order: tuple[int, Tensor] | None = None  # an epoch and its permutation
        self._failed = torch.zeros(len(samples), dtype=torch.bool).share_memory_()  # seen from worker processes, too

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
        first = step * self.batch_size * self.world
        return torch.stack([self._item(first + i) for i in range(self.rank, self.batch_size * self.world, self.world)])

    def _item(self, place: int) -> Tensor:
        image = self._image(*divmod(place, len(self.samples)))
        draw = torch.rand(4, generator=torch.Generator().manual_seed(self.seed * 2_000_003 + place)).tolist()
        side = min(image.size) * (self.min_crop + (1 - self.min_crop) * draw[0])
        left, top = draw[1] * (image.width - side), draw[2] * (image.height - side)
        size = (self.config.img_size,) * 2
        box = (left, top, min(left + side, image.width), min(top + side, image.height))
        crop = image.resize(size, Image.Resampling.BICUBIC, box=box)
        if draw[3] < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_pixels(crop, self.config)

    def _image(self, epoch: int, place: int) -> Image.Image:
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(len(self.samples), generator=generator)
        tries = min(_GIVE_UP, len(self.samples))
        for i in range(tries):
            index = int(self._order[1][(place + i) % len(self.samples)])
            try:
                return load_image(self.samples[index].read())
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
