"""Shards of streamed training: webdataset tars and Parquet files, local or at an address of fsspec.

A shard is read from front to back: the headers of a tar, the keys of a table. The bytes of an image are read when it is
used. Not here: the order in which shards and images are drawn (`stream.py`).
"""

import logging
import posixpath
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from dyntok.addresses import BLOCK, address_of, is_remote, locate, redact, wrap_storage_errors
from dyntok.errors import BatchError, DataError, DyntokError, MissingDependencyError
from dyntok.image import IMAGE_SUFFIXES
from dyntok.names import is_hidden, split_key
from dyntok.tars import tar_members
from dyntok.training.sources import (
    REPEATED,
    ImageSample,
    Inventory,
    Split,
    files_below,
    image_of_key,
    is_validation,
    suffix_of_member,
)
from dyntok.validation import counted

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

    @property
    def read_with(self) -> object:
        return self.group

    def alone(self) -> "TableSample":
        """Returns the sample with its own bytes, so that the images around it need not stay in memory."""
        try:
            return replace(self, content=self.read(), group=None)
        except (DyntokError, OSError):
            return self  # reading it again says why


def find_shards(sources: Sequence[str | Path], inventory: Inventory | None = None) -> list[str]:
    """Returns the addresses of the tars and Parquet files that are named or lie in folders, in order.

    inventory: is given what was left out. Raises `DataError` if a source does not exist or holds none.
    """
    inventory = Inventory() if inventory is None else inventory
    shards: list[str] = []
    for source in map(str, sources):
        files = _files(source, inventory)
        found = [file for file in files if not is_hidden(PurePosixPath(file).name) and _suffix(file) in _SUFFIXES]
        if not found:
            raise DataError(
                f"{redact(source)} holds no tars and no Parquet files, expected a folder of them, a .tar or a .parquet "
                "file; stream: 0 lists images"
            )
        kept = set(found)
        for file in files:
            if file not in kept:
                inventory.leave_out(PurePosixPath(file).name)
        shards += found
    return shards


def _suffix(file: str) -> str:
    return PurePosixPath(file).suffix.lower()


def _files(source: str, inventory: Inventory) -> list[str]:
    if not is_remote(source):
        if Path(source).is_dir():
            return [str(file) for file in sorted(files_below(Path(source), inventory))]
        return [source] if Path(source).exists() else []
    try:
        fs, path = locate(source, {})
        with wrap_storage_errors("list", source):
            if not fs.isdir(path):
                return [source] if fs.exists(path) else []
            files = sorted(fs.find(path))
    except BatchError as error:
        raise DataError(str(error)) from error
    hidden = {file for file in files if is_hidden(posixpath.dirname(posixpath.relpath(file, path)))}
    inventory.left_out += Counter({"hidden": len(hidden)})
    return [address_of(source, fs, file) for file in files if file not in hidden]


def images_of(shard: str, split: Split, warn: Callable[[str], None] = _log.warning) -> Iterator[ImageSample]:
    """Yields the images of a shard as it is read.

    warn: is told which ones are left out: links, further images of a key, and what follows damage.

    Raises `DataError` where a Parquet file has no column of images, or several.
    """
    try:
        for image in _in_tar(shard, warn) if _suffix(shard) == ".tar" else _in_table(shard):
            if split == "all" or is_validation(image.key) == (split == "validation"):
                yield image
    except (BatchError, tarfile.TarError, OSError, EOFError) as error:
        warn(f"left out the rest of {redact(shard)}: {error}")


def _in_tar(shard: str, warn: Callable[[str], None]) -> Iterator[ImageSample]:
    fs, path = locate(shard, {})
    links = further = 0
    try:
        with wrap_storage_errors("read", shard):
            file = fs.open(path, "rb", block_size=BLOCK)
        with file:
            for key, images in _images_by_key(file):
                regular = [image for image in images if image.isreg() and not image.issparse()]
                links += len(images) - len(regular)
                further += max(len(regular) - 1, 0)
                if regular:
                    member = image_of_key(regular)
                    yield ImageSample(key, shard, member.offset_data, member.size)
    finally:
        if links:
            warn(f"left out {counted(links, 'link')} of {redact(shard)} to images; stream: 0 resolves them")
        if further:
            warn(f"left out {further} {REPEATED}, of {redact(shard)}")


def _images_by_key(file: IO[bytes]) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    """Yields the images that lie next to each other and have the same key. Damage is raised after what comes before."""
    damage, key = None, ""
    images: list[tarfile.TarInfo] = []
    try:
        for _, member in tar_members(file, 0):
            own, extension = split_key(member.name)
            if suffix_of_member(extension) not in IMAGE_SUFFIXES or member.isdir() or is_hidden(member.name):
                continue
            if images and own != key:
                yield key, images
                images = []
            key = own
            images.append(member)
    except (tarfile.TarError, OSError, EOFError) as error:
        damage = error
    if images:
        yield key, images
    if damage:
        raise damage


def _in_table(shard: str) -> Iterator[ImageSample]:
    try:
        from dyntok.tables import RowGroup, image_column, key_column, open_table, row_key
    except ImportError as error:
        raise MissingDependencyError.of("pyarrow", "train") from error
    stem, first = PurePosixPath(shard).stem, 0
    with open_table(shard, {}) as file:
        image, key = image_column(file.schema_arrow, redact(shard)), key_column(file.schema_arrow)
        for number in range(file.num_row_groups):
            group, rows = RowGroup(shard, number, image, file.metadata), file.metadata.row_group(number).num_rows
            keys = [None] * rows
            if key is not None:
                with wrap_storage_errors("read", shard):
                    keys = file.read_row_group(number, [key]).column(0).to_pylist()
            for row, name in enumerate(keys):
                yield TableSample(row_key(stem, first + row) if name is None else str(name), shard, row, group=group)
            first += rows
