"""Documents into rows of fixed length for training: no image is cut, and the borders of documents are kept.

A document that fits into a row stays whole. A longer one is cut in its text or between segments and continues in
another row. Not here: rows for a DataLoader (`rows.py`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from dyntok.errors import CodeError, ConfigError, FingerprintError
from dyntok.llm.documents import Document, ImageCodes
from dyntok.structure import brief, require, require_integer, require_type
from dyntok.vocab import VisualVocab

IGNORED = -100  # the label of what takes no part in the loss, as PyTorch and transformers have it
Loss: TypeAlias = Literal["both", "text", "image"]


@dataclass(frozen=True)
class PackedRow:
    """L tokens of several documents; int64 [L] each.

    input_ids     padded at the end
    labels        the ids again (a model shifts them itself), or -100: padding, the first token of each document, and
                  the modality without loss
    position_ids  from 0 in each document; 0 in the padding
    document      0 for the first document of the row, 1, ...; -1 in the padding
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    document: Tensor

    def attention_mask(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the mask that is added to attention scores, [1, L, L]: 0, or the minimum where a token may not look.

        A token (row) sees itself and the earlier tokens (columns) of its document.
        """
        place = torch.arange(len(self.document), device=self.document.device)
        seen = (self.document[:, None] == self.document) & (place[:, None] >= place)
        mask = torch.zeros(1, *seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill(~seen, torch.finfo(dtype).min)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each document, int64 [documents]."""
        return torch.bincount(self.document[self.document >= 0])


@dataclass
class _Open:
    """A row that still has room."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    document: list[int] = field(default_factory=list)

    def append(self, ids: list[int], labels: list[int]) -> None:
        number = self.document[-1] + 1 if self.document else 0
        self.ids += ids
        self.labels += [IGNORED, *labels[1:]]  # a document's first token follows nothing
        self.positions += range(len(ids))
        self.document += [number] * len(ids)


class Packer:
    """Puts documents into rows, the first of a few open rows that has room.

    length     tokens in a row
    encode     text to ids, without special tokens: `lambda text: tokenizer.encode(text, add_special_tokens=False)`
    bos, eos   ids before and after each document; None: none
    pad        id for what stays empty
    loss       "both", "text" (and eos), or "image" (codes, positions and the end; the start counts as text: text
               decides when a picture comes)
    open_rows  how many rows wait for documents that fit: more leave less padding
    """

    def __init__(
        self,
        length: int,
        vocab: VisualVocab,
        encode: Callable[[str], Sequence[int]],
        *,
        bos: int | None,
        eos: int | None,
        pad: int,
        loss: Loss = "both",
        open_rows: int = 8,
    ) -> None:
        if loss not in ("both", "text", "image"):
            raise ConfigError(f"loss is {loss!r}, expected 'both', 'text' or 'image'")
        require_integer("length", length, 2)
        require_integer("open_rows", open_rows, 1)
        require_integer("pad", pad, 0)
        for name, id in (("bos", bos), ("eos", eos)):
            if id is not None:
                require_integer(name, id, 0)
        require_type("vocab", vocab, VisualVocab, "a VisualVocab")
        require(callable(encode), f"encode is {brief(encode)}, expected a function of a text")
        self.length, self.vocab, self.encode, self.bos, self.eos, self.pad = length, vocab, encode, bos, eos, pad
        self.loss, self.open_rows = loss, open_rows
        self._open: list[_Open] = []

    def add(self, document: Document) -> Iterator[PackedRow]:
        """Yields the rows that this document made full.

        Raises `CodeError` on an image that is longer than a row, and on bad codes; `FingerprintError` on codes of
        another tokenizer than the vocabulary's.
        """
        require_type("a document", document, Document, "a Document, such as read_documents gives")
        expected = self.vocab.fingerprint
        if None not in (document.fingerprint, expected) and document.fingerprint != expected:
            raise FingerprintError(
                f"the vocabulary belongs to the tokenizer {expected}, "
                f"the codes of {document.key!r} come from {document.fingerprint}"
            )
        for ids, labels in self._parts(document):
            for row in self._open:
                if len(row.ids) + len(ids) <= self.length:
                    break
            else:
                if len(self._open) == self.open_rows:
                    yield self._close(max(self._open, key=lambda row: len(row.ids)))
                row = _Open()
                self._open.append(row)
            row.append(ids, labels)
            if len(row.ids) == self.length:
                yield self._close(row)

    def flush(self) -> Iterator[PackedRow]:
        """Yields the rows that are not full."""
        while self._open:
            yield self._close(self._open[0])

    def pack(self, documents: Iterable[Document]) -> Iterator[PackedRow]:
        """Yields all rows of these documents."""
        require_type("documents", documents, Iterable, "several documents")
        for document in documents:
            yield from self.add(document)
        yield from self.flush()

    def _close(self, row: _Open) -> PackedRow:
        self._open.remove(row)
        empty = self.length - len(row.ids)
        filled = ((row.ids, self.pad), (row.labels, IGNORED), (row.positions, 0), (row.document, -1))
        return PackedRow(*(torch.tensor(values + [fill] * empty, device="cpu") for values, fill in filled))

    def _parts(self, document: Document) -> Iterator[tuple[list[int], list[int]]]:
        """Yields the (ids, labels) of the document in one or more parts, each at most a row long."""
        ids: list[int] = []
        labels: list[int] = []
        for piece, targets, whole in self._pieces(document):
            while piece:
                room = self.length - len(ids)
                if len(piece) <= room or not whole and room:
                    ids, labels = ids + piece[:room], labels + targets[:room]
                    piece, targets = piece[room:], targets[room:]
                else:
                    if not ids:
                        raise CodeError(
                            f"an image of {document.key!r} takes {len(piece)} tokens, "
                            f"more than a row of {self.length}; "
                            "make rows longer, or encode with max_tokens="
                        )
                    yield ids, labels
                    ids, labels = [], []
        if ids:
            yield ids, labels

    def _pieces(self, document: Document) -> Iterator[tuple[list[int], list[int], bool]]:
        """Yields (ids, labels, whether they must stay together)."""
        vocab, on_text, on_image = self.vocab, self.loss != "image", self.loss != "text"
        if self.bos is not None:
            yield [self.bos], [IGNORED], False
        for segment in document.segments:
            if isinstance(segment, ImageCodes):
                ids = segment.to_ids(vocab)
                rest = ids[1:] if on_image else [IGNORED] * (len(ids) - 1)
                yield ids, [ids[0] if on_text else IGNORED, *rest], True
            else:
                # a caption that spells our tokens must not open an image
                ids = [id for id in self.encode(segment) if not vocab.is_visual(id)]
                yield ids, ids if on_text else [IGNORED] * len(ids), False
        if self.eos is not None:
            yield [self.eos], [self.eos if on_text else IGNORED], False
