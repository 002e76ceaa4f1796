"""Texts that come with images: one, or a list of which one is drawn for each epoch."""

import hashlib
import json
from typing import Any

from dyntok.errors import DataError
from dyntok.structure import brief


def parse_texts(words: Any, name: str) -> Any:
    """Returns the list of texts that a JSON companion holds; anything else as it came.

    Raises `DataError` on JSON of another form, which a model should not learn as text.
    """
    words = words.removeprefix("\ufeff") if isinstance(words, str) else words  # a mark that some editors write
    if not isinstance(words, str) or words.lstrip()[:1] not in ("[", "{"):
        return words
    try:
        value = json.loads(words)
    except ValueError:
        return words
    if isinstance(value, list):
        if all(isinstance(one, str) for one in value):
            return value
        if not any(isinstance(one, dict | list | str) for one in value):  # numbers in brackets are text
            return words
    raise DataError(
        f"{name} is JSON, {brief(value)}, expected text or a list of texts; write captions into a column of their own"
    )


def draw_text(words: Any, key: str, draw: str = "0 0") -> Any:
    """Returns one of a list of texts, None of an empty list, and anything else as it came.

    The choice depends on the key and on `draw`, "SEED EPOCH".
    """
    if not isinstance(words, list):
        return words
    return words[int(share(f"{draw} text {key}") * len(words))] if words else None


def share(text: str) -> float:
    """Returns a number from 0 to 1 that belongs to this text."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogateescape")).digest()[:6], "big") / 2**48
