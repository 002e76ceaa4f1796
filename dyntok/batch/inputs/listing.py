"""Lists all files below a folder in a fixed order, with bounded memory for local folders however many files they hold.

Linked folders are followed. Hidden files are left out and counted. Not here: which of the files are images.
"""

import heapq
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dyntok.addresses import version_stamp, wrap_storage_errors
from dyntok.batch.inputs.left_out import HIDDEN, LeftOut
from dyntok.batch.inputs.names import suffix_of
from dyntok.chunks import batched
from dyntok.image import sniff
from dyntok.names import is_hidden

LOOP = "linked folders that lead back to themselves"
_NAMES_IN_MEMORY = 100_000  # names of a folder that are sorted at once
_MAX_LINKS = 8  # linked folders inside linked folders; without a limit, links to each other would multiply
_HEAD = 512  # bytes that show the format of an image
_HEADS_AT_ONCE = 256


class ListedFile(NamedTuple):
    """A file below a folder."""

    key: str  # its path from the folder
    path: str  # on its file system
    info: Mapping[str, Any] | None  # what the file system says about it; None: ask when it is needed


def list_files(fs: fsspec.AbstractFileSystem, root: str, left_out: LeftOut) -> Iterator[ListedFile]:
    """Yields the files below a folder, sorted by name folder by folder; what is left out is added to `left_out`."""
    if isinstance(fs, LocalFileSystem):
        return _list_local(root, "", left_out, (), 0)
    return _list_remote(fs, root, "", left_out)


def find_unnamed_images(
    fs: fsspec.AbstractFileSystem, files: Iterable[ListedFile]
) -> Iterator[tuple[ListedFile, bool]]:
    """Yields every file, and whether it is an image without a suffix.

    Such files are recognized by their first bytes.
    """
    for some in batched(files, _HEADS_AT_ONCE):
        unnamed = [file for file in some if not suffix_of(file.key)]
        heads = _read_heads(fs, [file.path for file in unnamed]) if unnamed else []
        images = {file.path for file, head in zip(unnamed, heads, strict=True) if sniff(head)}
        yield from ((file, file.path in images) for file in some)


def _read_heads(fs: fsspec.AbstractFileSystem, paths: Sequence[str]) -> list[bytes]:
    if isinstance(fs, LocalFileSystem):
        return [_read_local_head(path) for path in paths]
    heads = fs.cat_ranges(paths, [0] * len(paths), [_HEAD] * len(paths), on_error="return")
    return [head if isinstance(head, bytes) else b"" for head in heads]


def _read_local_head(path: str) -> bytes:
    try:
        if not os.path.isfile(path):  # reading a pipe would wait for a writer
            return b""
        with open(path, "rb") as file:
            return file.read(_HEAD)
    except OSError:
        return b""


def _list_remote(fs: fsspec.AbstractFileSystem, folder: str, below: str, left_out: LeftOut) -> Iterator[ListedFile]:
    for info in sorted(fs.ls(folder, detail=True), key=lambda info: info["name"]):
        path = info["name"].rstrip("/")
        key = below + path.rpartition("/")[2]
        if info["type"] == "directory":
            if path != folder.rstrip("/"):
                yield from _list_remote(fs, info["name"], f"{key}/", left_out)
        elif is_hidden(key):
            left_out.add(HIDDEN)
        elif path != folder.rstrip("/"):  # object stores may list a marker for the folder itself
            yield ListedFile(key, info["name"], info)


def _list_local(
    folder: str, below: str, left_out: LeftOut, parents: tuple[tuple[int, int], ...], links: int
) -> Iterator[ListedFile]:
    """Yields the files of a folder and of those below it.

    parents: device and inode of the folders above; links: how many of them are links.
    """
    with wrap_storage_errors("read the folder", folder):
        status = os.stat(folder)
    parents += ((status.st_dev, status.st_ino),)
    with ExitStack() as stack:
        with wrap_storage_errors("read the folder", folder), os.scandir(folder) as entries:
            names = _sort(((entry.name, _is_folder(entry), entry.is_symlink()) for entry in entries), stack)
        for name, is_folder, is_link in names:
            path, key = f"{folder.rstrip('/')}/{name}", below + name
            if is_folder and (_leads_back(path, parents) or links + is_link > _MAX_LINKS):
                left_out.add(LOOP)
            elif is_folder:
                yield from _list_local(path, f"{key}/", left_out, parents, links + is_link)
            elif is_hidden(key):
                left_out.add(HIDDEN)
            else:
                yield ListedFile(key, path, None)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, for example: reading it will give an error with a reason
        return False


def _leads_back(folder: str, parents: Sequence[tuple[int, int]]) -> bool:
    status = os.stat(folder)
    return (status.st_dev, status.st_ino) in parents


def size_and_stamp(file: ListedFile) -> tuple[int, str]:
    """Returns the size of a file, and what changes when it changes."""
    if file.info is not None:
        return file.info["size"] or 0, version_stamp(file.info)
    try:
        status = os.stat(file.path)
    except OSError:  # a link to nowhere, for example: reading it will give an error with a reason
        return 0, ""
    return status.st_size, str(status.st_mtime)


def _sort(entries: Iterable[tuple[str, bool, bool]], stack: ExitStack) -> Iterator[Any]:
    """Sorts the entries of a folder, by way of temporary files where there are many."""
    runs: list[Iterator[Any]] = []
    for unsorted in batched(entries, _NAMES_IN_MEMORY):
        chunk = sorted(unsorted)
        if len(chunk) == _NAMES_IN_MEMORY:
            file = stack.enter_context(tempfile.TemporaryFile("w+", encoding="ascii"))  # noqa: SIM115
            file.writelines(json.dumps(entry) + "\n" for entry in chunk)
            file.seek(0)
            runs.append(tuple(json.loads(line)) for line in file)
        else:
            runs.append(iter(chunk))
    return heapq.merge(*runs)
