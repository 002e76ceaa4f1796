"""`GrammarMask`: `ImageGrammar` for batches, as tensor operations that never wait for the device."""

from collections.abc import Iterable, Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from dyntok.errors import ConfigError
from dyntok.layout import map_digits
from dyntok.llm.grammar import UNLIMITED, ImageGrammar, as_tuple
from dyntok.structure import require_type


class MaskState(NamedTuple):
    """`GrammarState` of R rows: bool [R] or int64 [R] each."""

    inside: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    images: Tensor
    position: Tensor
    waiting: Tensor
    rows: Tensor
    columns: Tensor
    blocks: Tensor
    total: Tensor


class _Next(NamedTuple):
    """What may come next in R rows: bool [R], or [R, size of the range]; None where the vocabulary has no such ids."""

    codes: Tensor
    end: Tensor
    full: Tensor  # the end alone
    rows: Tensor | None = None
    columns: Tensor | None = None
    map: Tensor | None = None
    positions: Tensor | None = None


_OF_GRAMMARS = ("_least", "_most", "_shortest", "_min_images", "_max_images", "_text", "_grids")  # [G, ...]


class GrammarMask:
    """One grammar for all rows, or one for each prompt of a batch (with beams or several sequences per prompt, prompt
    by prompt).

    The grammars must agree in `vocab`, `eos` and `vocab_size`. Raises `ConfigError` where they do not.
    """

    def __init__(self, grammars: ImageGrammar | Sequence[ImageGrammar], device: torch.device | str = "cpu") -> None:
        grammars = [grammars] if isinstance(grammars, ImageGrammar) else grammars
        require_type("grammars", grammars, Iterable, "an ImageGrammar, or a list of them")
        grammars = list(grammars)
        for grammar in grammars:
            require_type("a grammar", grammar, ImageGrammar, "an ImageGrammar")
        if not grammars or len({(g.vocab, g.eos, g.vocab_size) for g in grammars}) > 1:
            raise ConfigError(
                f"got {len(grammars)} grammars, expected at least one, all with equal vocab, eos and vocab_size"
            )
        self.grammar, self.device = grammars[0], torch.device(device)
        vocab = self.grammar.vocab
        self._text_ranges, self._width = self.grammar.text_ranges, self.grammar.ids_per_code
        self._codes, self._rows, self._columns = vocab.codes, vocab.rows, vocab.columns
        self._map, self._positions, self._visual = vocab.map, vocab.positions, (vocab.offset, vocab.ranges[-1].stop)
        images = range(max(len(as_tuple(limit)) for g in grammars for limit in (g.min_tokens, g.max_tokens)))

        def table(make) -> Tensor:
            return torch.tensor([make(g) for g in grammars], device=device)

        self._least = table(lambda g: [g.limits(i)[0] for i in images])  # [G, images]
        self._most = table(lambda g: [g.limits(i)[1] for i in images])
        self._shortest = table(lambda g: [g.shortest(g.limits(i)[0]) for i in images])
        self._min_images, self._max_images = table(lambda g: g.min_images), table(lambda g: g.max_images)
        self._text = table(lambda g: g.text)
        self._digits = map_digits().to(device)  # [625, 4]
        sides = torch.arange(1, vocab.sides + 1)
        rows, columns = torch.meshgrid(sides, sides, indexing="ij")
        blocks = (rows + 3) // 4 * ((columns + 3) // 4) * (vocab.layout == "map")
        self._headers = (2 + blocks).to(device)  # as `ImageGrammar.header`
        self._patches = (rows * columns).to(device)  # [sides, sides]
        grids = [((rows == g.grid[0]) & (columns == g.grid[1])) if g.grid else rows > 0 for g in grammars]
        self._grids = torch.stack(grids).to(device)  # [G, sides, sides]

    def of_rows(self, numbers: Tensor) -> "GrammarMask":
        """Returns the mask of R rows, each with the grammar of its number, int64 [R]."""
        chosen = copy(self)
        for name in _OF_GRAMMARS:
            setattr(chosen, name, getattr(self, name)[numbers])
        return chosen

    def start(self, rows: int) -> MaskState:
        """Returns the state of R rows at the beginning."""
        no, zero = (torch.zeros(rows, dtype=dtype, device=self.device) for dtype in (torch.bool, torch.long))
        return MaskState(no, zero, zero, zero - 1, no, zero, zero, zero, zero)

    def scan(self, ids: Tensor, prompt_length: int = 0) -> MaskState:
        """Returns the state after ids, int64 [R, L]; images that ended before `prompt_length` do not count."""
        vocab, length = self.grammar.vocab, ids.shape[1]
        if not length:
            return self.start(len(ids))
        place = torch.arange(1, length + 1, device=ids.device)
        starts, visual = ids == vocab.image_start, (ids >= self._visual[0]) & (ids < self._visual[1])
        last_start = (starts * place).amax(1)  # counted from 1; 0: there is none
        last_break = (~(starts | visual) * place).amax(1)
        inside = last_start > last_break
        since = (place > last_start[:, None]) & inside[:, None]  # [R, L]

        def last(part, nothing: int) -> tuple[Tensor, Tensor]:
            """Returns the number of the last id of a kind, and its place."""
            found = ((ids >= part.offset) & (ids < part.stop) & since).mul(place).amax(1)
            id = ids.gather(1, (found[:, None] - 1).clamp(min=0))[:, 0]
            return torch.where(found > 0, id - part.offset + part.first, nothing), found

        codes = (ids >= self._codes.offset) & (ids < self._codes.stop) & since
        maps = (ids >= self._map.offset) & (ids < self._map.stop) & since
        position, written = last(self._positions, -1)
        return MaskState(
            inside,
            codes.sum(1),
            (ids[:, prompt_length:] == vocab.image_end).sum(1),
            position,
            inside & (written > (codes * place).amax(1)),
            last(self._rows, 0)[0],
            last(self._columns, 0)[0],
            maps.sum(1),
            self._total(ids, maps).sum(1),
        )

    def step(self, state: MaskState, ids: Tensor) -> MaskState:
        """Returns the state after one more id per row, int64 [R]."""
        vocab = self.grammar.vocab
        start, end = ids == vocab.image_start, ids == vocab.image_end
        stays = state.inside & (ids >= self._visual[0]) & (ids < self._visual[1])
        code, position, rows, columns, maps = (
            stays & (ids >= part.offset) & (ids < part.stop)
            for part in (self._codes, self._positions, self._rows, self._columns, self._map)
        )
        return MaskState(
            start | stays,
            (state.count + code) * stays,
            state.images + end,
            torch.where(position, ids - self._positions.offset, torch.where(stays, state.position, -1)),
            position | state.waiting & stays & ~code,
            torch.where(rows, ids - self._rows.offset + 1, state.rows * stays),
            torch.where(columns, ids - self._columns.offset + 1, state.columns * stays),
            (state.blocks + maps) * stays,
            state.total * stays + self._total(ids, maps),
        )

    def _total(self, ids: Tensor, maps: Tensor) -> Tensor:
        """Returns the sums of counts of map tokens, 0 elsewhere; of the shape of ids."""
        return self._digits.sum(1)[(ids - self._map.offset).clamp(0, len(self._digits) - 1)] * maps

    def forbidden(self, state: MaskState, width: int, room: int | Tensor = UNLIMITED) -> Tensor:
        """Returns where an id may not come next, bool [R, width]. width: of the logits; room: as in
        `ImageGrammar.allowed`, for all rows or int64 [R].
        """
        return self._decide(state, width, room)[0]

    def constrain(self, scores: Tensor, state: MaskState, room: int | Tensor = UNLIMITED) -> Tensor:
        """Returns scores [R, V] with -inf where an id may not come next; a new tensor.

        Where the start or end of an image is the only id allowed, its score becomes 0, so that it can be chosen even if
        another rule had excluded it.
        """
        forbidden, start, end = self._decide(state, scores.shape[1], room)
        scores = scores.masked_fill(forbidden, float("-inf"))
        for id, only in ((self.grammar.vocab.image_start, start), (self.grammar.vocab.image_end, end)):
            scores[:, id] = scores[:, id].masked_fill(only, 0.0)
        return scores

    def _decide(self, state: MaskState, width: int, room: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what is forbidden, bool [R, V], and where start and end are the only ids allowed, bool [R]."""
        grammar, vocab = self.grammar, self.grammar.vocab
        if width < grammar.vocab_size:
            raise ConfigError(
                f"logits for {width} ids, but the grammar's vocabulary has {grammar.vocab_size}; "
                "call extend_model() first"
            )
        rows = len(state.inside)
        image = state.images.clamp(max=self._least.shape[1] - 1)[:, None]
        least, most, shortest = (
            self._each(table, rows).gather(1, image)[:, 0] for table in (self._least, self._most, self._shortest)
        )
        text, min_images, max_images = (self._each(t, rows) for t in (self._text, self._min_images, self._max_images))
        start = ~state.inside & (state.images < max_images) & (shortest <= room)
        text = text & ~state.inside
        eos = ~state.inside & ((state.images >= min_images) | ~(start | (text if self._text_ranges else False)))
        following = self._inside(state, least, most, room)

        forbidden = torch.empty(rows, width, dtype=torch.bool, device=state.inside.device)
        forbidden[:, grammar.vocab_size :] = True
        for low, high in self._text_ranges:
            forbidden[:, low:high] = ~text[:, None]
        for id in as_tuple(grammar.eos):
            forbidden[:, id] = ~eos
        forbidden[:, vocab.image_start], forbidden[:, vocab.image_end] = ~start, ~following.end
        forbidden[:, self._codes.offset : self._codes.stop] = ~following.codes[:, None]
        for part, allowed in (
            (self._rows, following.rows),
            (self._columns, following.columns),
            (self._map, following.map),
            (self._positions, following.positions),
        ):
            if allowed is not None:
                forbidden[:, part.offset : part.stop] = ~allowed
        return forbidden, start & ~(text | eos), following.full

    def _inside(self, state: MaskState, least: Tensor, most: Tensor, room: int | Tensor) -> _Next:
        """Returns what may come next in an image."""
        vocab, free, side_rows, side_columns = self.grammar.vocab, state.inside, None, None
        if vocab.sides:
            unsized, half = free & (state.rows == 0), free & (state.rows > 0) & (state.columns == 0)
            side_rows, side_columns = self._sides(state, least, room)
            side_rows, side_columns = side_rows & unsized[:, None], side_columns & half[:, None]
            free = free & ~unsized & ~half
        grid = self._grid(state)
        patches = vocab.patches or UNLIMITED if grid is None else grid[0] * grid[1]
        if grid is not None:
            least, most = least.clamp(max=patches), most.clamp(max=patches)
        if vocab.layout == "map":
            values, planning = self._map_values(state, grid, least, most, room)
            values, free = values & (free & planning)[:, None], free & ~planning
            codes, full = free & (state.count < state.total), free & (state.count >= state.total)
            return _Next(codes, full, full, side_rows, side_columns, values)
        waiting, free = free & state.waiting, free & ~state.waiting
        full = free & ((state.count >= most) | (state.position + 1 >= patches))
        full = full | free & (room <= self._width)
        end = free & (full | (state.count >= least))
        if not vocab.patches:
            return _Next(waiting | free & ~full, end, full, side_rows, side_columns)
        place = torch.arange(vocab.patches, device=free.device)
        low = state.position + 1
        high = torch.maximum(patches - (least - state.count).clamp(min=1), low)
        fits = (place >= low[:, None]) & (place <= high[:, None]) & (free & ~full)[:, None]
        return _Next(waiting, end, full, side_rows, side_columns, None, fits)

    def _grid(self, state: MaskState) -> tuple[Tensor, Tensor] | None:
        """Returns rows and columns, int64 [R] each (1 where they are not written yet); None where nothing says them."""
        vocab = self.grammar.vocab
        if vocab.sides:
            return state.rows.clamp(min=1), state.columns.clamp(min=1)
        ones = torch.ones_like(state.count)
        return None if vocab.grid is None else (vocab.grid[0] * ones, vocab.grid[1] * ones)

    def _sides(self, state: MaskState, least: Tensor, room: int | Tensor) -> tuple[Tensor, Tensor]:
        """Returns which numbers of rows fit the columns, and which of columns fit the rows: bool [R, sides] each."""
        known = self._each(self._grids, len(least)) & (self._patches >= least[:, None, None])  # [R, sides, sides]
        needed = self._headers + (self._width * least + 1)[:, None, None]
        rows = _or_else((known & (needed <= _over(room, 2))).any(2), known.any(2))
        row = (state.rows - 1).clamp(min=0)[:, None, None].expand(-1, 1, known.shape[2])
        known, needed = known.gather(1, row)[:, 0], needed.gather(1, row)[:, 0]
        columns = _or_else(known & (needed <= _over(room, 1) + 1), known)
        return rows, _or_else(columns, torch.ones_like(columns))

    def _map_values(
        self, state: MaskState, grid: tuple[Tensor, Tensor], least: Tensor, most: Tensor, room: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the allowed map values, bool [R, 625], and where map tokens are still to come, bool [R].

        With an allowed value the total can still reach `least` and does not exceed `most`.
        """
        rows, columns = grid
        across = (columns + 3) // 4
        left = (rows + 3) // 4 * across - state.blocks
        top, edge = state.blocks // across * 4, state.blocks % across * 4
        cells = torch.arange(0, 4, 2, device=rows.device)
        heights = ((rows - top)[:, None] - cells).clamp(0, 2)  # of the two rows of cells, [R, 2]
        widths = ((columns - edge)[:, None] - cells).clamp(0, 2)
        capacities = (heights[:, :, None] * widths[:, None]).flatten(1)  # [R, 4]
        own = capacities.sum(1)
        before = top * columns + heights.sum(1) * torch.minimum(edge + 4, columns)  # patches up to this block
        low = torch.minimum((least - state.total - (rows * columns - before)).clamp(min=0), own)
        high = torch.maximum(torch.minimum(most, room - left - 1) - state.total, low)
        sums = self._digits.sum(1)
        fits = (sums >= low[:, None]) & (sums <= high[:, None])
        return fits & (self._digits <= capacities[:, None]).all(2), left > 0

    def _each(self, table: Tensor, rows: int) -> Tensor:
        """Repeats the values of groups for their rows: [G, ...] -> [R, ...]."""
        prompts = len(table)
        if rows % prompts:
            raise ConfigError(
                f"{prompts} grammars for {rows} rows of logits, expected one grammar, or one for each prompt"
            )
        return table.repeat_interleave(rows // prompts, 0, output_size=rows)


def _over(room: int | Tensor, axes: int) -> int | Tensor:
    """Returns a number for each row, [R], against tensors with so many axes more."""
    return room.view(-1, *[1] * axes) if isinstance(room, Tensor) else room


def _or_else(some: Tensor, others: Tensor) -> Tensor:
    """Rows of `some`, or of `others` where a row has nothing: bool [R, n]."""
    return torch.where(some.any(1, keepdim=True), some, others)
