"""Golden codes: what the bundled tokenizer made of the example photograph and of ten generated pictures.

They were made on one machine in float32. `dyntok doctor` compares another machine with them. After new weights,
`dyntok doctor --write-golden dyntok/pretrained/flex/golden.json` writes them again.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dyntok.encoding import Encoding
from dyntok.errors import DataError
from dyntok.loading import BUNDLED, example_image
from dyntok.tokenizer import DynamicVisualTokenizer

GOLDEN = BUNDLED / "golden.json"
_SIDE = 160  # pixels of a generated picture
_PHOTOGRAPH = "photograph"


@dataclass(frozen=True)
class Comparison:
    """One picture: its tokens, how many differ from the golden ones, and the shares of close decisions."""

    name: str
    tokens: int
    differing: int  # tokens that are not golden, or golden ones that are missing, whichever are more
    close_codes: float
    close_choices: float

    @property
    def explained(self) -> bool:
        """Returns whether all differences may come from rounding."""
        return not self.differing or self.close_codes + self.close_choices > 0


def pictures() -> dict[str, np.ndarray]:
    """Returns the photograph and ten pictures made of whole numbers alone, uint8 [H, W, 3]."""
    y, x = np.mgrid[:_SIDE, :_SIDE]
    last = _SIDE - 1
    distance = (2 * x - last) ** 2 + (2 * y - last) ** 2
    noise = _noise(_SIDE * _SIDE * 3).reshape(_SIDE, _SIDE, 3)
    painted = {
        "black": _stack(x * 0, x * 0, x * 0),
        "gray": _stack(x * 0 + 128, x * 0 + 128, x * 0 + 128),
        "ramp": _stack(x * 255 // last, y * 255 // last, (x + y) * 255 // (2 * last)),
        "stripes": _stack(x // 10 % 2 * 255, x // 10 % 2 * 255, x // 10 % 2 * 255),
        "squares": _stack((x // 20 + y // 20) % 2 * 255, x // 20 * 32, y // 20 * 32),
        "rings": _stack(distance // 256 % 256, distance // 128 % 256, distance // 512 % 256),
        "disk": _stack((distance < 8000) * 220, (distance < 8000) * 90, (distance >= 8000) * 200),
        "edge": _stack((3 * x > 2 * y + 20) * 255, (3 * x > 2 * y + 20) * 200, x * 0 + 60),
        "noise": noise,
        "blocks": noise[::16, ::16].repeat(16, 0).repeat(16, 1),
    }
    return {_PHOTOGRAPH: np.asarray(example_image()), **painted}


def write(tokenizer: DynamicVisualTokenizer, path: Path) -> None:
    """Write the golden codes of a tokenizer. Raises `DataError` where the file can't be written."""
    named = pictures()
    encoding = tokenizer.encode(list(named.values()))
    positions = encoding.positions or []
    rows = {
        name: {"codes": codes.tolist(), "positions": places.tolist()}
        for name, codes, places in zip(named, encoding.codes, positions, strict=True)
    }
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    text = f'{{"fingerprint": {json.dumps(tokenizer.fingerprint)}, "pictures": {{\n{lines}\n}}}}\n'
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"can't write {path}: {error.strerror or error}; name a file in a folder of yours") from error


def compare(tokenizer: DynamicVisualTokenizer, path: Path = GOLDEN) -> list[Comparison] | None:
    """Returns how the codes of this machine differ from the golden ones; None if those are of another tokenizer.

    Raises `DataError` where the file can't be read.
    """
    named = pictures()
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        fingerprint, rows = stored["fingerprint"], dict(stored["pictures"])
        golden = {name: set(zip(row["positions"], row["codes"], strict=True)) for name, row in rows.items()}
        images = [named[name] for name in golden]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise DataError(
            f"can't read the golden codes {path} ({reason}); `dyntok doctor --write-golden FILE` writes such a file"
        ) from error
    if fingerprint != tokenizer.fingerprint:
        return None
    encoding = tokenizer.encode(images, margins=True)
    return [_comparison(name, row, golden[name]) for name, row in zip(golden, encoding, strict=True)]


def _comparison(name: str, row: Encoding, golden: set[tuple[int, int]]) -> Comparison:
    assert row.packed_positions is not None and row.margins is not None
    own = set(zip(row.packed_positions.tolist(), row.packed_codes.tolist(), strict=True))
    close_codes, close_choices = row.margins[0].tolist()
    differing = max(len(own - golden), len(golden - own))
    return Comparison(name, len(own), differing, close_codes, close_choices)


def _stack(*channels: np.ndarray) -> np.ndarray:
    return np.stack(channels, -1).astype(np.uint8)


def _noise(count: int) -> np.ndarray:
    """Returns bytes of a linear congruential generator, the same with every version of NumPy."""
    state, values = 1, []
    for _ in range(count):
        state = (state * 1_103_515_245 + 12_345) % 2**31
        values.append(state >> 16 & 255)
    return np.array(values, dtype=np.uint8)
