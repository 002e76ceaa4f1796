"""Codes out of an output folder, finished or not, as batches; shared among ranks and workers, resumable."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from dyntok.addresses import StorageOptions, redact
from dyntok.batch.formats import ROWS_IN_GROUP
from dyntok.batch.manifest import RecordedFile, read_description, recorded_files
from dyntok.batch.shard_reader import CodesImage, CodesRow, read_block
from dyntok.batch.storage import Output
from dyntok.encoding import Encoding
from dyntok.epochs import EpochDataset
from dyntok.errors import CodeError, ConfigError, DataError
from dyntok.original import Original
from dyntok.structure import names_of, require_integer
from dyntok.tokenizer import Fit


@dataclass(frozen=True)
class Batch:
    """Some rows of the output."""

    keys: list[str]
    encoding: Encoding  # of all their images in order, with the fingerprint of the tokenizer that made them
    row_of_image: list[int]  # which row each image belongs to; in interleaved data a row has several, or none
    columns: dict[str, list[Any]]  # by name, one value for each row
    sizes: Tensor  # int64 [B, 2]: height and width of the B original images, as `decode(size=)` takes them
    crop_boxes: Tensor | None  # int64 [B, 4]: left, top, right, bottom of what was used of them; None in old outputs

    def to_tensors(self, length: int) -> dict[str, Tensor]:
        """Returns int64 tensors with one row per image.

        They are codes and positions [B, length], lengths and row [B], grid and size [B, 2], and crop_box [B, 4] where
        it is known. Codes and positions are -1 after the end of an image.

        Raises `CodeError` where an image has more tokens.
        """
        longest = int(self.encoding.lengths.max()) if len(self.encoding) else 0
        if longest > length:
            raise CodeError(f"an image has {longest} tokens, more than pad_to={length}; pad to {longest} or more")
        padded = torch.full((2, len(self.encoding), length), -1)
        for i, (codes, positions) in enumerate(zip(self.encoding.codes, self.encoding.positions, strict=True)):
            padded[0, i, : len(codes)], padded[1, i, : len(codes)] = codes, positions
        known = {} if self.crop_boxes is None else {"crop_box": self.crop_boxes}
        return {
            "codes": padded[0],
            "positions": padded[1],
            "lengths": self.encoding.lengths,
            "grid": self.encoding.grids,
            "row": torch.tensor(self.row_of_image, dtype=torch.long),
            "size": self.sizes,
            **known,
        }


class CodesDataset(EpochDataset):
    """Batches of codes for a `DataLoader(..., batch_size=None)`.

    folder         what `dyntok batch` wrote as parquet or webdataset; only complete shards are read
    batch_size     rows in a `Batch`
    columns        extra columns to read
    rank, world    which part of the rows to read; every rank gets the same number of batches
    remainder      where the ranks can't share all rows evenly: "repeat" up to `world` - 1 rows, or "drop" as many
    pad_to         give dicts of tensors, padded to this number of tokens, see `Batch.to_tensors`; None: give `Batch`es
    shuffle        blocks of 1,024 rows, and the rows in each, in an order that depends on `seed` and the epoch alone

    Workers of a `DataLoader` share the batches of their rank. `len()` is the number of batches of this rank.

    `state_dict` and `load_state_dict` are what torchdata's `StatefulDataLoader` calls in every worker. Without workers
    call them yourself.

    Raises `DataError` where there is no such folder or column, `ConfigError` on options or a state that do not fit.
    """

    def __init__(
        self,
        folder: str,
        *,
        batch_size: int = 256,
        columns: Sequence[str] = (),
        rank: int = 0,
        world: int = 1,
        remainder: Literal["repeat", "drop"] = "repeat",
        pad_to: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        storage: StorageOptions | None = None,
    ) -> None:
        for name, value, lowest in (("rank", rank, 0), ("world", world, 1), ("batch_size", batch_size, 1)):
            require_integer(name, value, lowest)
        if rank >= world:
            raise ConfigError(f"rank is {rank} of {world}, expected 0 to {world - 1}")
        if pad_to is not None:
            require_integer("pad_to", pad_to, 1)
        if remainder not in ("repeat", "drop"):
            raise ConfigError(f"remainder is {remainder!r}, expected 'repeat' or 'drop'")
        self.batch_size, self.columns, self.shuffle, self.seed = (
            batch_size,
            list(names_of("columns", columns)),
            shuffle,
            seed,
        )
        self.rank, self.world, self.remainder, self.pad_to = rank, world, remainder, pad_to
        super().__init__()
        self._output = Output(folder, storage or {})
        self.description = read_description(self._output)
        if self.description["options"]["format"] == "megatron":
            raise DataError(
                f"{redact(self._output.address)} holds Megatron files; read those with Megatron, or write parquet"
            )
        self._blocks = _Blocks(self._output)
        self._done = self._resume = 0  # batches of this reader
        self._begun: int | None = None  # the epoch to which they belong, whatever the next one is

    @property
    def fingerprint(self) -> str:
        """Returns that of the tokenizer that made the codes."""
        return self.description["tokenizer"]["fingerprint"]

    def __len__(self) -> int:
        return -(-self._rows_per_rank // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        begin, self._resume = self._resume, 0
        self._done = begin  # before the first batch, since persistent workers are asked then
        self._begun = self.epoch
        return self._batches(begin, self._begun)

    def _batches(self, begin: int, epoch: int) -> Iterator[Any]:
        worker, workers = _worker()
        first, end = (len(self) * (worker + i) // workers for i in (0, 1))
        start = self.rank * self._rows_per_rank
        stop = start + min(end * self.batch_size, self._rows_per_rank)
        rows = self._rows(start + (first + begin) * self.batch_size, stop, epoch)
        while some := list(islice(rows, self.batch_size)):
            self._done += 1
            batch = self._batch(some)
            yield batch if self.pad_to is None else batch.to_tensors(self.pad_to)

    def state_dict(self) -> dict[str, Any]:
        """Returns where this reader stands; of one worker, where a loader has workers.

        After its last batch it stands at the end of the epoch: a reader that resumes there gives no batch, and starts
        anew in the next iteration.
        """
        return {"epoch": self.epoch if self._begun is None else self._begun, "batches": self._done, **self._order()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Lets the next iteration resume after the last batch. Raises `ConfigError` where the order is another one."""
        order = self._order()
        if found := [
            f"{name} was {state.get(name)}, is {value}" for name, value in order.items() if state.get(name) != value
        ]:
            raise ConfigError(f"the state belongs to another order of batches: {'; '.join(found)}")
        self.epoch = state["epoch"]
        self._begun = state["epoch"]
        self._done = self._resume = state["batches"]

    def _order(self) -> dict[str, Any]:
        """Returns everything that decides which batches this reader gives."""
        names = ("rank", "world", "remainder", "batch_size", "shuffle", "seed")
        return {**{name: getattr(self, name) for name in names}, "worker": list(_worker()), "rows": self._blocks.rows}

    @property
    def _rows_per_rank(self) -> int:
        extra = self.world - 1 if self.remainder == "repeat" else 0
        return (self._blocks.rows + extra) // self.world

    def _rows(self, start: int, stop: int, epoch: int) -> Iterator[CodesRow]:
        """Yields the rows of the whole order from `start` to before `stop`; after the last comes the first again."""
        order, ends = self._blocks.order(self.seed if self.shuffle else None, epoch)
        while start < stop:
            place = start % self._blocks.rows
            i = int(np.searchsorted(ends, place, side="right"))
            block = self._block(int(order[i]), epoch)
            first = place - (int(ends[i]) - len(block))
            some = block[first : first + stop - start]
            yield from some
            start += len(some)

    def _block(self, number: int, epoch: int) -> list[CodesRow]:
        block = read_block(self._output, *self._blocks.locate(number), self.columns)
        if self.shuffle:
            block = [block[j] for j in np.random.default_rng([self.seed, epoch, number]).permutation(len(block))]
        return block

    def _batch(self, rows: Sequence[CodesRow]) -> Batch:
        images = [image for row in rows for image in row.images]
        encoding = packed(images, self.fingerprint, self.description["options"].get("fit"))
        sizes = _table([(image.height, image.width) for image in images], 2)
        boxes = [image.crop_box for image in images if image.crop_box is not None]
        crop_boxes = _table(boxes, 4) if len(boxes) == len(images) else None
        row_of_image = [i for i, row in enumerate(rows) for _ in row.images]
        columns = {name: [row.columns[name] for row in rows] for name in self.columns}
        return Batch([row.key for row in rows], encoding, row_of_image, columns, sizes, crop_boxes)


