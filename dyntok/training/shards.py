"""Shards of streamed training: webdataset tars and Parquet files, local or at an address of fsspec.

A shard is read from front to back: the headers of a tar, the keys of a table. The bytes of an image are read when it is
used. Not here: the order in which shards and images are drawn (`stream.py`).
"""

import logging
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from dyntok.addresses import BLOCK, address_of, is_remote, locate, redact, wrap_storage_errors
from dyntok.errors import BatchError, DataError, DyntokError, MissingDependencyError
from dyntok.image import IMAGE_SUFFIXES
from dyntok.tars import tar_members
from dyntok.training.sources import ImageSample, Split, is_hidden, is_validation

if TYPE_CHECKING:
    from dyntok.tables import RowGroup

_SUFFIXES = (".tar", ".parquet")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TableSample(ImageSample):
    """Where one image is stored: in a row of a row group, whose number is `offset`."""

    group: "RowGroup | None" = None
    content: bytes | None = None

    def read(self) -> bytes:
        if self.content is not None:
            return self.content
        assert self.group is not None  # one of the two is always there
        return self.group.image(self.offset)

    def alone(self) -> "TableSample":
        """Returns the sample with its own bytes, so that the images around it need not stay in memory."""
        try:
            return replace(self, content=self.read(), group=None)
        except (DyntokError, OSError):
            return self  # reading it again says why


def find_shards(sources: Sequence[str | Path]) -> list[str]:
    """Returns the addresses of the tars and Parquet files that are named or lie in folders, in order.

    Raises `DataError` if a source does not exist or holds none.
    """
    shards: list[str] = []
    for source in map(str, sources):
        found = [name for name in _files(source) if PurePosixPath(name).suffix in _SUFFIXES]
        if not found:
            raise DataError(
                f"{redact(source)} holds no tars and no Parquet files, expected a folder of them, a .tar or a .parquet "
                "file; stream: 0 lists images"
            )
        shards += found
    return shards


def _files(source: str) -> list[str]:
    if not is_remote(source):
        local = Path(source)
        return [str(file) for file in sorted(local.rglob("*"))] if local.is_dir() else [source] * local.exists()
    try:
        fs, path = locate(source, {})
        with wrap_storage_errors("list", source):
            files = sorted(fs.find(path)) if fs.isdir(path) else [path] * fs.exists(path)
    except BatchError as error:
        raise DataError(str(error)) from error
    return [address_of(source, fs, file) for file in files]


def images_of(shard: str, split: Split) -> Iterator[ImageSample]:
    """Yields the images of a shard as it is read. It warns of those that are left out: links, and what follows damage.

    Raises `DataError` where a Parquet file has no column of images, or several.
    """
    try:
        for image in (_in_tar if shard.endswith(".tar") else _in_table)(shard):
            if split == "all" or is_validation(image.key) == (split == "validation"):
                yield image
    except (BatchError, tarfile.TarError, OSError, EOFError) as error:
        _log.warning("left out the rest of %s: %s", redact(shard), error)


def _in_tar(shard: str) -> Iterator[ImageSample]:
    fs, path = locate(shard, {})
    links = 0
    try:
        with wrap_storage_errors("read", shard):
            file = fs.open(path, "rb", block_size=BLOCK)
        with file:
            for _, member in tar_members(file, 0):
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if f".{extension.lower()}" not in IMAGE_SUFFIXES or is_hidden(name):
                    continue
                if not member.isreg() or member.issparse():
                    links += 1
                    continue
                yield ImageSample(f"{folder}/{stem}" if folder else stem, shard, member.offset_data, member.size)
    finally:
        if links:
            _log.warning("left out %d images of %s that are links; stream: 0 resolves them", links, redact(shard))


def _in_table(shard: str) -> Iterator[ImageSample]:
    try:
        from dyntok.tables import RowGroup, image_column, key_column, open_table, row_key
    except ImportError as error:
        raise MissingDependencyError.of("pyarrow", "train") from error
    stem, first = PurePosixPath(shard).stem, 0
    with open_table(shard, {}) as file:
        image, key = image_column(file.schema_arrow, redact(shard)), key_column(file.schema_arrow)
        for number in range(file.num_row_groups):
            group, rows = RowGroup(shard, number, image), file.metadata.row_group(number).num_rows
            keys = [None] * rows
            if key is not None:
                with wrap_storage_errors("read", shard):
                    keys = file.read_row_group(number, [key]).column(0).to_pylist()
            for row, name in enumerate(keys):
                yield TableSample(row_key(stem, first + row) if name is None else str(name), shard, row, group=group)
            first += rows
