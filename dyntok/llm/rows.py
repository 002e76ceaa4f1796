"""Packed rows for a DataLoader, with everything that keeps the documents of a row apart.

Attention must not cross the borders of documents. Three forms do that, each with its cost:

    position_ids   the default; transformers masks by them where there is no cache, so `use_cache=False` goes with them.
                   Flash attention heeds them in a batch of one row alone
    float mask     `PackedDataset(mask=torch.float32)`; for code that ignores position_ids, L * L numbers per row
    flattened      `collate_fn=flatten_rows`; cu_seq_lens for flash attention, without padding

`check_packing(model)` in `separation.py` measures whether a model heeds them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from dyntok.chunks import batched
from dyntok.epochs import EpochDataset
from dyntok.errors import ConfigError
from dyntok.llm.documents import Document
from dyntok.llm.packing import PackedRow, Packer
from dyntok.structure import brief, require, require_integer


class RowInputs(dict[str, Any]):
    """The tensors of one row, int64 [L] each, for `model(**batch)` once they are in a batch; `row` is the whole row.

    torch's default collate begins a batch with a copy of the first row. That copy is a plain dict with
    `use_cache=False`, without which transformers lets documents see each other.
    """

    row: PackedRow

    @classmethod
    def of(cls, row: PackedRow, mask: torch.dtype | None = None) -> "RowInputs":
        """Returns the inputs of a row; mask: the dtype of a float mask [1, L, L] to add to them."""
        inputs = cls(input_ids=row.input_ids, labels=row.labels, position_ids=row.position_ids)
        if mask is not None:
            inputs["attention_mask"] = row.attention_mask(mask)
        inputs.row = row
        return inputs

    def __copy__(self) -> dict[str, Any]:
        return {**self, "use_cache": False}


def collate_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a batch of rows with `use_cache=False`, for loaders and trainers whose own collate does not add it."""
    _require_rows(rows, Mapping)
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]} | {"use_cache": False}


def flatten_rows(rows: Sequence[RowInputs]) -> dict[str, Any]:
    """Returns the documents of all rows as one row without padding, with the borders that flash attention takes.

    input_ids, labels, position_ids int64 [1, T]; cu_seq_lens_q, cu_seq_lens_k int32 [documents + 1]; max_length_q,
    max_length_k; and `use_cache=False`, with which other attention keeps the documents apart by position_ids.
    """
    _require_rows(rows, RowInputs)
    packed = [row.row for row in rows]
    filled = [row.document >= 0 for row in packed]
    lengths = torch.cat([row.lengths for row in packed])
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(row, name)[used] for row, used in zip(packed, filled, strict=True)])[None]

    return {
        **{name: joined(name) for name in ("input_ids", "labels", "position_ids")},
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "use_cache": False,
    }


def _require_rows(rows: Any, kind: type) -> None:
    fits = isinstance(rows, Sequence) and len(rows) > 0 and all(isinstance(row, kind) for row in rows)
    require(fits, f"rows is {brief(rows)}, expected a list of at least one row of a PackedDataset")


class PackedDataset(EpochDataset):
    """A stream of rows for a DataLoader, as `model(**batch)` takes them.

    documents: for an epoch's number, its documents. Every rank and every worker of a loader reads and packs them all,
        and gives its share of the rows
    packer: makes an empty `Packer`
    rank, world: which part of the rows to give; every rank gets the same number
    remainder: where the ranks can't share all rows evenly: "repeat" up to `world` - 1 rows, or "drop" as many
    mask: dtype of a float mask [1, L, L] to add to each row, that of the model's weights. A model with sliding windows
        then attends without them

    >>> documents = lambda epoch: read_documents("codes/", epoch=epoch)
    >>> data = PackedDataset(documents, lambda: Packer(2048, vocab, encode, ...))
    >>> check_packing(model)
    >>> for batch in DataLoader(data, batch_size=8):
    ...     model(**batch).loss.backward()

    accelerate itself gives every process its part of the rows: a loader for `accelerator.prepare` needs no rank and
    world, but `dispatch_batches=False`. Otherwise one process joins the batches of all, and fails at `use_cache=False`.

    Documents stay apart in Llama, Qwen2, Qwen3, Mistral, Gemma, Gemma 2, Gemma 3 (text), GPT-2, Phi-3, OLMo 2 and
    SmolLM3 of transformers, with default and eager attention, by position_ids or by mask. OPT and Qwen2-VL need the
    mask. BLOOM, Mamba and other recurrent models can't keep documents apart: give those one document per row.
    transformers' `Trainer` takes this data set as it is, TRL's `SFTTrainer` with `data_collator=collate_rows`.
    """

    def __init__(
        self,
        documents: Callable[[int], Iterable[Document]],
        packer: Callable[[], Packer],
        *,
        epoch: int = 0,
        rank: int = 0,
        world: int = 1,
        remainder: Literal["repeat", "drop"] = "repeat",
        mask: torch.dtype | None = None,
    ) -> None:
        for name, value in (("documents", documents), ("packer", packer)):
            require(callable(value), f"{name} is {brief(value)}, expected a function; see the example of PackedDataset")
        require_integer("rank", rank, 0)
        require_integer("world", world, 1)
        require(rank < world, f"rank is {rank} of {world}, expected 0 to {world - 1}")
        if remainder not in ("repeat", "drop"):
            raise ConfigError(f"remainder is {remainder!r}, expected 'repeat' or 'drop'")
        if not (mask is None or isinstance(mask, torch.dtype) and mask.is_floating_point):
            raise ConfigError(
                f"mask is {mask!r}, expected the floating-point dtype of the model, such as torch.float32"
            )
        self.documents, self.packer, self.rank, self.world = documents, packer, rank, world
        self.remainder, self.mask = remainder, mask
        super().__init__(epoch)

    def __iter__(self) -> Iterator[RowInputs]:
        worker = get_worker_info()
        share, shares = (worker.id, worker.num_workers) if worker else (0, 1)
        for row in islice(self._rows_of_rank(), share, None, shares):
            yield RowInputs.of(row, self.mask)

    def _rows_of_rank(self) -> Iterator[PackedRow]:
        """Yields every `world`-th row, equally many on every rank."""
        first: tuple[PackedRow, ...] = ()
        for rows in batched(self.packer().pack(self.documents(self.epoch)), self.world):
            first = first or rows
            if len(rows) < self.world and self.remainder == "drop":
                return
            repeated = first[(self.rank - len(rows)) % len(first)]
            yield rows[self.rank] if self.rank < len(rows) else repeated
