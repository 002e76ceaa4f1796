"""How rows of codes become files: Parquet and webdataset tars.

The same rows give the same bytes (with the same library versions). Not here: Megatron's files (`megatron.py`), and
where files go, and when (`storage.py`, `manifest.py`).
"""

import io
import json
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dyntok.batch.engines.rows import TokenizedImage, TokenizedRow
from dyntok.batch.megatron import Megatron as Megatron
from dyntok.batch.megatron import TextTokenizer, visual_vocab
from dyntok.batch.megatron import megatron_index as megatron_index
from dyntok.batch.options import BatchOptions
from dyntok.batch.shapes import code_type, position_type
from dyntok.batch.storage import Output
from dyntok.errors import DataError
from dyntok.tokenizer import DynamicVisualTokenizer

ROWS_IN_GROUP = 1024  # of a Parquet file: what a reader takes at once
METADATA_KEY = b"dyntok"
_MEMBER_SUFFIX = re.compile(r"[\w-]+(\.[\w-]+)*")
_OWN_MEMBERS = ("json", "codes.npy", "positions.npy")


class Writer(Protocol):
    """Writes output shards in one format."""

    def write(
        self, output: Output, name: str, rows: Sequence[TokenizedRow], types: Mapping[str, pa.DataType]
    ) -> dict[str, int]:
        """Makes the files of one output shard appear; returns their names and sizes in bytes. Raises `BatchError`.

        There may be no rows: all of the shard's images failed. types: of the extra columns.
        """
        ...


def make_writer(options: BatchOptions, tokenizer: DynamicVisualTokenizer, description: Mapping[str, Any]) -> Writer:
    """Returns the writer for `options.format`."""
    if options.format == "megatron":
        text = None if options.text_tokenizer is None else TextTokenizer(options.text_tokenizer, options.keep_columns)
        return Megatron(visual_vocab(options, tokenizer), options.eod, text)
    if options.format == "webdataset":
        return WebDataset(description)
    types = {"codes": code_type(tokenizer), "positions": position_type(tokenizer, options)}
    return Parquet(options, types, {**description, "codebook_size": tokenizer.config.codebook.size})


class Parquet:
    """One row per image: key, codes, positions, grid (rows, columns), width, height, crop box, margins on
    request, extra columns.

    In interleaved data a row holds a list of each, with nulls where the input has no image or a broken one. A shard
    without rows still gets a file, so that readers find the types of its columns.
    """

    def __init__(self, options: BatchOptions, types: Mapping[str, np.dtype], metadata: Mapping[str, Any]) -> None:
        """Prepare the schema of the tables.

        types: of codes and positions. metadata: of the schema.
        """
        columns: dict[str, pa.DataType] = {name: pa.list_(pa.from_numpy_dtype(kind)) for name, kind in types.items()}
        columns |= {"grid": pa.list_(pa.uint16(), 2), "width": pa.uint32(), "height": pa.uint32()}
        columns["crop_box"] = pa.list_(pa.uint32(), 4)
        if options.margins:
            columns["margins"] = pa.list_(pa.float32(), 2)
        self.interleaved = options.interleaved
        self.columns = {name: pa.list_(kind) for name, kind in columns.items()} if self.interleaved else columns
        self.metadata = {METADATA_KEY: json.dumps(metadata).encode()}

    def write(
        self, output: Output, name: str, rows: Sequence[TokenizedRow], types: Mapping[str, pa.DataType]
    ) -> dict[str, int]:
        arrays = {"key": pa.array([row.key for row in rows], pa.string())}
        for column, kind in self.columns.items():
            value = _VALUES[column]
            cells = [[image and value(image) for image in row.images] for row in rows]
            arrays[column] = pa.array(cells if self.interleaved else [cell for (cell,) in cells], kind)
        for column, kind in types.items():
            arrays[column] = pa.array([row.columns[column] for row in rows], kind)
        schema = pa.schema([(column, array.type) for column, array in arrays.items()], self.metadata)
        table = pa.Table.from_arrays(list(arrays.values()), schema=schema)
        file = f"{name}.parquet"
        size = output.publish(
            file, lambda path: pq.write_table(table, path, row_group_size=ROWS_IN_GROUP, compression="zstd")
        )
        return {file: size}


_VALUES: dict[str, Callable[[TokenizedImage], Any]] = {
    "codes": lambda image: image.codes,
    "positions": lambda image: image.positions,
    "grid": lambda image: image.grid,
    "width": lambda image: image.size[0],
    "height": lambda image: image.size[1],
    "crop_box": lambda image: image.crop_box,
    "margins": lambda image: image.margins,
}


class WebDataset:
    """`KEY.codes.npy`, `KEY.positions.npy`, `KEY.NAME` for each extra column of text, and `KEY.json` for the rest.

    The JSON holds the key as it was, the grid, the original size, the crop box, the fingerprint, and extra columns that
    are numbers, structures or null. Names of members are safe: no absolute path, no "..", no dot in the key's last
    part, none twice.
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        self.fingerprint = description["tokenizer"]["fingerprint"]

    def write(
        self, output: Output, name: str, rows: Sequence[TokenizedRow], types: Mapping[str, pa.DataType]
    ) -> dict[str, int]:
        def write(path: str) -> None:
            taken: set[str] = set()
            with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
                for row in rows:
                    stem = _member_name(row.key, taken)
                    for suffix, content in self._members(row):
                        _add(tar, f"{stem}.{suffix}", content)

        file = f"{name}.tar"
        return {file: output.publish(file, write)} if rows else {}

    def _members(self, row: TokenizedRow) -> list[tuple[str, bytes]]:
        """Returns (suffix, content) of each member of a row."""
        (image,) = row.present
        texts = {name: value for name, value in row.columns.items() if is_text_member(name, value)}
        facts = {"key": row.key, "grid": list(image.grid), "width": image.size[0], "height": image.size[1]}
        facts["crop_box"] = list(image.crop_box)
        facts |= {name: value for name, value in row.columns.items() if name not in texts}
        return [
            ("codes.npy", _npy(image.codes)),
            ("positions.npy", _npy(image.positions)),
            *((name, text.encode()) for name, text in texts.items()),
            ("json", _json({**facts, "fingerprint": self.fingerprint})),
        ]


def is_text_member(name: str, value: Any) -> bool:
    """Returns whether an extra column becomes a file of its own, as in webdataset, not an entry in the JSON."""
    return isinstance(value, str) and name not in _OWN_MEMBERS and _MEMBER_SUFFIX.fullmatch(name) is not None


def _member_name(key: str, taken: set[str]) -> str:
    path = PurePosixPath(key.replace("\\", "/").replace("\0", ""))
    parts = [part for part in path.parts if part not in ("/", "..", ".")] or ["_"]
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
            f"an extra column of {values['key']!r} can't be written as JSON ({error}); write parquet, or leave it out"
        ) from error


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
