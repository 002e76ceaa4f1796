"""The headers of a tar: the targets of links, and samples whose parts are scattered."""

import posixpath
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from typing import IO

from dyntok.batch.inputs.names import sample_of, without_surrogates
from dyntok.batch.inputs.samples import Broken
from dyntok.names import is_hidden, split_key
from dyntok.tars import follow, is_link, link_target, tar_members


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
        wanted = {follow(name, self._links) for name in self._links.values()}
        if wanted or scattered:
            self._collect(wanted, scattered)

    def target(self, link: tarfile.TarInfo) -> tarfile.TarInfo | Broken:
        """Returns the file that a link leads to, or an error."""
        name = follow(link_target(link), self._links)
        if name is None:
            return Broken(f"link to {link.linkname}: the links lead in a circle")
        if not name:
            return Broken(f"link to {link.linkname}: it leads out of the tar")
        return self._targets.get(name) or Broken(f"link to {link.linkname}: its target is not in the tar")

    def parts(self, key: str) -> list[tarfile.TarInfo]:
        """Returns the members of a key whose members are apart from each other; none for all other keys."""
        return self._scattered.get(sample_of(key), [])

    def _survey(self) -> set[str]:
        """Collects the links, and returns the keys that come back after another key."""
        closed: set[int] = set()
        current, scattered = None, set()
        for member in self._members():
            if is_link(member):
                self._links[posixpath.normpath(member.name)] = link_target(member)
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
