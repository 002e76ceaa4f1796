"""What a language model wrote, ids or text, taken apart: text, images, a truncated image at the end, malformed pieces.

Accepts anything: malformed input is returned as labelled segments. The strict way is `VisualVocab.to_encoding`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dyntok.encoding import Encoding
from dyntok.errors import CodeError
from dyntok.ids import END_TOKEN, START_TOKEN, Kind
from dyntok.layout import counts_to_mask, lattice_positions, map_to_counts, num_blocks
from dyntok.structure import require_type
from dyntok.validation import integers
from dyntok.vocab import VisualVocab

_TOKEN = re.compile(rf"{re.escape(START_TOKEN)}|{re.escape(END_TOKEN)}|<\|([vpmrc]):([0-9]{{1,10}})\|>")


class _Lexeme(NamedTuple):
    kind: Kind | Literal["space"]
    value: int
    start: int
    stop: int


@dataclass(frozen=True)
class Segment:
    """A piece of what was parsed, from `start` to `stop`. All segments together are the whole of it, in order.

    kind       "text"
               "image": start, codes and end
               "truncated": an image without an end at the end of the input
               "malformed": codes or markers outside an image, an image interrupted by text, or one without codes
    codes      codebook indices, empty for text
    positions  the patch of each code; None where the layout has none, or where the image does not keep to its layout
    grid       rows and columns of the image, None where neither the vocabulary nor the image says them
    fingerprint  the vocabulary's: of the tokenizer that decodes the image
    """

    kind: Literal["text", "image", "truncated", "malformed"]
    start: int
    stop: int
    codes: tuple[int, ...] = ()
    positions: tuple[int, ...] | None = None
    grid: tuple[int, int] | None = None
    fingerprint: str | None = None

    @property
    def encoding(self) -> Encoding:
        """Returns the image for `tok.decode`.

        Raises `CodeError` if it has no codes, more codes than patches, or no known grid.
        """
        if self.grid is None:
            raise CodeError("the grid of this image is not known; VisualVocab.of(tok, ...) knows it")
        positions = None if self.positions is None else [self.positions]
        return Encoding.pack([self.codes], positions, self.grid, self.fingerprint)


def parse_ids(ids: Tensor | Sequence[int], vocab: VisualVocab) -> list[Segment]:
    """Returns the segments of any ids. Negative and unknown ids count as text.

    Raises `CodeError` only if these are no integers.
    """
    require_type("vocab", vocab, VisualVocab, "a VisualVocab")
    ranges, low, high = vocab.ranges, vocab.offset, vocab.ranges[-1].stop

    def lexemes() -> Iterator[_Lexeme]:
        for i, id in enumerate(integers(ids, "ids").tolist()):
            kind: Kind = "text"
            if low <= id < high:
                part = next(part for part in ranges if id < part.stop)
                yield _Lexeme(part.kind, id - part.offset + part.first, i, i + 1)
                continue
            if id in (vocab.image_start, vocab.image_end):
                kind = "start" if id == vocab.image_start else "end"
            yield _Lexeme(kind, 0, i, i + 1)

    return _segments(lexemes(), vocab)


def parse_text(text: str, vocab: VisualVocab) -> list[Segment]:
    """Returns the segments of any text.

    White space between the tokens of an image, which some tokenizers add, belongs to the image. Numbers may have fewer
    or more digits than usual; a number too large for the vocabulary is text.
    """
    require_type("text", text, str, "a text; parse_ids takes ids")
    require_type("vocab", vocab, VisualVocab, "a VisualVocab")
    ranges = {part.letter: part for part in vocab.ranges}

    def lexemes() -> Iterator[_Lexeme]:
        done = 0
        for match in _TOKEN.finditer(text):
            letter, digits = match.groups()
            number = int(digits or 0)
            kind: Any = "start" if match[0] == START_TOKEN else "end"
            if letter is not None:
                part = ranges.get(letter)
                if part is None or not part.first <= number < part.first + part.size:
                    continue
                kind = part.kind
            if done < match.start():
                yield _text(text, done, match.start())
            yield _Lexeme(kind, number, match.start(), match.end())
            done = match.end()
        if done < len(text):
            yield _text(text, done, len(text))

    return _segments(lexemes(), vocab)


def _text(text: str, start: int, stop: int) -> _Lexeme:
    return _Lexeme("space" if text[start:stop].isspace() else "text", 0, start, stop)


def _segments(lexemes: Iterable[_Lexeme], vocab: VisualVocab) -> list[Segment]:
    pieces: list[tuple[str, list[_Lexeme]]] = []
    image: list[_Lexeme] | None = None  # that is open, start included
    for lexeme in lexemes:
        kind = lexeme.kind
        if kind == "start" or (kind == "text" and image is not None):
            if image is not None:
                _add(pieces, "malformed", image)
            image = None
        if kind == "start":
            image = [lexeme]
        elif image is not None:
            image.append(lexeme)
            if kind == "end":
                _add(pieces, "image" if any(part.kind == "code" for part in image) else "malformed", image)
                image = None
        else:
            _add(pieces, "text" if kind in ("text", "space") else "malformed", [lexeme])
    if image is not None:
        _add(pieces, "truncated", image)
    return [_segment(kind, piece, vocab) for kind, piece in pieces]


def _add(pieces: list[tuple[str, list[_Lexeme]]], kind: str, lexemes: list[_Lexeme]) -> None:
    if pieces and pieces[-1][0] == kind != "image":
        pieces[-1][1].extend(lexemes)
    else:
        pieces.append((kind, lexemes))


def _segment(kind: Any, lexemes: list[_Lexeme], vocab: VisualVocab) -> Segment:
    start, stop = lexemes[0].start, lexemes[-1].stop
    codes = tuple(lexeme.value for lexeme in lexemes if lexeme.kind == "code")
    if kind not in ("image", "truncated"):
        return Segment(kind, start, stop, codes)
    tokens: list[tuple[str, int]] = [
        (part.kind, part.value) for part in lexemes if part.kind not in ("start", "end", "space")
    ]
    grid = vocab.grid
    if vocab.sides:
        grid = (tokens[0][1], tokens[1][1]) if [k for k, _ in tokens[:2]] == ["rows", "columns"] else None
        tokens = tokens[2:]
        if grid is None:
            return Segment(kind, start, stop, codes, fingerprint=vocab.fingerprint)
    positions = _positions(tokens, grid, vocab, kind == "truncated") if codes else None
    return Segment(kind, start, stop, codes, positions, grid, vocab.fingerprint)


def _positions(
    tokens: list[tuple[str, int]], grid: tuple[int, int] | None, vocab: VisualVocab, truncated: bool
) -> tuple[int, ...] | None:
    """Returns the patch of each code, where these tokens (start, sides and end left out) keep to the layout."""
    kinds, values = [kind for kind, _ in tokens], [value for _, value in tokens]
    if vocab.layout == "positions":
        if truncated and kinds[-1] == "position":
            kinds, values = kinds[:-1], values[:-1]
        positions = tuple(values[::2])
        rising = all(a < b for a, b in zip(positions, positions[1:], strict=False))
        fits = grid is None or positions[-1] < grid[0] * grid[1]
        return positions if kinds == ["position", "code"] * len(positions) and rising and fits else None
    if vocab.layout == "lattice":
        fits = not truncated and kinds == ["code"] * len(kinds) and len(kinds) <= grid[0] * grid[1]
        return tuple(lattice_positions(len(kinds), grid).tolist()) if fits else None
    if vocab.layout == "map":
        blocks = num_blocks(grid)
        codes = len(kinds) - blocks
        if kinds != ["map"] * blocks + ["code"] * codes:
            return None
        try:
            counts = map_to_counts(torch.tensor(values[:blocks]), grid)
        except CodeError:
            return None
        positions = tuple(counts_to_mask(counts, grid).nonzero()[:, 0].tolist())
        return positions[:codes] if codes == len(positions) or truncated and codes < len(positions) else None
    return None
