"""Zip archives: members with the same key are one sample, as in tars, wherever they are in the archive."""

import lzma
import posixpath
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import IO, cast

import pyarrow as pa

from dyntok.addresses import BLOCK, locate, redact, wrap_storage_errors
from dyntok.batch.inputs.left_out import HIDDEN, LeftOut
from dyntok.batch.inputs.members import Group, Role, images_and_columns, role_of, too_large
from dyntok.batch.inputs.names import sample_of, without_surrogates
from dyntok.batch.inputs.samples import Broken, FileShards, InputSample, Shard, StorageFile, text_types
from dyntok.image import sniff
from dyntok.names import is_hidden, split_key

_MAX_LINKS = 16  # links to links
_MAX_NAME = 4096  # bytes of a link's target
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    OSError,
    ValueError,
)


class Zips(FileShards):
    kind = "zip"

    @contextmanager
    def open(self, shard: Shard, start: int) -> Iterator["_ZipReader"]:
        fs, path = locate(shard.address, self.storage)
        with ExitStack() as stack:
            with wrap_storage_errors("read", shard.address, self.storage):
                file = StorageFile(stack.enter_context(fs.open(path, "rb", block_size=BLOCK)))
                archive = _opened(file)
            yield _ZipReader(archive, file, shard, start, self)


def _opened(file: StorageFile) -> zipfile.ZipFile | Broken:
    """Returns the archive, or why it can't be read. Raises what its storage raises."""
    try:
        return zipfile.ZipFile(cast(IO[bytes], file))
    except _UNREADABLE as error:
        file.raise_failure()
        return Broken(f"the zip archive can't be read: {error}; all its samples are lost")


@dataclass
class _ZipReader:
    archive: zipfile.ZipFile | Broken
    file: StorageFile
    shard: Shard
    start: int
    zips: Zips
    left_out: LeftOut = field(default_factory=LeftOut)

    @property
    def types(self) -> dict[str, pa.DataType]:
        return text_types(self.zips.options.keep_columns)

    def __iter__(self) -> Iterator[InputSample]:
        source = redact(self.shard.address)
        if isinstance(self.archive, Broken):
            yield InputSample("", [self.archive], {}, self.shard.size, source)
        else:
            with wrap_storage_errors("read", self.shard.address, self.zips.storage):
                yield from self._samples(source)
        self.left_out.merge(dict(self.shard.left_out))

    def _samples(self, source: str) -> Iterator[InputSample]:
        position = 0  # grows with the compressed size, and by at least one with every member
        for key, members in self._groups():
            begin, position = position, position + sum(member.compress_size + 1 for member in members)
            if begin < self.start:
                continue
            group = self._read_group(key, members)
            for name in group.unused:
                self.left_out.count(name)
            if group.images:
                images, columns = images_and_columns(group, self.zips.options)
                passed = dict(self.left_out)
                self.left_out.clear()
                yield InputSample(group.key, images, columns, position, source, passed)
            else:
                for extension in group.columns:
                    self.left_out.count(f"{key}.{extension}")

    @property
    def _intact(self) -> zipfile.ZipFile:
        assert isinstance(self.archive, zipfile.ZipFile)  # iteration ends at once where it is Broken
        return self.archive

    def _groups(self) -> list[tuple[str, list[zipfile.ZipInfo]]]:
        """Returns the members of every sample, in the order of their first members. A repeated name is a new sample."""
        groups: list[tuple[str, list[zipfile.ZipInfo]]] = []
        open_groups: dict[str, tuple[set[str], list[zipfile.ZipInfo]]] = {}
        for info in self._intact.infolist():
            if info.is_dir():
                continue
            key, extension = split_key(info.filename)
            key = without_surrogates(key)
            sample = sample_of(key)
            if sample not in open_groups or extension in open_groups[sample][0]:
                open_groups[sample] = set(), []
                groups.append((key, open_groups[sample][1]))
            open_groups[sample][0].add(extension)
            open_groups[sample][1].append(info)
        return groups

    def _read_group(self, key: str, members: list[zipfile.ZipInfo]) -> Group:
        group = Group(key)
        for member in members:
            extension = split_key(member.filename)[1]
            role, content = role_of(member.filename, extension, self.zips.options.keep_columns), None
            if is_hidden(member.filename):
                self.left_out.add(HIDDEN)
                continue
            if role is not Role.LEFT_OUT:
                content = self._read(member, extension, role)
            if role is Role.UNNAMED:
                role = Role.IMAGE if isinstance(content, bytes) and sniff(content) else Role.LEFT_OUT
            if role is Role.IMAGE:
                group.key = without_surrogates(split_key(member.filename)[0])
            group.add(member.filename, role, extension, content)
        return group

    def _read(self, member: zipfile.ZipInfo, extension: str, role: Role) -> bytes | Broken:
        try:
            for _ in range(_MAX_LINKS):
                if not stat.S_ISLNK(member.external_attr >> 16):
                    break
                member = self._target(member)
            else:
                return Broken(f"link to {member.filename}: the links lead in a circle")
            if error := too_large(extension, member.file_size, role):
                return error
            with self._intact.open(member) as file:  # gives no more bytes than `file_size`
                return file.read()
        except KeyError as error:
            self.file.raise_failure()
            return Broken(f"link to {error.args[0]}: its target is not in the zip archive")
        except _UNREADABLE as error:
            self.file.raise_failure()
            cause = str(error).replace(f" for file {member.filename!r}", "")
            return Broken(f"{member.filename}: can't be read from the zip archive ({cause})")

    def _target(self, link: zipfile.ZipInfo) -> zipfile.ZipInfo:
        """Raises `KeyError` where the archive does not hold the target."""
        with self._intact.open(link) as file:
            target = file.read(_MAX_NAME).decode("utf-8", "replace")
        name = posixpath.normpath(posixpath.join(posixpath.dirname(link.filename), target))
        if name not in self._intact.NameToInfo:
            raise KeyError(target)
        return self._intact.NameToInfo[name]
