"""The members of a tar, in turn, and where its links lead.

A tar that is damaged or cut off says so, where tarfile takes it for the end.
"""

import posixpath
import tarfile
from collections.abc import Iterator, Mapping
from typing import IO

_CHUNK = 2**20
_MAX_LINKS = 16  # links to links


def tar_members(file: IO[bytes], start: int) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yields every member from an offset on, with the tar that reads it. Concatenated tars count as one.

    Raises `tarfile.TarError` where the file is damaged or cut off.
    """
    offset: int | None = start
    while offset is not None:
        file.seek(offset)
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # otherwise it keeps all of them
            yield tar, member
        offset = _next_tar(file, tar.offset)


def _next_tar(file: IO[bytes], end: int) -> int | None:
    """Returns where another tar begins after the end of one.

    `tar.next` takes a damaged header and a cut for the end.
    """
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"cut off at byte {end:,}")
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"damaged at byte {end:,}")
    offset = end + tarfile.BLOCKSIZE
    while chunk := file.read(_CHUNK):
        if rest := chunk.lstrip(b"\0"):
            zeros = len(chunk) - len(rest)
            return offset + zeros - zeros % tarfile.BLOCKSIZE
        offset += len(chunk)
    return None


def is_link(member: tarfile.TarInfo) -> bool:
    return member.islnk() or member.issym()


def link_target(link: tarfile.TarInfo) -> str:
    """Returns the name that a link leads to, or "" if it leads out of the tar.

    A symbolic link starts at its own folder, a hard link at the top.
    """
    folder = "" if link.islnk() else posixpath.dirname(link.name)
    name = posixpath.normpath(posixpath.join(folder, link.linkname))
    return "" if name.startswith(("/", "../")) or name == ".." else name


def follow(name: str, links: Mapping[str, str]) -> str | None:
    """Returns the name at the end of links to files and folders; None for a circle, "" where they lead out.

    links: the `link_target` of each link of the tar, by its normalized name.
    """
    for _ in range(_MAX_LINKS):
        parts = name.split("/")
        heads = ("/".join(parts[:i]) for i in range(1, len(parts) + 1))
        link = next((head for head in heads if head in links), None)
        if link is None:
            return name
        name = links[link] and posixpath.normpath(links[link] + name.removeprefix(link))
    return None
