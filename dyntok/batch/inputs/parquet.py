"""Parquet files with a column of images: bytes, or the struct of bytes and path that Hugging Face `datasets` writes; or lists of them.

Rows are read a few at a time. Paths inside a table are never opened: they are a stranger's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dyntok.batch.inputs.samples import Broken, FileShards, InputSample, Shard
from dyntok.batch.storage import BLOCK, locate, redact, wrap_storage_errors
from dyntok.errors import DataError

_ROWS = 16  # at a time
_KEYS = ("key", "__key__")


class Tables(FileShards):
    kind = "parquet"

    def shards(self) -> Iterator[Shard]:
        index = 0
        for whole in super().shards():
            with self._file(whole) as file:
                rows = file.metadata.num_rows
            for first in range(0, max(rows, 1), self.options.shard_size):
                yield replace(whole, index=index, rows=(first, min(first + self.options.shard_size, rows)))
                index += 1

    @contextmanager
    def open(self, shard: Shard, start: int) -> Iterator["_Rows"]:
        with self._file(shard) as file:
            yield _Rows(file, shard, max(start, shard.rows[0]), self, *self._columns(file.schema_arrow, shard))

    @contextmanager
    def _file(self, shard: Shard) -> Iterator[pq.ParquetFile]:
        fs, path = locate(shard.address, self.storage)
        with wrap_storage_errors("read", shard.address, self.storage):
            stream = fs.open(path, "rb", block_size=BLOCK)
        with stream:
            with wrap_storage_errors("read", shard.address, self.storage):
                file = pq.ParquetFile(stream, buffer_size=2**20, pre_buffer=False)
            yield file

    def _columns(self, schema: pa.Schema, shard: Shard) -> tuple[str, str | None]:
        """Names of the image column and of the key column. Raises `DataError` where one is missing."""
        options, name = self.options, redact(shard.address)
        wanted = [options.image_column, options.key_column, *options.keep_columns]
        for column in filter(None, wanted):
            if column not in schema.names:
                raise DataError(f"{name} has no column {column!r}; it has {', '.join(schema.names)}")
        images = [field.name for field in schema if _holds_images(field.type, options.interleaved)]
        image = options.image_column or (images[0] if len(images) == 1 else None)
        if image is None or image not in images:
            what = "lists of images" if options.interleaved else "images"
            found = f"several columns that may hold {what}: {', '.join(images)}" if images else f"no column of {what}"
            if options.image_column:
                found = f"a column {image!r} of type {schema.field(image).type}"
            raise DataError(
                f"{name} has {found}; expected bytes, or a struct with bytes; image_column (--image-column) names it"
            )
        return image, options.key_column or next((key for key in _KEYS if key in schema.names), None)


@dataclass
class _Rows:
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
        source, stem = redact(self.shard.address), PurePosixPath(redact(self.shard.address)).stem
        first, groups, (_, stop) = None, [], self.shard.rows
        row = 0  # of the next row group
        for group in range(self.file.num_row_groups):
            behind = row + self.file.metadata.row_group(group).num_rows
            if behind > self.start and row < stop:
                first = row if first is None else first
                groups.append(group)
            row = behind
        columns = list(dict.fromkeys([self.image, *filter(None, [self.key]), *self.tables.options.keep_columns]))
        row = first
        with wrap_storage_errors("read", self.shard.address, self.tables.storage):
            for batch in self.file.iter_batches(_ROWS, row_groups=groups, columns=columns) if groups else ():
                skipped = min(max(self.start - row, 0), batch.num_rows)
                row += skipped
                for values in batch.slice(skipped, max(stop - row, 0)).to_pylist():
                    key = values[self.key] if self.key else f"{stem}-{row:08d}"
                    row += 1
                    columns = {name: values[name] for name in self.tables.options.keep_columns}
                    yield InputSample(
                        "" if key is None else str(key), self._images(values[self.image]), columns, row, source
                    )

    def _images(self, value: Any) -> list[Any]:
        if not self.tables.options.interleaved:
            return [_image(value)]
        return [Broken("is null")] if value is None else [None if image is None else _image(image) for image in value]


def _image(value: Any) -> bytes | Broken:
    if isinstance(value, dict):
        if value["bytes"] is None and value.get("path"):
            return Broken("holds a path and no bytes; embed the images, or give a list of paths")
        value = value["bytes"]
    return Broken("is null") if value is None else value


def _holds_images(kind: pa.DataType, interleaved: bool) -> bool:
    if interleaved:
        return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _holds_images(kind.value_type, False)
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_images(kind.field("bytes").type, False)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
