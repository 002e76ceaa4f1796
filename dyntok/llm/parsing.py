"""What a language model wrote, ids or text, taken apart: text, images, an image cut off at the end, stray codes.

Nothing that comes in is an error here; what does not make a picture is told as what it is. The strict way is `VisualVocab.to_codes`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from dyntok.validation import integers
from dyntok.vocab import END_TOKEN, START_TOKEN, VisualVocab

_TOKEN = re.compile(rf"{re.escape(START_TOKEN)}|{re.escape(END_TOKEN)}|<\|([vp]):([0-9]{{1,10}})\|>")
_Lexeme: TypeAlias = tuple[str, int, int, int]  # kind, value, and where it begins and ends


@dataclass(frozen=True)
class Segment:
    """A piece of what was parsed, from `start` to `stop`; all segments together are the whole of it, in order.

    kind       "text"; "image", complete; "cut", an image that the end of the input cut off; "stray", codes, positions or markers
               that make no image: outside of one, or of one broken off by text or by the next
    codes      codebook indices, empty for text
    positions  the patch of each code, where they are written, whole and rising; otherwise None
    """

    kind: Literal["text", "image", "cut", "stray"]
    start: int
    stop: int
    codes: tuple[int, ...] = ()
    positions: tuple[int, ...] | None = None


def parse_ids(ids: Tensor | Sequence[int], vocab: VisualVocab) -> list[Segment]:
    """Segments of any ids, negative and unknown ones included (they count as text). Raises `CodeError` only on what are no integers."""
    kinds = {vocab.image_start: "start", vocab.image_end: "end"}
    positions = vocab.position_offset

    def lexemes() -> Iterator[_Lexeme]:
        for i, id in enumerate(integers(ids, "ids").tolist()):
            if id in kinds:
                yield kinds[id], 0, i, i + 1
            elif vocab.offset <= id < positions:
                yield "code", id - vocab.offset, i, i + 1
            elif positions <= id < positions + vocab.patches:
                yield "position", id - positions, i, i + 1
            else:
                yield "text", 0, i, i + 1

    return _segments(lexemes())


def parse_text(text: str, vocab: VisualVocab) -> list[Segment]:
    """Segments of any text. White space between the tokens of an image, which some tokenizers put there, belongs to the image.

    Numbers may have fewer or more digits than they should; a number too large for the vocabulary is text.
    """

    def lexemes() -> Iterator[_Lexeme]:
        done = 0
        for match in _TOKEN.finditer(text):
            letter, digits = match.groups()
            number = int(digits or 0)
            if letter is None:
                kind = "start" if match[0] == START_TOKEN else "end"
            elif number < (vocab.size if letter == "v" else vocab.patches):
                kind = "code" if letter == "v" else "position"
            else:
                continue
            if done < match.start():
                yield _text(text, done, match.start())
            yield kind, number, match.start(), match.end()
            done = match.end()
        if done < len(text):
            yield _text(text, done, len(text))

    return _segments(lexemes())


def _text(text: str, start: int, stop: int) -> _Lexeme:
    return "space" if text[start:stop].isspace() else "text", 0, start, stop


def _segments(lexemes: Iterable[_Lexeme]) -> list[Segment]:
    pieces: list[tuple[str, list[_Lexeme]]] = []
    image: list[_Lexeme] | None = None  # that is open, start included
    for lexeme in lexemes:
        kind = lexeme[0]
        if kind == "start" or (kind == "text" and image is not None):
            if image is not None:
                _add(pieces, "stray", image)
            image = None
        if kind == "start":
            image = [lexeme]
        elif image is not None:
            image.append(lexeme)
            if kind == "end":
                _add(pieces, "image" if any(k == "code" for k, *_ in image) else "stray", image)
                image = None
        else:
            _add(pieces, "text" if kind in ("text", "space") else "stray", [lexeme])
    if image is not None:
        _add(pieces, "cut", image)
    return [_segment(kind, piece) for kind, piece in pieces]


def _add(pieces: list[tuple[str, list[_Lexeme]]], kind: str, lexemes: list[_Lexeme]) -> None:
    if pieces and pieces[-1][0] == kind != "image":
        pieces[-1][1].extend(lexemes)
    else:
        pieces.append((kind, lexemes))


def _segment(kind: str, lexemes: list[_Lexeme]) -> Segment:
    codes = tuple(value for k, value, *_ in lexemes if k == "code")
    positions = tuple(value for k, value, *_ in lexemes if k == "position")
    order = [k for k, *_ in lexemes if k in ("code", "position")]
    if kind == "cut" and order[-1:] == ["position"]:
        order, positions = order[:-1], positions[:-1]
    whole = (
        bool(codes)
        and order == ["position", "code"] * len(codes)
        and all(a < b for a, b in zip(positions, positions[1:], strict=False))
    )
    return Segment(
        kind, lexemes[0][2], lexemes[-1][3], codes, positions if whole and kind in ("image", "cut") else None
    )
