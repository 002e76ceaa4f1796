"""The members of a tar, in turn; a tar that is damaged or cut off says so, where tarfile takes it for the end."""

import tarfile
from collections.abc import Iterator
from typing import IO

_CHUNK = 2**20


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
