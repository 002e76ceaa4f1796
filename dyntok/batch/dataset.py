"""Codes out of a finished (or half-finished) output folder, Parquet or webdataset, as batches; sharded by rank and worker, resumable."""

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import IterableDataset, get_worker_info

from dyntok.batch.addresses import StorageOptions, redact, wrap_storage_errors
from dyntok.batch.formats import ROWS_IN_GROUP
from dyntok.batch.inputs.names import split_key
from dyntok.batch.manifest import read_description, recorded_files
from dyntok.batch.storage import Output
from dyntok.chunks import batched
from dyntok.encoding import Encoding
from dyntok.errors import ConfigError, DataError


@dataclass(frozen=True)
class Batch:
    """Some rows of the output."""

    keys: list[str]
    encoding: Encoding  # of their images, one after another, with the fingerprint of the tokenizer that made them
    row_of_image: list[int]  # which row each image belongs to; in interleaved data a row has several, or none
    columns: dict[str, list[Any]]  # by name, one value for each row


@dataclass(frozen=True)
class CodesRow:
    """One row of the output."""

    key: str
    images: list[tuple[np.ndarray, np.ndarray, Sequence[int]]]  # codes, positions, grid
    columns: dict[str, Any]


class CodesDataset(IterableDataset):
    """Batches of codes for a `DataLoader(..., batch_size=None)`.

    folder         what `dyntok batch` wrote as parquet or webdataset; shards that are not complete yet are passed over
    batch_size     rows in a `Batch`
    columns        extra columns to read
    rank, world    which part of the rows: every rank and every worker of its loader reads a share of its own, no row twice
    shuffle        blocks of 1,024 rows, and the rows in each, in an order that follows from `seed` and the epoch

    `state_dict` and `load_state_dict` are what torchdata's `StatefulDataLoader` calls in every worker; without workers call them yourself.

    Raises `DataError` where there is no such folder or column, `ConfigError` on a rank or state that does not fit.
    """

    def __init__(
        self,
        folder: str,
        *,
        batch_size: int = 256,
        columns: Sequence[str] = (),
        rank: int = 0,
        world: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        storage: StorageOptions | None = None,
    ) -> None:
        if not 0 <= rank < world or batch_size < 1:
            raise ConfigError(
                f"rank {rank} of {world}, batches of {batch_size}; expected 0 to {world - 1}, and 1 or more"
            )
        self.batch_size, self.columns, self.shuffle, self.seed = batch_size, list(columns), shuffle, seed
        self.rank, self.world, self.epoch = rank, world, 0
        self._output = Output(folder, storage or {})
        self.description = read_description(self._output)
        if self.description["options"]["format"] == "megatron":
            raise DataError(
                f"{redact(self._output.address)} holds Megatron files; read those with Megatron, or write parquet"
            )
        files = recorded_files(self._output)
        self._files = [file.name for file in files]
        blocks = [-(-file.rows // ROWS_IN_GROUP) if file.name.endswith(".parquet") else 1 for file in files]
        self._first_block = np.concatenate(
            [[0], np.cumsum(blocks, dtype=np.int64)]
        )  # of each file, and the number of all
        self._done = 0, 0  # blocks of this reader, and rows of the next one
        self._resume = 0, 0

    @property
    def fingerprint(self) -> str:
        """Of the tokenizer that made the codes."""
        return self.description["tokenizer"]["fingerprint"]

    def set_epoch(self, epoch: int) -> None:
        """Before the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        begin, self._resume = self._resume, (0, 0)
        rows = self._rows(*begin)
        while some := list(_up_to(rows, self.batch_size)):
            self._done = some[-1][0]
            yield self._batch([row for _, row in some])
        self._done = 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Where this reader stands; of one worker, where a loader has workers."""
        return {
            "epoch": self.epoch,
            "blocks": self._done[0],
            "rows": self._done[1],
            "share": list(self._share()),
            "seed": self.seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration goes on behind the last batch. Raises `ConfigError` where ranks, workers or the seed are others."""
        if state["share"] != list(self._share()) or state["seed"] != self.seed:
            raise ConfigError(
                f"the state is of share and seed {state['share'], state['seed']}, this is {self._share(), self.seed}"
            )
        self.epoch, self._resume = state["epoch"], (state["blocks"], state["rows"])
        self._done = self._resume

    def _share(self) -> tuple[int, int]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        return self.rank * count + number, self.world * count

    def _rows(self, blocks: int, rows: int) -> Iterator[tuple[tuple[int, int], CodesRow]]:
        """From a place on: every row, and the place behind it."""
        share, shares = self._share()
        order = np.arange(self._first_block[-1])
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        own = order[share::shares]
        for i in range(blocks, len(own)):
            block = self._block(int(own[i]))
            if self.shuffle:
                block = [
                    block[j]
                    for j in np.random.default_rng([self.seed, self.epoch, int(own[i])]).permutation(len(block))
                ]
            for j in range(rows if i == blocks else 0, len(block)):
                yield ((i, j + 1) if j + 1 < len(block) else (i + 1, 0)), block[j]

    def _block(self, block: int) -> list[CodesRow]:
        file = int(np.searchsorted(self._first_block, block, side="right")) - 1
        return read_block(self._output, self._files[file], block - int(self._first_block[file]), self.columns)

    def _batch(self, rows: Sequence[CodesRow]) -> Batch:
        images = [image for row in rows for image in row.images]
        codes, positions, grids = zip(*images, strict=True) if images else ((), (), ())
        encoding = Encoding.pack(
            _long(codes), _long(positions), torch.from_numpy(np.array(grids, np.int64).reshape(-1, 2)), self.fingerprint
        )
        owners = [i for i, row in enumerate(rows) for _ in row.images]
        return Batch(
            [row.key for row in rows],
            encoding,
            owners,
            {name: [row.columns[name] for row in rows] for name in self.columns},
        )


def read(
    folder: str, *, batch_size: int = 256, columns: Sequence[str] = (), storage: StorageOptions | None = None
) -> Iterator[Batch]:
    """Everything in an output folder, in the order of the input; arguments and errors are those of `CodesDataset`.

    >>> for batch in dyntok.batch.read("codes/"):
    ...     codes, mask = batch.encoding.padded()
    """
    return iter(CodesDataset(folder, batch_size=batch_size, columns=columns, storage=storage))


def read_block(output: Output, name: str, group: int, columns: Sequence[str] = ()) -> list[CodesRow]:
    """A row group of a Parquet file, or all of a tar. Raises `BatchError`, `DataError`."""
    with wrap_storage_errors("read", f"{output.address}/{name}", output.options), output.open(name) as stream:
        if name.endswith(".tar"):
            return list(_tar_rows(stream, columns))
        parquet = pq.ParquetFile(stream)
        if missing := [column for column in columns if column not in parquet.schema_arrow.names]:
            raise DataError(
                f"{name} has no column {', '.join(missing)}; it has {', '.join(parquet.schema_arrow.names)}"
            )
        return list(
            _table_rows(parquet.read_row_group(group, columns=["key", "codes", "positions", "grid", *columns]), columns)
        )


def _up_to(items: Iterator[Any], count: int) -> Iterator[Any]:
    return iter(next(batched(items, count), ()))


def _long(rows: Sequence[np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(row.astype(np.int64)) for row in rows]


def _table_rows(table: pa.Table, columns: Sequence[str]) -> Iterator[CodesRow]:
    table, interleaved = table.combine_chunks(), pa.types.is_list(table.schema.field("codes").type.value_type)
    keys = table["key"].to_pylist()
    kept = {name: table[name].to_pylist() for name in columns}
    codes, positions, grids = (
        _lists(table[name].chunk(0)) if len(table) else [] for name in ("codes", "positions", "grid")
    )
    for i, key in enumerate(keys):
        row = (codes[i], positions[i], grids[i])
        images = [image for image in zip(*row, strict=True) if image[0] is not None] if interleaved else [row]
        yield CodesRow(key, images, {name: values[i] for name, values in kept.items()})


def _lists(array: pa.Array) -> list[Any]:
    """A NumPy array for each list, a list of them for each list of lists, None for each null."""
    inner = array.flatten() if isinstance(array, pa.FixedSizeListArray) else array.values
    nested = pa.types.is_list(inner.type) or pa.types.is_fixed_size_list(inner.type)
    values = _lists(inner) if nested else inner.to_numpy(zero_copy_only=False)
    if isinstance(array, pa.FixedSizeListArray):
        ends = (
            np.cumsum(array.is_valid().to_numpy(zero_copy_only=False)) * array.type.list_size
        )  # `flatten` leaves nulls out
        bounds = np.concatenate([[0], ends])
    else:
        bounds = array.offsets.to_numpy()
    present = array.is_valid().to_numpy(zero_copy_only=False)
    return [values[bounds[i] : bounds[i + 1]] if present[i] else None for i in range(len(array))]


def _tar_rows(stream: Any, columns: Sequence[str]) -> Iterator[CodesRow]:
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        members = ((member.name, tar.extractfile(member).read()) for member in tar)
        for _, group in groupby(members, key=lambda member: split_key(member[0])[0]):
            parts = {split_key(name)[1]: content for name, content in group}
            facts = json.loads(parts["json"])
            codes, positions = (
                np.load(BytesIO(parts[f"{name}.npy"]), allow_pickle=False) for name in ("codes", "positions")
            )
            if missing := [column for column in columns if column not in facts]:
                raise DataError(f"a sample has no column {', '.join(missing)}; it has {', '.join(facts)}")
            yield CodesRow(facts["key"], [(codes, positions, facts["grid"])], {name: facts[name] for name in columns})
