"""The headers of a tar: the targets of links, and samples whose parts are scattered."""

import posixpath
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from typing import IO

from dyntok.batch.inputs.names import sample_of, without_surrogates
from dyntok.batch.inputs.samples import Broken
from dyntok.names import is_hidden, split_key
from dyntok.tars import is_link, tar_members

_MAX_LINKS = 16  # links to links


class TarIndex:
    """Goes through the headers of a tar once, and a second time if something has to be found.

    Keeps little: a hash of every key, the links, and the members that are wanted.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._links: dict[str, str] = {}  # name -> name, or "" if it leads out of the tar
        self._targets: dict[str, tarfile.TarInfo] = {}
        self._scattered: dict[str, list[tarfile.TarInfo]] = defaultdict(list)
        scattered = self._survey()
        wanted = {self._followed(name) for name in self._links.values()}
        if wanted or scattered:
            self._collect(wanted, scattered)

    def target(self, link: tarfile.TarInfo) -> tarfile.TarInfo | Broken:
        """Returns the file that a link leads to, or an error."""
        name = self._followed(_target_name(link))
        if name is None:
            return Broken(f"is a link to {link.linkname}, and the links lead in a circle")
        if not name:
            return Broken(f"is a link to {link.linkname}, which leads out of the tar")
        return self._targets.get(name) or Broken(f"is a link to {link.linkname}, which is not in the tar")

    def _followed(self, name: str) -> str | None:
        """Returns the name at the end of links to files and folders; None for a circle, "" where they lead out."""
        for _ in range(_MAX_LINKS):
            parts = name.split("/")
            heads = ("/".join(parts[:i]) for i in range(1, len(parts) + 1))
            link = next((head for head in heads if head in self._links), None)
            if link is None:
                return name
            name = self._links[link] and posixpath.normpath(self._links[link] + name.removeprefix(link))
        return None

    def parts(self, key: str) -> list[tarfile.TarInfo]:
        """Returns the members of a key whose members are apart from each other; none for all other keys."""
        return self._scattered.get(sample_of(key), [])

    def _survey(self) -> set[str]:
        """Collects the links, and returns the keys that come back after another key."""
        closed: set[int] = set()
        current, scattered = None, set()
        for member in self._members():
            if is_link(member):
                self._links[posixpath.normpath(member.name)] = _target_name(member)
            key = sample_of(split_key(member.name)[0])
            if key != current:
                closed.add(hash(current))
                if hash(key) in closed:
                    scattered.add(key)
                current = key
        return scattered

    def _collect(self, wanted: set[str], scattered: set[str]) -> None:
        for member in self._members():
            name, key = posixpath.normpath(member.name), sample_of(split_key(member.name)[0])
            if name in wanted and member.isreg():
                self._targets[name] = member
            if key in scattered:
                self._scattered[without_surrogates(key)].append(member)

    def _members(self) -> Iterator[tarfile.TarInfo]:
        """Yields files and links up to the end, or to the first damage."""
        try:
            for _, member in tar_members(self._file, 0):
                if (member.isreg() or is_link(member)) and not is_hidden(member.name):
                    yield member
        except (tarfile.TarError, EOFError):
            return


def _target_name(link: tarfile.TarInfo) -> str:
    """Returns the name that a link leads to. A symbolic link starts at its own folder, a hard link at the top."""
    folder = "" if link.islnk() else posixpath.dirname(link.name)
    name = posixpath.normpath(posixpath.join(folder, link.linkname))
    return "" if name.startswith(("/", "../")) or name == ".." else name
