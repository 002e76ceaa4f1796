"""Parquet files with a column of images: bytes, or the struct of bytes and path that Hugging Face `datasets` writes; or
lists of them. Rows are read a few at a time.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from dyntok.addresses import address_of, is_remote, locate, redact, wrap_storage_errors
from dyntok.batch.inputs.samples import Broken, FileShards, InputSample, Shard, read_image
from dyntok.tables import check_column, image_column, key_column, open_table, row_key

_ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class _Path:
    """An image that a table names instead of holding its bytes."""

    address: str


class Tables(FileShards):
    kind = "parquet"

    def shards(self) -> Iterator[Shard]:
        index = 0
        for whole in super().shards():
            with open_table(whole.address, self.storage) as file:
                rows = file.metadata.num_rows
            for first in range(0, max(rows, 1), self.options.shard_size):
                left_out = whole.left_out if first == 0 else ()
                end = min(first + self.options.shard_size, rows)
                yield replace(whole, index=index, rows=(first, end), left_out=left_out)
                index += 1

    @contextmanager
    def open(self, shard: Shard, start: int) -> Iterator["_TableReader"]:
        with open_table(shard.address, self.storage) as file:
            image, key = self._image_and_key(file.schema_arrow, shard)
            yield _TableReader(file, shard, max(start, shard.rows[0]), self, image, key, dict(shard.left_out))

    def fetch(self, sample: InputSample) -> InputSample:
        """Reads the images that the table names by their paths."""
        if not any(isinstance(image, _Path) for image in sample.images):
            return sample
        return replace(sample, images=[self._read(i) if isinstance(i, _Path) else i for i in sample.images])

    def _read(self, image: _Path) -> str | bytes | Broken:
        return read_image(image.address, self.storage) if is_remote(image.address) else image.address

    def _image_and_key(self, schema: pa.Schema, shard: Shard) -> tuple[str, str | None]:
        """Returns the names of the image column and of the key column. Raises `DataError` where one is missing."""
        options, name = self.options, redact(shard.address)
        for column in filter(None, [options.key_column, *options.keep_columns]):
            check_column(schema, column, name)
        advice = "; image_column (--image-column) names it"
        image = image_column(schema, name, options.image_column, interleaved=options.interleaved, advice=advice)
        return image, options.key_column or key_column(schema)


@dataclass
class _TableReader:
    file: pq.ParquetFile
    shard: Shard
    start: int
    tables: Tables
    image: str
    key: str | None
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def types(self) -> dict[str, pa.DataType]:
        schema = self.file.schema_arrow
        return {name: schema.field(name).type for name in self.tables.options.keep_columns}

    def __iter__(self) -> Iterator[InputSample]:
        source, kept = redact(self.shard.address), self.tables.options.keep_columns
        stem = PurePosixPath(source).stem
        for row, values in self._rows():
            key = values[self.key] if self.key else row_key(stem, row)
            columns = {name: values[name] for name in kept}
            images = self._images(values[self.image])
            yield InputSample(_text(key), images, columns, row + 1, source)

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the wanted rows with their numbers, reading only the row groups that hold some."""
        stop, ends = self.shard.rows[1], [0]
        for group in range(self.file.num_row_groups):
            ends.append(ends[-1] + self.file.metadata.row_group(group).num_rows)
        groups = [i for i in range(self.file.num_row_groups) if ends[i + 1] > self.start and ends[i] < stop]
        if not groups:
            return
        names = list(dict.fromkeys([self.image, *filter(None, [self.key]), *self.tables.options.keep_columns]))
        row = ends[groups[0]]
        with wrap_storage_errors("read", self.shard.address, self.tables.storage):
            for batch in self.file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=names):
                skipped = min(max(self.start - row, 0), batch.num_rows)
                row += skipped
                for values in batch.slice(skipped, max(stop - row, 0)).to_pylist():
                    yield row, values
                    row += 1
                if row >= stop:  # the row group may go on, for other shards
                    return

    def _images(self, value: Any) -> list[Any]:
        if not self.tables.options.interleaved:
            return [self._image(value)]
        if value is None:
            return [Broken("is null")]
        return [None if image is None else self._image(image) for image in value]

    def _image(self, value: Any) -> bytes | Broken | _Path:
        if isinstance(value, dict):
            if value["bytes"] is None and value.get("path"):
                return self._named_image(value["path"])
            value = value["bytes"]
        return Broken("is null") if value is None else value

    def _named_image(self, path: str) -> Broken | _Path:
        """Returns the address of a file that a row names; relative paths start at the folder of the table."""
        address = self.shard.address
        if path.startswith("file://") and isinstance(locate(address, self.tables.storage)[0], LocalFileSystem):
            return _Path(path)
        if is_remote(path):
            advice = "embed the images, or give a list of paths"
            return Broken(f"{redact(path)}: the table has this address instead of bytes; {advice}")
        if is_remote(address) and (os.path.isabs(path) or ".." in path.split("/")):
            return Broken(f"{path}: the table has this path on another machine instead of bytes; embed the images")
        if os.path.isabs(path):
            return _Path(path)
        fs, table = locate(address, self.tables.storage)
        return _Path(address_of(address, fs, f"{table.rpartition('/')[0]}/{path}"))


def _text(key: Any) -> str:
    """Returns a key as text, "" where there is none. Columns of some writers hold bytes."""
    if isinstance(key, bytes):
        return key.decode("utf-8", "backslashreplace")
    return "" if key is None else str(key)
