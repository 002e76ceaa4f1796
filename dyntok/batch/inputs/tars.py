"""Webdataset tars: consecutive members with the same key are one sample, `KEY.jpg` beside `KEY.txt`.

A key is a name, never a path that anything is written to. A tar that is cut or damaged gives what stands before the damage, and one
more sample that tells of it. Not here: compressed tars.
"""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

from dyntok.batch.inputs.names import is_image, split_key, without_surrogates
from dyntok.batch.inputs.samples import Broken, FileShards, InputSample, Shard, text_types
from dyntok.batch.storage import BLOCK, locate, redact, wrap_storage_errors
from dyntok.errors import BatchError
from dyntok.image import MAX_FILE_BYTES

_MAX_COMPANION = 2**24  # bytes


class Tars(FileShards):
    kind = "tar"

    @contextmanager
    def open(self, shard: Shard, start: int) -> Iterator["_Members"]:
        fs, path = locate(shard.address, self.storage)
        with wrap_storage_errors("read", shard.address, self.storage):
            file = fs.open(path, "rb", block_size=BLOCK, cache_type="readahead")
        with file:
            yield _Members(file, shard, start, self)


@dataclass
class _Members:
    file: IO[bytes]
    shard: Shard
    start: int
    tars: Tars
    position: int = 0
    following: int = 0
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def types(self) -> dict[str, Any]:
        return dict(text_types(self.tars.options.keep_columns))

    def __iter__(self) -> Iterator[InputSample]:
        try:
            with wrap_storage_errors("read", self.shard.address, self.tars.storage):
                for key, group in self._groups():
                    images = self._images(key, group)
                    if images:
                        columns = {name: _text(group.get(name)) for name in self.tars.options.keep_columns}
                        yield InputSample(key, images, columns, self.following, redact(self.shard.address))
        except BatchError as error:
            if not isinstance(error.__cause__, (tarfile.TarError, EOFError)):
                raise
            reason = f"the tar can't be read on: {error.__cause__}; what may stand behind is lost"
            yield InputSample("", [Broken(reason)], {}, self.shard.size, redact(self.shard.address))

    def _groups(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(key, extension -> content) of every sample; `following` is then the offset of the next one. Damage is raised at its place."""
        damage, key, group = None, "", {}
        try:
            for member_key, extension, content, offset in self._members():
                if group and (member_key != key or extension in group):
                    self.following = offset
                    yield key, group
                    group = {}
                key = member_key
                group[extension] = content
        except (tarfile.TarError, EOFError) as error:
            damage = error
        if group:
            self.following = self.position
            yield key, group
        if damage:
            raise damage

    def _members(self) -> Iterator[tuple[str, str, Any, int]]:
        """(key, extension, content, offset) of every regular member; `position` is the offset of the first that was not yielded."""
        if self.shard.size == 0:
            return
        self.file.seek(self.start)
        tar = tarfile.open(fileobj=self.file, mode="r:")  # noqa: SIM115
        for member in tar:
            tar.members = []  # else it remembers all of them
            self.position = member.offset
            if member.isreg() and not member.issparse():
                key, extension = split_key(member.name)
                yield without_surrogates(key), extension, self._content(tar, member, extension), member.offset
            self.position = tar.offset
        self.file.seek(tar.offset)
        block = self.file.read(tarfile.BLOCKSIZE)
        if (
            block.strip(b"\0") or len(block) < tarfile.BLOCKSIZE
        ):  # a damaged header reads as the end, and so does a cut between members
            raise tarfile.ReadError(
                f"{'cut off' if len(block) < tarfile.BLOCKSIZE else 'damaged'} at byte {tar.offset:,}"
            )

    def _content(self, tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> Any:
        """Bytes, a Broken, or None for a member that nobody wants."""
        image = is_image(f"x.{extension}")
        if not image and extension not in self.tars.options.keep_columns:
            return None
        limit = MAX_FILE_BYTES if image else _MAX_COMPANION
        if member.size > limit:
            return Broken(f"{extension} has {member.size:,} bytes, expected at most {limit:,}")
        content = tar.extractfile(member).read()
        if len(content) < member.size:
            raise tarfile.ReadError(f"cut off at byte {member.offset_data + len(content):,}")
        return content

    def _images(self, key: str, group: dict[str, Any]) -> list[Any]:
        """What the sample has of them; one Broken where it can't be taken as it is."""
        images = {extension: content for extension, content in group.items() if is_image(f"x.{extension}")}
        for name in self.tars.options.keep_columns if images else ():
            if isinstance(group.get(name), Broken):
                return [group[name]]
            if isinstance(group.get(name), bytes) and _text(group[name]) is None:
                return [Broken(f"its companion {name} is not UTF-8")]
        if len(images) > 1 and not self.tars.options.interleaved:
            return [
                Broken(
                    f"has {len(images)} images ({', '.join(images)}); interleaved (--interleaved) takes several per row"
                )
            ]
        return list(images.values())


def _text(content: bytes | None) -> str | None:
    """None, too, where it is not UTF-8."""
    try:
        return None if content is None else content.decode()
    except UnicodeDecodeError:
        return None
