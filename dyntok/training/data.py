"""Random crops of training images, batch by batch.

Order, shape and augmentation depend on a seed and a step alone, so that a resumed run sees what an uninterrupted one
would. Not here: finding the images (`sources.py`), decoding a single one (`dyntok/image.py`), sizes and crops
(`crops.py`).
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice

import torch
from PIL import Image
from torch import Tensor

from dyntok.errors import DataError, ImageError
from dyntok.image import load_image
from dyntok.training.crops import Crops
from dyntok.training.recipe import Recipe
from dyntok.training.shards import find_shards, images_of
from dyntok.training.sources import ImageSample, Inventory, find_samples, spread, take_inventory
from dyntok.training.stream import GIVE_UP, StreamedImages

_MAX_WARNINGS = 10
_MAX_SMALL = 8  # pictures that are looked at for one with enough pixels
_JUMP = 7919  # places between them
_log = logging.getLogger(__name__)


def open_data(recipe: Recipe, crops: Crops) -> "tuple[TrainingImages | StreamedImages, list[str]]":
    """Returns a recipe's training images, and lines that tell a person what was left out.

    Raises `DataError` if there are none.
    """
    if recipe.stream:
        inventory = Inventory()
        shards = find_shards(recipe.data, inventory)
        return StreamedImages(shards, crops, split=recipe.split, buffer=recipe.stream), inventory.report()
    inventory = take_inventory(recipe.data, recipe.split)
    return TrainingImages(inventory.samples, crops), inventory.report()


def held_out(recipe: Recipe) -> list[ImageSample]:
    """Returns the pictures on which a recipe validates. Raises `DataError` if there are none."""
    limit = recipe.validation_images
    if not recipe.stream:
        return spread(find_samples(recipe.data, "validation"), limit)
    shards = spread(find_shards(recipe.data), limit)
    of_each = -(-limit // max(len(shards), 1))
    images = (image for shard in shards for image in islice(images_of(shard, "validation"), of_each))
    found = [image.alone() for image in islice(images, limit)]
    if not found:
        raise DataError("the shards hold no images of the validation part, expected one in 20; set validate_every: 0")
    return found


class TrainingImages(torch.utils.data.Dataset):
    """Batches of random crops of `samples`: item i is batch number i, float32 [B, 3, H, W].

    Each pass over the data is a new permutation. Rank r of a world of w ranks takes the images r, r + w, ... of every
    global batch. An image that can't be read is replaced by the next one of the permutation. `unreadable` lists such
    images.
    """

    def __init__(self, samples: Sequence[ImageSample], crops: Crops) -> None:
        self.samples, self.crops = samples, crops
        self._order: tuple[int, Tensor] | None = None  # an epoch and its permutation
        self._failed = torch.zeros(len(samples), dtype=torch.bool).share_memory_()  # seen from worker processes, too

    @property
    def keys(self) -> list[str]:
        """Returns what identifies the images."""
        return [sample.key for sample in self.samples]

    @property
    def extent(self) -> str:
        """Returns the number of images, for people."""
        return f"{len(self.samples):,} pictures"

    @property
    def unreadable(self) -> list[int]:
        """Indices of samples that were drawn and could not be read."""
        return self._failed.nonzero()[:, 0].tolist()

    def __getitem__(self, step: int) -> Tensor | DataError:
        try:
            return self.batch(step)
        except DataError as error:  # raised by the loop, not by a worker process, which would add its traceback
            return error

    def batch(self, number: int) -> Tensor:
        """Returns a batch. Raises `DataError` if too many images in a row can't be read."""
        size = self.crops.size(number)
        return torch.stack([self._item(place, size) for place in self.crops.places(number)])

    def batches(self, first: int) -> Iterator[Tensor]:
        """Yields the batches from number `first` on, without end. Raises `DataError` as `batch`."""
        return map(self.batch, count(first))

    def for_loader(self, first: int, last: int) -> tuple[torch.utils.data.Dataset, range | None]:
        """Returns the dataset and the sampler of the batches `first` to `last`."""
        return self, range(first, last)

    def from_loader(self, batches: Iterable[Tensor | DataError], workers: int) -> Iterator[Tensor]:
        """Yields the batches of a loader with `workers` processes. Raises `DataError` as `batch`."""
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield batch

    def _item(self, place: int, size: tuple[int, int]) -> Tensor:
        return self.crops.crop(self._large_enough(*divmod(place, len(self.samples)), size), place, size)

    def _large_enough(self, epoch: int, place: int, size: tuple[int, int]) -> Image.Image:
        """Returns the image at a place, or one from another place where its pixels are too few for large grids.

        Where none of those looked at is large enough, the largest of them.
        """
        image = self._image(epoch, place)
        if self.crops.grids is None:
            return image
        best, most = image, _scale(image, size)
        for i in range(1, _MAX_SMALL):
            if most >= self.crops.grids.min_scale:
                break
            image = self._image(epoch, place + i * _JUMP)
            if _scale(image, size) > most:
                best, most = image, _scale(image, size)
        return best

    def _image(self, epoch: int, place: int) -> Image.Image:
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.crops.seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(len(self.samples), generator=generator, device="cpu")
        tries = min(GIVE_UP, len(self.samples))
        for i in range(tries):
            index = int(self._order[1][(place + i) % len(self.samples)])
            try:
                return load_image(self.samples[index].read(), color=self.crops.config.color)
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
    """Returns the share of a side's pixels that the largest crop of the batch's aspect ratio has."""
    return min(image.width / size[1], image.height / size[0])
