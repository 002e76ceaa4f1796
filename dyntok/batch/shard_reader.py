"""Rows of codes out of one file of an output folder, Parquet or webdataset."""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dyntok.addresses import wrap_storage_errors
from dyntok.batch.manifest import RecordedFile
from dyntok.batch.storage import Output
from dyntok.errors import DataError
from dyntok.names import split_key

_OF_IMAGES = ("codes", "positions", "grid", "width", "height", "crop_box")  # columns, as `CodesImage` has them


@dataclass(frozen=True)
class CodesImage:
    """One image of the output."""

    codes: np.ndarray
    positions: np.ndarray
    grid: Sequence[int]  # rows, columns
    width: int  # of the original
    height: int
    crop_box: Sequence[int] | None = None  # None: written by dyntok 0.1, which did not store it


@dataclass(frozen=True)
class CodesRow:
    """One row of the output."""

    key: str
    images: list[CodesImage]
    columns: dict[str, Any]


def read_block(output: Output, file: RecordedFile, group: int, columns: Sequence[str] = ()) -> list[CodesRow]:
    """Returns the rows of one row group of a Parquet file, or of a whole tar.

    Raises `BatchError`, and `DataError` where the file is not the recorded one or lacks a column.
    """
    name = file.name
    with wrap_storage_errors("read", f"{output.address}/{name}", output.options), output.open(name) as stream:
        file.check(output.address, size=stream.seek(0, io.SEEK_END))
        stream.seek(0)
        if name.endswith(".tar"):
            return list(_tar_rows(stream, columns))
        parquet = pq.ParquetFile(stream)
        file.check(output.address, size=file.bytes, rows=parquet.metadata.num_rows)
        present = parquet.schema_arrow.names
        if missing := [column for column in columns if column not in present]:
            raise DataError(f"{name} has no column {', '.join(missing)}; it has {', '.join(present)}")
        wanted = ["key", *(column for column in _OF_IMAGES if column in present), *columns]
        return list(_table_rows(parquet.read_row_group(group, columns=wanted), columns))


def _table_rows(table: pa.Table, columns: Sequence[str]) -> Iterator[CodesRow]:
    table, interleaved = table.combine_chunks(), pa.types.is_list(table.schema.field("codes").type.value_type)
    keys = table["key"].to_pylist()
    kept = {name: table[name].to_pylist() for name in columns}
    parts = {name: _values(table, name) for name in _OF_IMAGES if name in table.column_names}
    for i, key in enumerate(keys):
        row = {name: values[i] for name, values in parts.items()}
        images = [row]
        if interleaved:
            images = [dict(zip(row, image, strict=True)) for image in zip(*row.values(), strict=True)]
        present = [CodesImage(**image) for image in images if image["codes"] is not None]
        yield CodesRow(key, present, {name: values[i] for name, values in kept.items()})


def _values(table: pa.Table, name: str) -> list[Any]:
    """Returns what each row has in a column: a number, an array, or a list of these in interleaved data."""
    if name in ("width", "height"):
        return table[name].to_pylist()
    return _lists(table[name].chunk(0)) if len(table) else []


def _lists(array: pa.Array) -> list[Any]:
    """Returns a NumPy array for each list, a list of them for each list of lists, None for each null."""
    fixed = isinstance(array, pa.FixedSizeListArray)
    inner = array.flatten() if fixed else array.values
    nested = pa.types.is_list(inner.type) or pa.types.is_fixed_size_list(inner.type)
    values = _lists(inner) if nested else inner.to_numpy(zero_copy_only=False)
    present = array.is_valid().to_numpy(zero_copy_only=False)
    # `flatten` leaves nulls out
    bounds = np.append(0, np.cumsum(present) * array.type.list_size) if fixed else array.offsets.to_numpy()
    return [values[bounds[i] : bounds[i + 1]] if present[i] else None for i in range(len(array))]


def _tar_rows(stream: IO[bytes], columns: Sequence[str]) -> Iterator[CodesRow]:
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        members = ((member.name, tar.extractfile(member).read()) for member in tar)
        for _, group in groupby(members, key=lambda member: split_key(member[0])[0]):
            parts = {split_key(name)[1]: content for name, content in group}
            facts = json.loads(parts.pop("json"))
            codes, positions = (
                np.load(io.BytesIO(parts.pop(f"{name}.npy")), allow_pickle=False) for name in ("codes", "positions")
            )
            kept = {**{name: text.decode() for name, text in parts.items()}, **facts}  # all texts have their own file
            if missing := [column for column in columns if column not in kept]:
                raise DataError(f"a sample has no column {', '.join(missing)}; it has {', '.join(kept)}")
            grid, width, height = facts["grid"], facts["width"], facts["height"]
            image = CodesImage(codes, positions, grid, width, height, facts.get("crop_box"))
            yield CodesRow(facts["key"], [image], {name: kept[name] for name in columns})