class _Blocks:
    """The rows of an output, in blocks that are read at once: row groups of Parquet, or whole tars."""

    def __init__(self, output: Output) -> None:
        self._files = recorded_files(output)
        first, sizes = [0], []  # the first block of each file, and the rows of each block
        for file in self._files:
            size = ROWS_IN_GROUP if file.name.endswith(".parquet") else max(file.rows, 1)
            sizes += [min(size, file.rows - start) for start in range(0, file.rows, size)]
            first.append(len(sizes))
        self._first, self._sizes = np.array(first), np.array(sizes, np.int64)
        self.rows = int(self._sizes.sum())

    def order(self, seed: int | None, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the numbers of the blocks in the order of reading, and how many rows end with each of them."""
        order = np.arange(len(self._sizes))
        if seed is not None:
            order = np.random.default_rng([seed, epoch]).permutation(order)
        return order, np.cumsum(self._sizes[order])

    def locate(self, block: int) -> tuple[RecordedFile, int]:
        """Returns the file of a block, and its number there."""
        file = int(np.searchsorted(self._first, block, side="right")) - 1
        return self._files[file], block - int(self._first[file])


def read(
    folder: str, *, batch_size: int = 256, columns: Sequence[str] = (), storage: StorageOptions | None = None
) -> Iterator[Batch]:
    """Yields everything in an output folder, in the order of the input; arguments and errors are `CodesDataset`'s.

    >>> for batch in dyntok.batch.read("codes/"):
    ...     codes, mask = batch.encoding.padded()
    """
    return iter(CodesDataset(folder, batch_size=batch_size, columns=columns, storage=storage))


def _worker() -> tuple[int, int]:
    """Returns the number of this worker of a `DataLoader`, and how many there are."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def packed(images: Sequence[CodesImage], fingerprint: str, fit: Fit | None = None) -> Encoding:
    """Returns images of an output as an `Encoding`. fit: as the run was told."""
    codes, positions = ([getattr(image, name) for image in images] for name in ("codes", "positions"))
    originals = [
        Original((image.height, image.width), tuple(map(int, image.crop_box)), fit)  # type: ignore[arg-type]  # of four
        for image in images
        if image.crop_box is not None
    ]
    grids = _table([image.grid for image in images], 2)
    known = originals if len(originals) == len(images) else None
    return Encoding.pack(_long(codes), _long(positions), grids, fingerprint, originals=known)


def _long(rows: Sequence[np.ndarray]) -> list[Tensor]:
    return [torch.from_numpy(row.astype(np.int64)) for row in rows]


def _table(rows: Sequence[Sequence[int]], columns: int) -> Tensor:
    return torch.from_numpy(np.array(rows, np.int64).reshape(-1, columns))
