"""Reads file names: which kind of input they are, and whether members of an archive belong to one sample."""

import posixpath
import re
from pathlib import PurePosixPath

from dyntok.image import IMAGE_SUFFIXES, UNREADABLE_SUFFIXES

_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,9}")
_SUFFIXES = {
    "tar": (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst"),
    "zip": (".zip",),
    "parquet": (".parquet",),
    "list": (".txt",),
}


def is_image(name: str) -> bool:
    """Returns whether the suffix of a file name is that of an image, of a format that can't be read included."""
    suffix = name[name.rfind(".") :].lower() if "." in name else ""
    return suffix in IMAGE_SUFFIXES or suffix in UNREADABLE_SUFFIXES


def kind_of(name: str) -> str | None:
    """Returns the kind of input that a file is by its name: "folder" for an image, else "tar", "zip", ...; or None."""
    found = next((kind for kind, suffixes in _SUFFIXES.items() if name.lower().endswith(suffixes)), None)
    return found or ("folder" if is_image(name) else None)


def suffix_of(name: str) -> str:
    """Returns the suffix in lower case, such as ".txt", or "" where a name has none that looks like one."""
    suffix = PurePosixPath(name).suffix
    return suffix.lower() if _SUFFIX.fullmatch(suffix) else ""


def sample_of(key: str) -> str:
    """Returns what the keys of one sample have in common: members may be named `./0.jpg` and `0.txt`."""
    return posixpath.normpath(key)


def without_surrogates(text: str) -> str:
    """Returns names that are not UTF-8 with escapes instead of surrogates, which no file format accepts."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
