"""`Original`: the picture that codes were made of, its size and the part of it that they show.

Not here: how a picture is fitted to its grid (`fitting.py`), and pixels (`image.py`).
"""

from dataclasses import dataclass
from typing import Any, Literal

from dyntok.errors import CodeError
from dyntok.structure import brief

LONGEST_SIDE = 2**20  # pixels, as `image.py` reads them
_KEYS = ("size", "crop_box", "fit")
_FITS = ("keep", "crop", "squash", "pad")


@dataclass(frozen=True)
class Original:
    """One picture as it was before it was fitted to its grid.

    size: (height, width) in pixels, upright.
    crop_box: the part that was used: left, top, right, bottom in its pixels.
    fit: how it met its grid; None where that was as the tokenizer's configuration says.

    Raises `CodeError` on values that no picture has.
    """

    size: tuple[int, int]
    crop_box: tuple[int, int, int, int]
    fit: Literal["keep", "crop", "squash", "pad"] | None = None

    def __post_init__(self) -> None:
        for name, count in (("size", 2), ("crop_box", 4)):
            values = getattr(self, name)
            if not (isinstance(values, tuple | list) and len(values) == count and all(type(v) is int for v in values)):
                raise CodeError(f"{name} of an original is {brief(values)}, expected {count} whole numbers")
            object.__setattr__(self, name, tuple(values))
        if not all(1 <= side <= LONGEST_SIDE for side in self.size):
            raise CodeError(f"size of an original is {self.size}, expected (height, width) of 1 to {LONGEST_SIDE:,}")
        (height, width), (left, top, right, bottom) = self.size, self.crop_box
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise CodeError(
                f"crop_box of an original is {self.crop_box}, expected left, top, right and bottom "
                f"inside {width} x {height} pixels"
            )
        if self.fit not in (None, *_FITS):
            raise CodeError(f"fit of an original is {brief(self.fit)}, expected one of {', '.join(_FITS)}, or None")

    def to_dict(self) -> dict[str, Any]:
        """Returns lists, ints and strings only, ready for JSON."""
        return {"size": list(self.size), "crop_box": list(self.crop_box), "fit": self.fit}

    @classmethod
    def from_dict(cls, values: Any) -> "Original":
        """Build an Original from untrusted JSON; a mismatch raises `CodeError`."""
        if not isinstance(values, dict) or not {"size", "crop_box"} <= set(values) <= set(_KEYS):
            raise CodeError(f"an original is {brief(values)}, expected a mapping with {', '.join(_KEYS)}")
        return cls(values["size"], values["crop_box"], values.get("fit"))
