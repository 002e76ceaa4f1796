"""`VisualVocab`: images as ids and text of a language model, and back.

Strict: ids that do not make an image raise an error. `dyntok/llm/parsing.py` accepts anything that a model wrote.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, overload

import torch
from torch import Tensor

from dyntok.encoding import Encoding
from dyntok.errors import CodeError, FingerprintError
from dyntok.ids import END_TOKEN as END_TOKEN
from dyntok.ids import START_TOKEN as START_TOKEN
from dyntok.ids import IdRange, IdRanges, Layout
from dyntok.layout import (
    MAX_SIDE,
    counts_to_map,
    counts_to_mask,
    lattice_positions,
    map_to_counts,
    mask_to_counts,
    num_blocks,
)
from dyntok.structure import brief, pair_of, require_path
from dyntok.validation import counted, integer_rows, integers, refuse

if TYPE_CHECKING:
    from dyntok.tokenizer import DynamicVisualTokenizer

VOCAB_FILE = "dyntok.json"
LAVIT_IMAGE_START, LAVIT_IMAGE_END, LAVIT_OFFSET = 32000, 32001, 32002  # ids in LaVIT's LLM: code k is LAVIT_OFFSET + k
LAVIT_CODES = 16384
_LAYOUT_OF_PLACES: dict[str, Layout] = {"map": "map", "lattice": "lattice", "free": "positions"}
_Integers = Tensor | Sequence[int]
_Grid = tuple[int, int]


class _Image(NamedTuple):
    codes: Tensor
    positions: Tensor | None
    grid: _Grid | None


@dataclass(frozen=True)
class VisualVocab(IdRanges):
    """The ids of images in a language model's vocabulary.

    Code k has id offset + k. An image stands between image_start and image_end. The layout says how an image carries
    the positions of its codes:

    map        first a map token for each block of 4 x 4 patches, with the counts of its four cells (`layout.py`)
    positions  before each code a position token
    lattice    the codes alone; their number gives all places
    none       the codes alone; places are unknown (LaVIT)

    Codes are in raster order in every layout. With `sides`, every image begins with a token for its rows and one for
    its columns. `VisualVocab.of(tok, after=len(tokenizer))` chooses the layout that fits a tokenizer.

    >>> VisualVocab.lavit().to_ids([0, 16383])
    tensor([32000, 32002, 48385, 32001])
    >>> VisualVocab.lavit().to_text([0, 16383])
    '<|image|><|v:00000|><|v:16383|><|/image|>'
    """

    @classmethod
    def of(
        cls, tok: "DynamicVisualTokenizer", after: int, *, layout: Layout | None = None, any_grid: bool | None = None
    ) -> "VisualVocab":
        """Returns the vocabulary of a tokenizer, appended to the `after` entries of a language model's vocabulary.

        In this order: image start, image end, codes, 128 rows and 128 columns (with `any_grid`), map tokens or position
        tokens.

        layout: by default what the tokenizer needs: "map" or "lattice" where it keeps only such patches, "none" where
            its decoder knows no places (LaVIT), otherwise "positions"
        any_grid: images say their grid, of 1 to 128 rows and columns; otherwise all images have the tokenizer's grid.
            By default as the tokenizer does.

        >>> vocab = dyntok.VisualVocab.of(tok, after=len(tokenizer))
        >>> vocab.to_encoding(vocab.to_ids(tok.encode(photos)))
        """
        if not hasattr(tok, "fingerprint") or not hasattr(tok, "config"):
            raise CodeError(f"a vocabulary is made for a tokenizer, as dyntok.load() returns one, got {brief(tok)}")
        if layout is None:
            places = _LAYOUT_OF_PLACES[getattr(tok.config.selector, "places", "free")]
            decoder = tok.config.decoder
            layout = places if decoder is None or decoder.placement == "grid" else "none"
        if any_grid is None:
            any_grid = getattr(tok, "any_grid", False)
        grid, sides = (None, MAX_SIDE) if any_grid else (tok.grid, 0)
        patches = (MAX_SIDE**2 if grid is None else grid[0] * grid[1]) if layout == "positions" else 0
        return cls.after(
            after, tok.config.codebook.size, patches, layout=layout, grid=grid, sides=sides, fingerprint=tok.fingerprint
        )

    @classmethod
    def after(
        cls,
        vocab_size: int,
        size: int,
        patches: int = 0,
        *,
        layout: Layout | None = None,
        grid: _Grid | None = None,
        sides: int = 0,
        fingerprint: str | None = None,
    ) -> "VisualVocab":
        """Returns a vocabulary appended to `vocab_size` entries.

        The order is LaVIT's: start, end, `size` codes; then rows, columns, and map tokens or positions.
        """
        if type(vocab_size) is not int or vocab_size < 0:
            raise CodeError(f"vocab_size is {vocab_size!r}, expected an integer of 0 or more")
        return cls(size, vocab_size + 2, vocab_size, vocab_size + 1, patches, layout, grid, sides, fingerprint)

    @classmethod
    def lavit(cls) -> "VisualVocab":
        """Returns LaVIT's vocabulary after LLaMA's 32,000 entries: start 32000, end 32001, code k = 32002 + k, K =
        16,384.
        """
        return cls(LAVIT_CODES, LAVIT_OFFSET, LAVIT_IMAGE_START, LAVIT_IMAGE_END)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "VisualVocab":
        """Returns the vocabulary that `save_pretrained` wrote into a model's folder (`dyntok.json`). Raises
        `CodeError`.
        """
        require_path("folder", folder)
        path = Path(os.path.expanduser(folder)) / VOCAB_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CodeError(
                f"{path} does not exist; vocab.save_pretrained(folder) writes it beside the model"
            ) from error
        except (OSError, ValueError) as error:
            raise CodeError(f"can't read {path}: {error}") from error
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or not {"size", "offset", "image_start", "image_end"} <= set(values) <= known:
            got = brief(sorted(values)) if isinstance(values, dict) else type(values).__name__
            raise CodeError(f"{path} holds {got}, expected a mapping with some of {', '.join(sorted(known))}")
        return cls(**values)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `dyntok.json`, with ids, layout and fingerprint, into the folder of a language model or its
        tokenizer. Raises `CodeError` where that is not possible.
        """
        require_path("folder", folder)
        path = Path(os.path.expanduser(folder)) / VOCAB_FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise CodeError(f"can't write {path}: {error}; give a folder") from error

    @overload
    def to_ids(self, codes: Encoding, wrap: bool = True) -> list[Tensor]: ...

    @overload
    def to_ids(
        self,
        codes: _Integers,
        wrap: bool = True,
        *,
        positions: _Integers | None = None,
        grid: _Grid | None = None,
    ) -> Tensor: ...

    def to_ids(
        self,
        codes: _Integers | Encoding,
        wrap: bool = True,
        *,
        positions: _Integers | None = None,
        grid: _Grid | None = None,
    ) -> Tensor | list[Tensor]:
        """Returns the ids of one image's codes, int64 [L], between start and end (without them where `wrap` is False).

        An `Encoding` gives a list of such tensors, one for each image.

        positions: [T] in raster order; needed by the layouts "map" and "positions"
        grid: (rows, columns) of the image, where the vocabulary does not fix it

        Raises `CodeError` on codes out of range, on no codes, and on positions that are missing or do not fit the
        layout; `FingerprintError` where the Encoding is another tokenizer's.
        """
        if isinstance(codes, Encoding):
            _require_none(positions, grid)
            return [self.to_ids(row, wrap, positions=places, grid=grid) for row, places, grid in self._images(codes)]
        row = integers(codes, "codes")
        if not len(row):
            raise CodeError("no codes; an image has at least one")
        refuse(
            (row < 0) | (row >= self.size),
            lambda i: f"code {row[i]} at place {i} is out of range, expected 0 to {self.size - 1}",
        )
        ids = row + self.offset
        places = None if positions is None else integers(positions, "positions").to(row.device)
        grid = self._known_grid(grid)
        if places is not None:
            self._check_positions(places, len(row), grid)
        head = [self._side_ids(grid, row)] if self.sides else []
        if self.layout == "lattice":
            self._check_lattice(places, len(row), grid)
        elif (places is None) != (self.layout == "none"):
            given, way = ("not given", "give one for each code") if places is None else ("given", "leave them out")
            raise CodeError(f"the vocabulary's layout is {self.layout!r}, and positions were {given}; {way}")
        elif self.layout == "positions":
            ids = torch.stack([places + self.positions.offset, ids], 1).flatten()
        elif self.layout == "map":
            mask = torch.zeros(grid[0] * grid[1], dtype=torch.bool, device=row.device).index_fill(0, places, True)
            head.append(counts_to_map(mask_to_counts(mask, grid), grid) + self.map.offset)
        ids = torch.cat([*head, ids]) if head else ids
        return torch.cat([ids.new_tensor([self.image_start]), ids, ids.new_tensor([self.image_end])]) if wrap else ids

    @overload
    def to_text(self, codes: Encoding) -> list[str]: ...

    @overload
    def to_text(self, codes: _Integers, *, positions: _Integers | None = None, grid: _Grid | None = None) -> str: ...

    def to_text(
        self, codes: _Integers | Encoding, *, positions: _Integers | None = None, grid: _Grid | None = None
    ) -> str | list[str]:
        """Returns one image as text, between start and end; of an `Encoding`, a list of such texts.

        Arguments and errors are those of `to_ids`.
        """
        if isinstance(codes, Encoding):
            _require_none(positions, grid)
            return [self.to_text(row, positions=places, grid=grid) for row, places, grid in self._images(codes)]
        ids = self.to_ids(codes, wrap=False, positions=positions, grid=grid).tolist()
        ranges = self.ranges
        pieces = [next(part.spell(id - part.offset + part.first) for part in ranges if id < part.stop) for id in ids]
        return START_TOKEN + "".join(pieces) + END_TOKEN

    def to_encoding(self, rows: Iterable[_Integers], *, grid: _Grid | None = None) -> Encoding:
        """Returns the images of rows of ids, one image each, with positions and grids: the inverse of `to_ids`.

        grid: (rows, columns), where neither the vocabulary nor the ids say it

        Raises `CodeError` on ids that are no image in this layout. For text and images mixed, see
        `dyntok.llm.parse_ids`.
        """
        images = [self._image(row, grid) for row in integer_rows(rows, "ids")]
        if any(image.grid is None for image in images):
            raise CodeError("the vocabulary does not say the grid of its images; give grid=(rows, columns)")
        positions = None if self.layout == "none" else [image.positions for image in images]
        grids = torch.tensor([image.grid for image in images], dtype=torch.long, device="cpu").view(-1, 2)
        return Encoding.pack([image.codes for image in images], positions, grids, self.fingerprint)

    def to_codes(self, ids: _Integers) -> Tensor:
        """Returns the codes in one image's ids, int64 [T]: with start and end around them, or with neither.

        Raises `CodeError` on any other id, on start or end in the wrong place or without the other, and on no codes at
        all.
        """
        return self._image(integers(ids, "ids")).codes

    def to_positions(self, ids: _Integers) -> Tensor | None:
        """Returns the positions in one image's ids, int64 [T]; None where the layout is "none". Errors are those of
        `to_codes`.
        """
        return self._image(integers(ids, "ids")).positions

    def _images(self, encoding: Encoding) -> Iterable[tuple[Tensor, Tensor | None, _Grid]]:
        if None not in (self.fingerprint, encoding.fingerprint) and self.fingerprint != encoding.fingerprint:
            raise FingerprintError(
                f"the vocabulary belongs to the tokenizer {self.fingerprint}, "
                f"the codes come from {encoding.fingerprint}"
            )
        positions = encoding.positions if self.layout != "none" else None
        for i, (codes, grid) in enumerate(zip(encoding.codes, encoding.grids.tolist(), strict=True)):
            yield codes, None if positions is None else positions[i], tuple(grid)

    def _image(self, row: Tensor, grid: _Grid | None = None) -> _Image:
        starts, ends = ((row == marker).nonzero().flatten().tolist() for marker in (self.image_start, self.image_end))
        if starts or ends:
            if starts != [0] or ends != [len(row) - 1]:
                raise CodeError(
                    f"{counted(len(row), 'id')} with start ({self.image_start}) at {starts} and end ({self.image_end}) "
                    f"at {ends}; expected one image: start first, end last, or neither of them"
                )
            row = row[1:-1]
        if self.sides:
            (rows,), (columns,) = _numbers(row[:1], self.rows, 1), _numbers(row[1:2], self.columns, 1)
            grid, row = (rows, columns), row[2:]
        grid = self._known_grid(grid)
        positions = None
        if self.layout == "map":
            values = _numbers(row[: num_blocks(grid)], self.map, num_blocks(grid))
            mask = counts_to_mask(map_to_counts(torch.tensor(values, device="cpu"), grid), grid)
            positions, row = mask.nonzero()[:, 0].to(row.device), row[num_blocks(grid) :]
        elif self.layout == "positions":
            if len(row) % 2:
                raise CodeError(f"{counted(len(row), 'id')} in an image, expected pairs of position and code")
            positions, row = row[::2] - self.positions.offset, row[1::2]
        if not len(row):
            raise CodeError("no codes among these ids; an image has at least one")
        codes = row - self.offset
        refuse(
            (codes < 0) | (codes >= self.size),
            lambda i: f"id {row[i]} is not the id of a code, expected {self.codes}",
        )
        if self.layout == "lattice":
            positions = lattice_positions(len(codes), grid)
        if positions is not None:
            self._check_positions(positions, len(codes), grid)
        return _Image(codes, positions, grid)

    def _known_grid(self, grid: _Grid | None) -> _Grid | None:
        if grid is not None:
            given, grid = grid, pair_of(grid)
            if grid is None:
                raise CodeError(f"grid is {brief(given)}, expected (rows, columns)")
        if grid is not None and self.grid not in (None, grid):
            raise CodeError(
                f"an image has the grid {grid}, expected {self.grid}; VisualVocab.of(..., any_grid=True) writes any"
            )
        grid = self.grid if grid is None else grid
        if grid is None and self.sides:
            raise CodeError("this vocabulary writes each image's grid; give grid=(rows, columns)")
        return grid

    def _side_ids(self, grid: _Grid, like: Tensor) -> Tensor:
        if max(grid) > self.sides or min(grid) < 1:
            raise CodeError(f"a grid of {grid[0]} x {grid[1]} can't be written, expected sides of 1 to {self.sides}")
        return like.new_tensor([self.rows.offset + grid[0] - 1, self.columns.offset + grid[1] - 1])

    def _check_lattice(self, places: Tensor | None, tokens: int, grid: _Grid) -> None:
        expected = lattice_positions(tokens, grid)
        if places is not None and not torch.equal(places.cpu(), expected):
            raise CodeError(
                f"the {tokens} positions are not those of the lattice, which layout 'lattice' can't write; "
                'encode with places="lattice"'
            )

    def _check_positions(self, positions: Tensor, codes: int, grid: _Grid | None) -> None:
        if len(positions) != codes:
            raise CodeError(
                f"{counted(codes, 'code')} with {counted(len(positions), 'position')}, expected one for each"
            )
        patches = min(n for n in (self.patches, grid[0] * grid[1] if grid else 0, 2**62) if n)
        outside = (positions < 0) | (positions >= patches)
        refuse(outside, lambda i: f"position {positions[i]} at place {i} is out of range, expected 0 to {patches - 1}")
        unordered = positions.diff() <= 0
        refuse(unordered, lambda i: f"position {positions[i + 1]} comes after {positions[i]}; expected raster order")


def _numbers(ids: Tensor, part: IdRange, count: int) -> list[int]:
    """Returns the numbers that these ids stand for. Raises `CodeError` unless there are `count`, all in the range."""
    if len(ids) < count:
        raise CodeError(f"{counted(len(ids), 'id')} where {count} of kind {part.kind} begin an image, expected {part}")
    refuse(
        (ids < part.offset) | (ids >= part.stop),
        lambda i: f"id {ids[i]} at place {i} of the header is not of kind {part.kind}, expected {part}",
    )
    return (ids - part.offset + part.first).tolist()


def _require_none(positions: _Integers | None, grid: _Grid | None) -> None:
    if positions is not None or grid is not None:
        raise CodeError("positions= or grid= was given with an Encoding, which has its own; leave them out")
