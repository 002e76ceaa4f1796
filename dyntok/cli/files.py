"""Files that the commands on images read and write, stdin and stdout included."""

import glob
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyntok.errors import CodeError, ConfigError

if TYPE_CHECKING:
    from PIL import Image

    from dyntok.encoding import Encoding


def image_sources(arguments: Sequence[str]) -> list[str | bytes]:
    """Returns the images to encode. Folders, patterns and addresses are refused with the command to use instead."""
    for name in arguments:
        if os.path.isdir(name):
            example = shlex.quote(name.rstrip("/"))
            raise ConfigError(
                f"{name} is a folder, expected image files; name its files ({example}/*.jpg), "
                f"or encode all of it with: dyntok batch {example} OUTPUT"
            )
        if os.path.exists(name) or name == "-":
            continue
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name):
            raise ConfigError(
                f"{name} is an address, expected image files; download it first: curl -O {shlex.quote(name)}"
            )
        if glob.has_magic(name):
            raise ConfigError(f"{name} matches no file, expected image files; check the pattern and the folder")
    return [sys.stdin.buffer.read() if name == "-" else name for name in arguments]


def read_codes(source: str) -> "Encoding | list":
    """Read what `encode` wrote, or codes alone: a list of lists, or the list of a single image."""
    from dyntok.encoding import Encoding

    try:
        raw = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        values = json.loads(raw)  # bytes: UTF-16 and byte order marks, which some shells write, are recognized
    except (OSError, ValueError, RecursionError) as error:
        expected = "expected JSON as `dyntok encode -o` writes it"
        raise CodeError(f"can't read codes from {source}: {error}; {expected}") from error
    if isinstance(values, dict):
        return Encoding.from_dict({name: value for name, value in values.items() if name not in ("sources", "picture")})
    if not isinstance(values, list):
        expected = "expected what `dyntok encode -o` writes or a list of lists of codes"
        raise CodeError(f"{source} holds {type(values).__name__}, {expected}")
    return values if not values or isinstance(values[0], list) else [values]


def save_picture(picture: "Image.Image", output: str) -> None:
    """Write a picture to a file, or as PNG to stdout if the output is "-"."""
    if output == "-":
        picture.save(sys.stdout.buffer, "PNG")
        return
    if (suffix := Path(output).suffix) and suffix.lower() not in writable_suffixes():
        raise ConfigError(f"can't write {output}: pictures are not written as {suffix}; name a .png")
    guard_write(lambda: picture.save(output), output)


def writable_suffixes() -> set[str]:
    """Returns the suffixes of the formats that Pillow writes, such as ".png"."""
    from PIL import Image

    return {suffix for suffix, format in Image.registered_extensions().items() if format in Image.SAVE}


def guard_write(write: Callable[[], Any], output: object) -> None:
    """Run `write`, and turn an error of the system about the user's path into a `ConfigError`."""
    try:
        write()
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't write {output}: {error}") from error
