"""Parquet files with a column of images: opening them, and which columns hold images and keys.

`batch` reads all rows of them, streamed training those that are drawn.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from dyntok.addresses import BLOCK, StorageOptions, locate, wrap_storage_errors
from dyntok.errors import DataError, ImageError

_KEY_COLUMNS = ("key", "__key__")


@contextmanager
def open_table(
    address: str, storage: StorageOptions, footer: pq.FileMetaData | None = None
) -> Iterator[pq.ParquetFile]:
    """Opens a Parquet file. Raises `BatchError` where it can't be read.

    footer: the `metadata` of the file, where it was opened before.
    """
    fs, path = locate(address, storage)
    with wrap_storage_errors("read", address, storage):
        stream = fs.open(path, "rb", block_size=BLOCK)
    with stream:
        with wrap_storage_errors("read", address, storage):
            file = pq.ParquetFile(stream, metadata=footer, buffer_size=2**20, pre_buffer=False)
        yield file


def check_column(schema: pa.Schema, column: str, name: str) -> None:
    """Raises `DataError` where the table of that name has no such column."""
    if column not in schema.names:
        raise DataError(f"{name} has no column {column!r}; it has {', '.join(schema.names)}")


def image_column(
    schema: pa.Schema, name: str, wanted: str | None = None, *, interleaved: bool = False, advice: str = ""
) -> str:
    """Returns the column of images: the wanted one, or the only one. Raises `DataError` where there is none.

    name: of the table, for messages, which end with `advice`. interleaved: its rows hold lists of images.
    """
    if wanted is not None:
        check_column(schema, wanted, name)
    images = [column.name for column in schema if _holds_images(column.type, interleaved)]
    image = wanted or (images[0] if len(images) == 1 else None)
    if image is None or image not in images:
        what = "lists of images" if interleaved else "images"
        found = f"several columns that may hold {what}: {', '.join(images)}" if images else f"no column of {what}"
        if wanted:
            found = f"a column {image!r} of type {schema.field(image).type}"
        raise DataError(f"{name} has {found}; expected bytes, or a struct with bytes{advice}")
    return image


def key_column(schema: pa.Schema) -> str | None:
    """Returns the column of keys, if there is one with a usual name."""
    return next((key for key in _KEY_COLUMNS if key in schema.names), None)


def row_key(stem: str, row: int) -> str:
    """Returns the key of a row of a table without keys."""
    return f"{stem}-{row:08d}"


class RowGroup:
    """The images of a row group, which are read together when the first of them is wanted."""

    def __init__(self, address: str, number: int, column: str, footer: pq.FileMetaData) -> None:
        self.address, self.number, self.column, self.footer = address, number, column, footer
        self._images: list | None = None

    def image(self, row: int) -> bytes:
        """Returns the bytes of an image. Raises `ImageError` where there are none, `BatchError` as `open_table`."""
        if self._images is None:
            with open_table(self.address, {}, self.footer) as file, wrap_storage_errors("read", self.address):
                self._images = file.read_row_group(self.number, [self.column]).column(0).to_pylist()
        value = self._images[row]
        content = value["bytes"] if isinstance(value, dict) else value
        if content is None:
            raise ImageError(f"row {row} of row group {self.number} has no bytes; embed the images in the table")
        return content


def _holds_images(kind: pa.DataType, interleaved: bool) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if interleaved:
        return _is_list(kind) and _holds_images(kind.value_type, False)
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_images(kind.field("bytes").type, False)
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(is_kind(kind) for is_kind in binary)


def _is_list(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_list_view, pa.types.is_large_list_view)
    return any(is_kind(kind) for is_kind in lists) or pa.types.is_fixed_size_list(kind)
