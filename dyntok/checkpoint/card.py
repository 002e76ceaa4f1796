"""Model cards: the README.md next to the weights."""

import re
from pathlib import Path

_MAX_BYTES = 1 << 20
_DEFAULT = """---
library_name: dyntok
tags:
- image-tokenizer
---

# A dyntok tokenizer

Turns an image into a short sequence of integers whose length depends on the picture, and back.
`config.json` describes its parts.

```python
import dyntok

tok = dyntok.load("...")  # the name of this repository, or its folder
enc = tok.encode("cat.jpg")
```
"""


def write(folder: Path, card: str | None) -> None:
    """Writes the given card, or a short one where the folder has none."""
    path = folder / "README.md"
    if card is not None or not path.exists():
        path.write_text(_DEFAULT if card is None else card, encoding="utf-8")


def licensed_card(folder: Path) -> str | None:
    """Returns the README.md of a checkpoint if it names another license than Apache-2.0.

    Such a card stays with its weights.
    """
    try:
        with open(folder / "README.md", encoding="utf-8", errors="replace") as file:
            text = file.read(_MAX_BYTES)
    except OSError:
        return None
    found = re.search(r"^license: *(\S+)", text, re.MULTILINE)
    return text if found and found[1] != "apache-2.0" else None
