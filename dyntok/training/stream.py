"""Training images streamed from tars and Parquet files, for data that is too large to be listed.

Shards are read in random order, and a buffer shuffles the images of several of them. The order follows from the seed
alone: a resumed run goes through the headers and keys that it has read before, without reading or decoding images.
Every worker process goes through all headers of its rank, but reads only the images of its own batches.

Not here: the shards (`shards.py`), and images that are listed first, with random access (`data.py`).
"""

import logging
import random
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import PurePosixPath

import torch
from torch import Tensor

from dyntok.errors import DataError, DyntokError
from dyntok.image import load_image
from dyntok.training.crops import Crops
from dyntok.training.shards import images_of
from dyntok.training.sources import ImageSample, Split

_log = logging.getLogger(__name__)


class StreamedImages:
    """Batches of the images of `shards`, one after another.

    Rank r of a world of w ranks reads the shards r, r + w, ... of each pass, which has an order of its own.

    buffer: images from which the next one is drawn.

    Raises `DataError` if there are fewer shards than ranks.
    """

    def __init__(self, shards: Sequence[str], crops: Crops, *, split: Split, buffer: int) -> None:
        if len(shards) < crops.world:
            raise DataError(f"{len(shards)} shards for {crops.world} processes, expected at least one for each")
        self.shards, self.crops, self.split, self.buffer = list(shards), crops, split, buffer
        # both are seen from worker processes, too
        self._failed = torch.zeros(1, dtype=torch.long).share_memory_()
        self._told = torch.zeros(len(self.shards), dtype=torch.bool).share_memory_()  # what was left out of a shard

    @property
    def keys(self) -> list[str]:
        """Returns what identifies the shards."""
        return [PurePosixPath(shard).name for shard in self.shards]

    @property
    def extent(self) -> str:
        """Returns the number of shards, for people."""
        return f"{len(self.shards):,} shards"

    @property
    def unreadable(self) -> list[int]:
        """Returns a number for each image that was drawn and could not be read."""
        return [self.crops.rank + self.crops.world * i for i in range(int(self._failed))]

    def order(self, *, tell: bool = True) -> Iterator[ImageSample]:
        """Yields this rank's images in the order in which they are used, without end.

        tell: warn of what is left out of a shard, unless that was done before.

        Raises `DataError` where a whole pass has no image.
        """
        draw, waiting = random.Random(self.crops.seed * 1_009 + self.crops.rank), list[ImageSample]()
        for image in self._passes(tell):
            if len(waiting) < self.buffer:
                waiting.append(image)
                continue
            index = draw.randrange(len(waiting))
            yield waiting[index]
            waiting[index] = image

    def _passes(self, tell: bool) -> Iterator[ImageSample]:
        for number in count():
            order = list(range(len(self.shards)))
            random.Random(self.crops.seed * 1_000_003 + number).shuffle(order)
            found = False
            for index in order[self.crops.rank :: self.crops.world]:
                warn = _log.warning if tell and not self._told[index] else _say_nothing
                for image in images_of(self.shards[index], self.split, warn):
                    found = True
                    yield image
                self._told[index] |= tell
            if not found:
                raise DataError(f"no images of the split {self.split!r} in the shards of this process")

    def for_loader(self, first: int, last: int) -> tuple[torch.utils.data.Dataset, range | None]:
        """Returns the dataset of the batches `first` to `last`; it needs no sampler."""
        return StreamedPart(self, first, last), None

    def batches(self, first: int, last: int | None = None, worker: int = 0, workers: int = 1) -> Iterator[Tensor]:
        """Yields every `workers`-th batch from number `first + worker` on, before `last`.

        Raises `DataError` if no image can be read.
        """
        images = self.order(tell=worker == 0)
        for number in count() if last is None else range(last):
            places = self.crops.places(number)
            samples = [next(images) for _ in places]
            if number >= first and (number - first) % workers == worker:
                tensors = list(self._read(samples, places, self.crops.size(number)))
                if not tensors:
                    raise DataError(f"{len(samples)} images in a row can't be read, the last one {samples[-1].key}")
                # others of the batch stand in for an unreadable image, so that the order does not depend on it
                yield torch.stack([tensors[i % len(tensors)] for i in range(len(samples))])

    def _read(self, samples: Sequence[ImageSample], places: range, size: tuple[int, int]) -> Iterator[Tensor]:
        for sample, place in zip(samples, places, strict=True):
            try:
                image = load_image(sample.read(), color=self.crops.config.color)
            except (DyntokError, OSError) as error:
                self._failed += 1
                _log.warning("left out %s of %s: %s", sample.key, sample.path, error)
            else:
                yield self.crops.crop(image, place, size)


def _say_nothing(text: str) -> None:
    pass


class StreamedPart(torch.utils.data.IterableDataset):
    """Some batches of a stream, in their order, for any number of worker processes."""

    def __init__(self, stream: StreamedImages, first: int, last: int) -> None:
        self.stream, self.first, self.last = stream, first, last

    def __iter__(self) -> Iterator[Tensor | DataError]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        try:
            yield from self.stream.batches(self.first, self.last, worker, workers)
        except DataError as error:  # raised by the loop, not by a worker process, which would add its traceback
            yield error
