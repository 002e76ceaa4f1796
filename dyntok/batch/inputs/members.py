"""Members of an archive as samples: `KEY.jpg` and `KEY.txt` are an image and an extra column of the sample KEY."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from dyntok.batch.inputs.names import is_image, suffix_of
from dyntok.batch.inputs.samples import Broken
from dyntok.batch.options import BatchOptions
from dyntok.image import MAX_FILE_BYTES

MAX_TEXT_BYTES = 2**24


class Role(Enum):
    """What a member is to its sample."""

    IMAGE = "image"
    COLUMN = "extra column"
    UNNAMED = "unnamed"  # perhaps an image: its content tells
    LEFT_OUT = "left out"


@dataclass
class Group:
    """The members of one sample that lie next to each other."""

    key: str
    images: dict[str, bytes | Broken] = field(default_factory=dict)  # by extension
    columns: dict[str, bytes | Broken] = field(default_factory=dict)  # by extension in lower case
    unused: list[str] = field(default_factory=list)  # names of the other members

    def __bool__(self) -> bool:
        return bool(self.images or self.columns or self.unused)

    def has(self, role: Role, extension: str) -> bool:
        """Returns whether another member of this extension would begin a new sample."""
        return extension in self.images if role is Role.IMAGE else extension.lower() in self.columns

    def add(self, name: str, role: Role, extension: str, content: bytes | Broken | None) -> None:
        if role is Role.IMAGE:
            self.images[extension] = content
        elif role is Role.COLUMN:
            self.columns[extension.lower()] = content
        else:
            self.unused.append(name)


def role_of(name: str, extension: str, keep_columns: Sequence[str]) -> Role:
    """Returns what a member is, by its name."""
    if is_image(f".{extension}"):
        return Role.IMAGE
    if is_column(extension, keep_columns):
        return Role.COLUMN
    return Role.LEFT_OUT if suffix_of(name) else Role.UNNAMED


def is_column(extension: str, keep_columns: Sequence[str]) -> bool:
    """Returns whether an extension names an extra column that is kept, in upper or lower case."""
    return any(extension.lower() == name.lower() for name in keep_columns)


def too_large(extension: str, size: int, role: Role) -> Broken | None:
    """Returns an error where a member is larger than anything that is read."""
    limit = MAX_TEXT_BYTES if role is Role.COLUMN else MAX_FILE_BYTES
    return Broken(f"{extension} has {size:,} bytes, the limit is {limit:,}") if size > limit else None


def images_and_columns(group: Group, options: BatchOptions) -> tuple[list[bytes | Broken], dict[str, str | None]]:
    """Returns the images of a sample and its extra columns; a single Broken where the sample can't be used."""
    columns = {name: _text(name, group.columns.get(name.lower())) for name in options.keep_columns}
    broken = next((value for value in columns.values() if isinstance(value, Broken)), None)
    if broken is None and len(group.images) > 1 and not options.interleaved:
        count, names = len(group.images), ", ".join(group.images)
        broken = Broken(
            f"has {count} images ({names}), expected one, since a key ends at the first dot of a name; "
            "--interleaved reads several per row"
        )
    if broken is not None:
        return [broken], {}
    return list(group.images.values()), {name: text for name, text in columns.items() if not isinstance(text, Broken)}


def _text(name: str, content: bytes | Broken | None) -> str | Broken | None:
    try:
        return content.decode("utf-8-sig") if isinstance(content, bytes) else content
    except UnicodeDecodeError:
        return Broken(f"its {name} is not UTF-8")
