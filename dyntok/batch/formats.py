"""How rows of codes become files: Parquet, webdataset tars, Megatron's `.bin` and `.idx`.

The same rows give the same bytes (with the same library versions). Not here: where files go, and when (`storage.py`, `manifest.py`).
"""

import io
import json
import struct
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dyntok.batch.engines.stages import Item, Tokens, narrowest
from dyntok.batch.options import BatchOptions
from dyntok.batch.storage import Output
from dyntok.errors import BatchError, DataError
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.vocab import VisualVocab

ROWS_IN_GROUP = 1024  # of a Parquet file: what a reader takes at once
METADATA_KEY = b"dyntok"
_MEGATRON_MAGIC, _MEGATRON_VERSION = b"MMIDIDX\x00\x00", 1
_MEGATRON_TYPES = {"uint16": 8, "int32": 4}


class Writer(Protocol):
    def write(
        self, output: Output, name: str, items: Sequence[Item], types: Mapping[str, pa.DataType]
    ) -> dict[str, int]:
        """Makes the files of one output shard appear; their names and sizes in bytes. Raises `BatchError`."""
        ...


def make_writer(options: BatchOptions, tokenizer: DynamicVisualTokenizer, description: Mapping[str, Any]) -> Writer:
    codes, patches = tokenizer.config.codebook.size, tokenizer.grid[0] * tokenizer.grid[1]
    if options.format == "megatron":
        return Megatron(VisualVocab.after(options.vocab_size, codes))
    if options.format == "webdataset":
        return WebDataset(description)
    return Parquet(options.interleaved, codes, patches, description)


class Parquet:
    """One row per image: key, codes, positions, grid (rows, columns), width, height, columns.

    In interleaved data a row holds a list of each, with nulls where the input has no image or a broken one.
    """

    def __init__(self, interleaved: bool, codes: int, patches: int, description: Mapping[str, Any]) -> None:
        code, position = pa.from_numpy_dtype(narrowest(codes)), pa.from_numpy_dtype(narrowest(patches))
        columns = {"codes": pa.list_(code), "positions": pa.list_(position), "grid": pa.list_(pa.uint16(), 2)}
        columns |= {"width": pa.uint32(), "height": pa.uint32()}
        self.columns = {name: pa.list_(kind) for name, kind in columns.items()} if interleaved else columns
        self.interleaved = interleaved
        self.metadata = {METADATA_KEY: json.dumps({**description, "codebook_size": codes}, ensure_ascii=False).encode()}

    def write(
        self, output: Output, name: str, items: Sequence[Item], types: Mapping[str, pa.DataType]
    ) -> dict[str, int]:
        values = {"codes": _codes, "positions": _positions, "grid": _grid, "width": _width, "height": _height}
        arrays = {"key": pa.array([item.sample.key for item in items], pa.string())}
        for column, kind in self.columns.items():
            rows = [[image and values[column](image) for image in _images(item)] for item in items]
            arrays[column] = pa.array(rows if self.interleaved else [row for (row,) in rows], kind)
        for column, kind in types.items():
            arrays[column] = pa.array([item.sample.columns[column] for item in items], kind)
        schema = pa.schema([(column, array.type) for column, array in arrays.items()], self.metadata)
        table = pa.Table.from_arrays(list(arrays.values()), schema=schema)
        file = f"{name}.parquet"
        size = output.publish(
            file, lambda path: pq.write_table(table, path, row_group_size=ROWS_IN_GROUP, compression="zstd")
        )
        return {file: size}


def _images(item: Item) -> list[Tokens | None]:
    return [image if isinstance(image, Tokens) else None for image in item.sample.images]


def _codes(image: Tokens) -> np.ndarray:
    return image.codes


def _positions(image: Tokens) -> np.ndarray:
    return image.positions


def _grid(image: Tokens) -> tuple[int, int]:
    return image.grid


def _width(image: Tokens) -> int:
    return image.size[0]


def _height(image: Tokens) -> int:
    return image.size[1]


