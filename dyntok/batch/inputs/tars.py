"""Webdataset tars, plain or compressed: members with the same key are one sample, `KEY.jpg` with `KEY.txt`.

A key is a name, never a path that is written to. Links within a tar are resolved. A tar that is damaged or cut off
gives the samples before the damage, and one more row with an error.
"""

import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from dyntok.addresses import BLOCK, locate, redact, wrap_storage_errors
from dyntok.batch.inputs.compression import Decompressed, decompressed
from dyntok.batch.inputs.left_out import HIDDEN, LeftOut
from dyntok.batch.inputs.members import Group, Role, images_and_columns, is_column, role_of, too_large
from dyntok.batch.inputs.names import sample_of, without_surrogates
from dyntok.batch.inputs.samples import Broken, FileShards, InputSample, Shard, StorageFile, text_types
from dyntok.batch.inputs.tar_index import TarIndex
from dyntok.errors import BatchError
from dyntok.image import sniff
from dyntok.names import is_hidden, split_key
from dyntok.tars import is_link, tar_members


class Tars(FileShards):
    kind = "tar"

    @contextmanager
    def open(self, shard: Shard, start: int) -> Iterator["_TarReader"]:
        fs, path = locate(shard.address, self.storage)
        with ExitStack() as stack:
            with wrap_storage_errors("read", shard.address, self.storage):
                opened = fs.open(path, "rb", block_size=BLOCK, cache_type="readahead")
                file = StorageFile(stack.enter_context(opened))
                content = stack.enter_context(decompressed(file, shard.size))
            yield _TarReader(content, shard, start, self, isinstance(fs, LocalFileSystem) or content.file is not file)


@dataclass
class _TarReader:
    content: Decompressed
    shard: Shard
    start: int
    tars: Tars
    local: bool  # if not, going through all headers would read the tar twice
    left_out: LeftOut = field(default_factory=LeftOut)
    _position: int = 0  # of the first member that was not yielded
    _tar: tarfile.TarFile | None = None

    @property
    def types(self) -> dict[str, pa.DataType]:
        return text_types(self.tars.options.keep_columns)

    def __iter__(self) -> Iterator[InputSample]:
        source = redact(self.shard.address)
        try:
            with wrap_storage_errors("read", self.shard.address, self.tars.storage):
                for group, following in self._groups():
                    images, columns = self._sample(group)
                    if images:
                        yield InputSample(group.key, images, columns, following, source, self._take_left_out())
        except BatchError as error:
            if not isinstance(error.__cause__, (tarfile.TarError, EOFError)):
                raise
            reason = self.content.damage or error.__cause__
            broken = Broken(f"the tar can't be read further: {reason}; samples that may follow are lost")
            end = max(self.shard.size, self._position)
            yield InputSample("", [broken], {}, end, source, self._take_left_out())
        self.left_out.merge(dict(self.shard.left_out))

    def _take_left_out(self) -> dict[str, int]:
        """Returns what was left out since the sample before."""
        taken = dict(self.left_out)
        self.left_out.clear()
        return taken

    @cached_property
    def _index(self) -> TarIndex:
        return TarIndex(self.content.file)

    def _sample(self, group: Group) -> tuple[list[bytes | Broken], dict[str, str | None]]:
        """Returns the images and extra columns of a sample; no images if it is none of its own."""
        options = self.tars.options
        for name in group.unused:
            self.left_out.count(name)
        if self.local and (options.keep_columns or options.interleaved):
            self._join(group, self._index.parts(group.key))
        if group.images:
            return images_and_columns(group, options)
        names = [f"{group.key}.{extension}" for extension in group.columns]
        if names and not self.local:
            reason = "no image next to it; sort the tar by name, or copy it to a local disk"
            return [Broken(f"{', '.join(names)}: {reason}")], {}
        for name in names:
            self.left_out.count(name)
        return [], {}

    def _join(self, group: Group, parts: list[tarfile.TarInfo]) -> None:
        """Adds the members of the same key that are in other places of the tar."""
        roles = [(self._role(part.name), split_key(part.name)[1], part) for part in parts]
        images = {extension: part for role, extension, part in roles if role is Role.IMAGE}
        if not images:
            return
        if not group.images:
            group.columns.clear()  # they were, or will be, added to the images
            return
        for name in {name.lower() for name in self.tars.options.keep_columns} - set(group.columns):
            found = [part for role, extension, part in roles if role is Role.COLUMN and is_column(extension, [name])]
            if len(found) > 1:
                group.columns[name] = Broken(f"{group.key}.{name}: the tar has {len(found)} such members; expected one")
            elif found:
                group.columns[name] = self._read(found[0], name, Role.COLUMN)
        several = sum(role is Role.IMAGE for role, *_ in roles)
        if self.tars.options.interleaved and several == len(images):  # else the key names several samples
            if next(iter(images)) not in group.images:
                group.images.clear()  # the first image's group has them
                group.columns.clear()
                return
            for extension in images.keys() - group.images.keys():
                group.images[extension] = self._read(images[extension], extension, Role.IMAGE)
            group.images = {extension: group.images[extension] for extension in images}

    def _groups(self) -> Iterator[tuple[Group, int]]:
        """Yields the members of each sample, and where the next one starts.

        Damage is raised after what comes before.
        """
        damage, group = None, Group("")
        try:
            for name, role, content, offset in self._members():
                key, extension = split_key(name)
                key = without_surrogates(key)
                if group and (sample_of(key) != sample_of(group.key) or group.has(role, extension)):
                    yield group, offset
                    group = Group("")
                group.key = key if role is Role.IMAGE or not group else group.key
                group.add(name, role, extension, content)
        except (tarfile.TarError, EOFError) as error:
            damage = error
        if group:
            yield group, self._position
        if damage:
            raise damage

    def _members(self) -> Iterator[tuple[str, Role, bytes | Broken | None, int]]:
        """Yields (name, role, content, offset) of every file and link."""
        for tar, member in tar_members(self.content.file, self.start):
            self._position, self._tar = member.offset, tar
            if is_hidden(member.name):
                self.left_out.add(HIDDEN)
            elif member.isreg() or is_link(member):
                role, content = self._role(member.name), None
                if role is not Role.LEFT_OUT:
                    content = self._read(member, split_key(member.name)[1], role)
                if role is Role.UNNAMED:
                    role = Role.IMAGE if isinstance(content, bytes) and sniff(content) else Role.LEFT_OUT
                yield member.name, role, content, member.offset
            elif not member.isdir():
                self.left_out.add("devices and pipes")
            self._position = tar.offset
        if self.content.damage:
            raise tarfile.ReadError(self.content.damage)

    def _role(self, name: str) -> Role:
        return role_of(name, split_key(name)[1], self.tars.options.keep_columns)

    def _read(self, member: tarfile.TarInfo, extension: str, role: Role) -> bytes | Broken:
        if is_link(member):
            target = self._index.target(member)
            if isinstance(target, Broken):
                return target
            member = target
        if error := too_large(extension, member.size, role):
            return error
        content = self._tar.extractfile(member).read()
        if len(content) < member.size:
            raise tarfile.ReadError(f"cut off at byte {member.offset_data + len(content):,}")
        return content
