"""Finds the images of folders and webdataset tars, for training and evaluation, and reports what it left out.

Not here: reading pixels (`dyntok/image.py`) and drawing batches (`data.py`).
"""

import hashlib
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

from dyntok.addresses import is_remote, locate, wrap_storage_errors
from dyntok.errors import DataError
from dyntok.image import IMAGE_SUFFIXES
from dyntok.names import is_hidden, split_key
from dyntok.tars import follow, is_link, link_target, tar_members

Item = TypeVar("Item")
Split = Literal["all", "train", "validation"]

HOLDOUT = 20  # one in this number of images is for validation
_LABELS = ("cls", "cls.txt")
_MAX_LABEL = 1024  # bytes
REPEATED = "further images of a key that has one"


@dataclass(frozen=True)
class ImageSample:
    """Where one image is stored: a file, or a range of bytes in a tar."""

    key: str
    path: str
    offset: int = 0
    size: int | None = None
    label: str | None = None

    def read(self) -> bytes:
        if is_remote(self.path):
            fs, path = locate(self.path, {})
            with wrap_storage_errors("read", self.path):
                return fs.cat_file(path, self.offset, None if self.size is None else self.offset + self.size)
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read() if self.size is None else file.read(self.size)

    @property
    def read_with(self) -> object:
        """Returns what is read at once with the image: the image itself, or all images of a row group."""
        return self

    def alone(self) -> "ImageSample":
        """Returns the sample in a form that keeps nothing else in memory."""
        return self


@dataclass
class Inventory:
    """The images of some sources, and what else was there.

    problems: one text per source that could not be read, or not to its end.
    left_out: how many files are no images, by suffix; hidden files count as "hidden".
    """

    samples: list[ImageSample] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def leave_out(self, name: str) -> None:
        """Counts a file that is not used."""
        self.left_out["hidden" if is_hidden(name) else PurePosixPath(name).suffix.lower() or "without suffix"] += 1

    def report(self) -> list[str]:
        """Returns the lines that tell a person what was left out; none if nothing was."""
        lines = [f"left out: {problem}" for problem in self.problems]
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.left_out.most_common())
        return [*lines, f"left out: {kinds}"] if kinds else lines


def take_inventory(sources: Sequence[str | Path], split: Split = "all") -> Inventory:
    """Finds all images in folders (the parent folder's name is the label) and in tars (`KEY.cls` is the label).

    A folder may hold tars, and links to other folders. A damaged tar contributes the images before the damage.

    split: the validation part is one image in 20, chosen by a hash of its key.

    Raises `DataError` if a source does not exist, or if no image is found.
    """
    inventory = Inventory()
    for source in map(Path, sources):
        before = len(inventory.samples) + len(inventory.problems)
        _add_source(source, inventory)
        if len(inventory.samples) + len(inventory.problems) == before:
            inventory.problems.append(f"{source} holds no images")
    if split != "all":
        wanted = split == "validation"
        inventory.samples = [sample for sample in inventory.samples if is_validation(sample.key) == wanted]
    if not inventory.samples:
        names, reason = ", ".join(map(str, sources)), f" ({inventory.problems[0]})" if inventory.problems else ""
        raise DataError(
            f"no images of the split {split!r} in {names}{reason}; expected folders of images or webdataset tars"
        )
    return inventory


def find_samples(sources: Sequence[str | Path], split: Split = "all") -> list[ImageSample]:
    """Returns the images of `take_inventory` alone. Raises `DataError` as it does."""
    return take_inventory(sources, split).samples


def spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """Returns at most `limit` items, such as samples, spread evenly over those given; None: all."""
    count = min(limit or len(items), len(items))
    return [items[i * len(items) // count] for i in range(count)]


def is_validation(key: str) -> bool:
    """Returns whether an image belongs to the validation part. The same key always gets the same answer."""
    return int(_hash(key.encode(errors="surrogateescape")), 16) % HOLDOUT == 0


def digest_of(keys: Sequence[str]) -> str:
    """Returns 16 hexadecimal digits over all keys in their order, which identify the images of a run."""
    return _hash(b"\0".join(key.encode(errors="surrogateescape") for key in keys))[:16]


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _add_source(source: Path, inventory: Inventory) -> None:
    if source.is_dir():
        for path in sorted(files_below(source, inventory)):
            _add_file(path, source, inventory)
    elif not source.is_file():
        raise DataError(f"{source} does not exist; expected a folder of images, an image, or a webdataset tar")
    elif not _is_wanted(source):
        raise DataError(f"{source} is neither an image nor an uncompressed tar; expected a folder of images or a .tar")
    else:
        _add_file(source, source.parent, inventory)


def files_below(root: Path, inventory: Inventory) -> Iterator[Path]:
    """Yields all files below a folder, links followed, each real folder once."""
    visited = set()

    def unreadable(error: OSError) -> None:
        inventory.problems.append(f"{error.filename} can't be read: {error.strerror or error}")

    for folder, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        identity = os.path.realpath(folder)
        if identity in visited:  # a link that leads back
            folders.clear()
            continue
        visited.add(identity)
        folders.sort(
            key=lambda name: (os.path.islink(os.path.join(folder, name)), name)
        )  # a real folder before links to it
        for hidden in [name for name in folders if is_hidden(name)]:
            folders.remove(hidden)
            inventory.leave_out(hidden)
        yield from (Path(folder, name) for name in names)


def _is_wanted(path: Path) -> bool:
    return path.suffix.lower() == ".tar" or path.suffix.lower() in IMAGE_SUFFIXES


def _add_file(path: Path, root: Path, inventory: Inventory) -> None:
    if is_hidden(path.name) or not _is_wanted(path):
        inventory.leave_out(path.name)
    elif not path.is_file():
        inventory.problems.append(f"{path} is a broken link or no ordinary file")
    elif path.suffix.lower() == ".tar":
        _add_tar(path, inventory)
    else:
        label = path.parent.name if path.parent != root else None
        key = path.relative_to(root).with_suffix("").as_posix()
        inventory.samples.append(ImageSample(key, str(path), label=label))


def _add_tar(path: Path, inventory: Inventory) -> None:
    images: dict[str, list[tarfile.TarInfo]] = {}
    labels: dict[str, str] = {}
    members: dict[str, tarfile.TarInfo] = {}
    links: dict[str, str] = {}
    try:
        with open(path, "rb") as file:
            for tar, member in tar_members(file, 0):
                name = posixpath.normpath(member.name)
                members[name] = member
                if is_link(member):
                    links[name] = link_target(member)
                key, extension = split_key(member.name)
                suffix = suffix_of_member(extension)
                if member.isdir():
                    continue
                if is_hidden(member.name):
                    inventory.leave_out(member.name)
                elif suffix in IMAGE_SUFFIXES:
                    images.setdefault(key, []).append(member)
                elif extension in _LABELS and member.isreg() and member.size < _MAX_LABEL:
                    labels[key] = tar.extractfile(member).read().decode(errors="replace").strip()
                else:
                    inventory.leave_out(member.name)
    except (tarfile.TarError, OSError, EOFError) as error:
        whole = f"{path} can't be read" if not images else f"the rest of {path}, after {len(images):,} images"
        inventory.problems.append(f"{whole}: {error}; expected an intact, uncompressed webdataset tar")
    for key, several in images.items():
        member = image_of_key(several)
        inventory.left_out += Counter({REPEATED: len(several) - 1})
        target = members.get(follow(link_target(member), links) or "") if is_link(member) else member
        if target is None or not target.isreg() or target.issparse():
            inventory.problems.append(f"{member.name} in {path} is a link to nothing or no ordinary file")
        else:
            inventory.samples.append(ImageSample(key, str(path), target.offset_data, target.size, labels.get(key)))


def suffix_of_member(extension: str) -> str:
    """Returns the suffix in lower case, such as ".png" of the extension "seg.png"; "" where there is none."""
    return f".{extension.rpartition('.')[2].lower()}" if extension else ""


def image_of_key(images: Sequence[tarfile.TarInfo]) -> tarfile.TarInfo:
    """Returns the image of a key that has several: `KEY.jpg` rather than `KEY.seg.png`, else the first."""
    return min(images, key=lambda member: "." in split_key(member.name)[1])