class WebDataset:
    """`KEY.codes.npy`, `KEY.positions.npy`, and `KEY.json` with the key as it was, the grid, the original size and columns.

    Names of members are safe: no absolute path, no "..", no dot in the last part, none twice.
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        self.description = description

    def write(
        self, output: Output, name: str, items: Sequence[Item], types: Mapping[str, pa.DataType]
    ) -> dict[str, int]:
        def write(path: str) -> None:
            taken: set[str] = set()
            with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
                for item in items:
                    (image,) = item.sample.images
                    stem = _member_name(item.sample.key, taken)
                    facts = {
                        "key": item.sample.key,
                        "grid": list(image.grid),
                        "width": image.size[0],
                        "height": image.size[1],
                    }
                    _add(tar, f"{stem}.codes.npy", _npy(image.codes))
                    _add(tar, f"{stem}.positions.npy", _npy(image.positions))
                    _add(
                        tar,
                        f"{stem}.json",
                        _json({**facts, **item.sample.columns, "fingerprint": self._fingerprint}),
                    )

        file = f"{name}.tar"
        return {file: output.publish(file, write)}

    @property
    def _fingerprint(self) -> str:
        return self.description["tokenizer"]["fingerprint"]


def _member_name(key: str, taken: set[str]) -> str:
    parts = [
        part for part in PurePosixPath(key.replace("\\", "/").replace("\0", "")).parts if part not in ("/", "..", ".")
    ] or ["_"]
    stem = "/".join([*parts[:-1], parts[-1].replace(".", "_")])
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}~{number}", number + 1
    taken.add(name)
    return name


def _npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return file.getvalue()


def _json(values: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(values, ensure_ascii=False).encode()
    except TypeError as error:
        raise DataError(
            f"a column of {values['key']!r} can't be written as JSON ({error}); write parquet, or leave it out"
        ) from error


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


class Megatron:
    """Megatron-core's indexed dataset: a document per row, each image between start and end, in the LLM's ids; and the keys as JSON."""

    def __init__(self, vocab: VisualVocab) -> None:
        self.vocab = vocab
        self.dtype = np.dtype("uint16" if vocab.dtype == "uint16" else "int32")
        if vocab.vocab_size - 1 > np.iinfo(self.dtype).max:
            raise BatchError(
                f"ids up to {vocab.vocab_size - 1} do not fit into Megatron's {self.dtype}; the vocabulary must be smaller"
            )

    def write(
        self, output: Output, name: str, items: Sequence[Item], types: Mapping[str, pa.DataType]
    ) -> dict[str, int]:
        documents = [
            np.concatenate([self._ids(image) for image in _images(item) if image] or [np.empty(0)]) for item in items
        ]
        lengths = [len(document) for document in documents]
        keys = [item.sample.key for item in items]
        writes: dict[str, Callable[[str], Any]] = {
            f"{name}.bin": lambda path: np.concatenate(documents).astype(self.dtype).tofile(path),
            f"{name}.idx": lambda path: Path(path).write_bytes(megatron_index(lengths, self.dtype)),
            f"{name}.keys.json": lambda path: Path(path).write_text(
                json.dumps(keys, ensure_ascii=False) + "\n", encoding="utf-8"
            ),
        }
        return {file: output.publish(file, write) for file, write in writes.items()}

    def _ids(self, image: Tokens) -> np.ndarray:
        return self.vocab.to_ids(image.codes.astype(np.int64)).numpy()


def megatron_index(lengths: Sequence[int], dtype: np.dtype) -> bytes:
    """The `.idx` file of documents that are one sequence each: header, lengths (int32), byte offsets (int64), documents (int64)."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])[:-1] * dtype.itemsize
    header = _MEGATRON_MAGIC + struct.pack(
        "<QBQQ", _MEGATRON_VERSION, _MEGATRON_TYPES[dtype.name], len(lengths), len(lengths) + 1
    )
    arrays = np.asarray(lengths, "<i4"), offsets.astype("<i8"), np.arange(len(lengths) + 1, dtype="<i8")
    return header + b"".join(array.tobytes() for array in arrays)
