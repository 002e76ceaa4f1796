"""Training images streamed from tars and Parquet files, for data that is too large to be listed.

Shards are read in random order, and a buffer shuffles the images of several of them. The order follows from the seed
alone: a resumed run goes through the headers and keys that it has read before, without reading or decoding images.
Every worker process goes through all headers of its rank, but reads only its share of the images. The images of a row
group belong to one worker process, so that no other reads it; a batch is joined from the parts that each of them makes.

Not here: the shards (`shards.py`), and images that are listed first, with random access (`data.py`).
"""

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import PurePosixPath

import torch
from torch import Tensor

from dyntok.chunks import batched
from dyntok.errors import DataError, DyntokError
from dyntok.image import load_image
from dyntok.training.crops import Crops
from dyntok.training.shards import images_of
from dyntok.training.sources import ImageSample, Split

GIVE_UP = 100  # unreadable images in a row: then the disk or the path is at fault
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
        return (image for _, image in self._shuffled(tell))

    def _shuffled(self, tell: bool) -> Iterator[tuple[int, ImageSample]]:
        draw, waiting = random.Random(self.crops.seed * 1_009 + self.crops.rank), list[tuple[int, ImageSample]]()
        for image in self._numbered(tell):
            if len(waiting) < self.buffer:
                waiting.append(image)
                continue
            index = draw.randrange(len(waiting))
            yield waiting[index]
            waiting[index] = image

    def _numbered(self, tell: bool) -> Iterator[tuple[int, ImageSample]]:
        """Yields the images of all passes; those that are read together have the same number."""
        number, last = 0, None
        for image in self._passes(tell):
            number += image.read_with is not last
            last = image.read_with
            yield number, image

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
        """Returns the dataset of the parts of the batches `first` to `last`; it needs no sampler."""
        return StreamedParts(self, first, last), None

    def from_loader(self, parts: "Iterable[Part | DataError]", workers: int) -> Iterator[Tensor]:
        """Yields the batches that a loader with `workers` processes, which takes turns, gives in parts.

        A batch without a readable image is the one before it again. Raises `DataError` if there is none before it,
        after 100 images in a row that can't be read, and where the workers drew different images: then a shard could
        be read by some of them only.
        """
        batch, unreadable = None, 0
        for several in batched(parts, max(workers, 1)):
            rows: dict[int, Tensor] = {}
            for part in several:
                if isinstance(part, DataError):
                    raise part
                if part.last_key != several[0].last_key:
                    raise DataError(
                        f"worker processes drew different images, {several[0].last_key} and {part.last_key}, because "
                        "only some of them could read all of a shard; start the run again when the storage answers, "
                        "and it goes on from its last checkpoint"
                    )
                rows.update(zip(part.rows, part.pixels, strict=True))
            unreadable = 0 if rows else unreadable + part.count
            if not rows and (batch is None or unreadable >= GIVE_UP):
                raise DataError(f"{unreadable} images in a row can't be read, the last one {part.last_key}")
            if rows:
                tensors = [rows[row] for row in sorted(rows)]
                # others of the batch stand in for an unreadable image, so that the order does not depend on it
                batch = torch.stack([tensors[i % len(tensors)] for i in range(part.count)])
            yield batch

    def batches(self, first: int, last: int | None = None) -> Iterator[Tensor]:
        """Yields the batches from number `first` on, before `last`. Raises `DataError` if no image can be read."""
        return self.from_loader(self.parts(first, last), 1)

    def parts(self, first: int, last: int | None = None, worker: int = 0, workers: int = 1) -> "Iterator[Part]":
        """Yields a worker's part of every batch from number `first` on, before `last`."""
        images = self._shuffled(tell=worker == 0)
        for number in count() if last is None else range(last):
            places = self.crops.places(number)
            drawn = [next(images) for _ in places]
            if number >= first:
                own = [row for row, (turn, _) in enumerate(drawn) if turn % workers == worker]
                samples = [(row, drawn[row][1], places[row]) for row in own]
                read = dict(self._read(samples, self.crops.size(number)))
                pixels = torch.stack(list(read.values())) if read else torch.empty(0)
                yield Part(list(read), pixels, len(drawn), drawn[-1][1].key)

    def _read(
        self, samples: Sequence[tuple[int, ImageSample, int]], size: tuple[int, int]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yields the crops of the images that can be read; samples: row of the batch, image, place in the run."""
        for row, sample, place in samples:
            try:
                image = load_image(sample.read(), color=self.crops.config.color)
            except (DyntokError, OSError) as error:
                self._failed += 1
                _log.warning("left out %s of %s: %s", sample.key, sample.path, error)
            else:
                yield row, self.crops.crop(image, place, size)


def _say_nothing(text: str) -> None:
    pass


@dataclass
class Part:
    """The images of a batch that one worker process has read."""

    rows: list[int]  # of the batch
    pixels: Tensor  # [len(rows), 3, H, W]
    count: int  # images of the whole batch
    last_key: str  # of the whole batch


class StreamedParts(torch.utils.data.IterableDataset):
    """Parts of some batches of a stream, in their order: one of each batch from each worker process."""

    def __init__(self, stream: StreamedImages, first: int, last: int) -> None:
        self.stream, self.first, self.last = stream, first, last

    def __iter__(self) -> Iterator[Part | DataError]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        try:
            yield from self.stream.parts(self.first, self.last, worker, workers)
        except DataError as error:  # raised by the loop, not by a worker process, which would add its traceback
            yield error
