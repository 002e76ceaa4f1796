"""What the names of files and of archive members say: which sample they belong to, and which ones tools hide."""


def is_hidden(path: str) -> bool:
    """Returns whether a relative path leads to or through a name that tools hide, such as `._x.jpg` or `__MACOSX`."""
    return any(part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in path.split("/"))


def split_key(name: str) -> tuple[str, str]:
    """Splits the name of an archive member as webdataset does: the key ends at the first dot of the last part.

    >>> split_key("a/cat.seg.png")
    ('a/cat', 'seg.png')
    """
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension
