"""Megatron-core's indexed dataset: the ids of documents in `.bin`, their borders in `.idx`, their keys as JSON."""

import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from dyntok.batch.engines.rows import TokenizedImage, TokenizedRow
from dyntok.batch.options import BatchOptions
from dyntok.batch.storage import Output
from dyntok.errors import BatchError, ConfigError, DataError, MissingDependencyError
from dyntok.texts import draw_text, parse_texts
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.vocab import VisualVocab

_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_TYPES = {"uint16": 8, "int32": 4}


def visual_vocab(options: BatchOptions, tokenizer: DynamicVisualTokenizer) -> VisualVocab:
    """Returns the vocabulary of a Megatron output, whose ids follow the `vocab_size` entries of the language model.

    Without a layout in the options, it is that of the masks, or "none" where those are free. Images of a tokenizer that
    takes any grid begin with theirs.
    """
    layout, places = options.layout, options.places or tokenizer.config.selector.places
    if layout is None:
        layout = places if places in ("map", "lattice") else "none"
    return VisualVocab.of(tokenizer, options.vocab_size, layout=layout, any_grid=tokenizer.any_grid)


class TextTokenizer:
    """The tokenizer of a language model, for the texts of rows.

    path     a `tokenizer.json`, or a folder that holds one
    columns  whose texts are written, in this order

    Raises `ConfigError` where there is no such file.
    """

    def __init__(self, path: str, columns: Sequence[str]) -> None:
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError as error:
            raise MissingDependencyError.of("tokenizers", "transformers") from error
        try:
            self._tokenizer = Tokenizer.from_file(str(_tokenizer_file(path)))
        except Exception as error:  # tokenizers raises nothing more specific
            raise ConfigError(f"can't read the text tokenizer {path}: {error}; expected a tokenizer.json") from error
        self.columns = columns

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def text_tokenizer_digest(path: str) -> str:
    """Returns what identifies the contents of a text tokenizer. Raises `ConfigError` where it can't be read."""
    try:
        return f"sha256:{hashlib.sha256(_tokenizer_file(path).read_bytes()).hexdigest()}"
    except OSError as error:
        raise ConfigError(f"can't read the text tokenizer {path}: {error}; expected a tokenizer.json") from error


def _tokenizer_file(path: str) -> Path:
    return Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)


class Megatron:
    """Writes a document per row: each image between start and end in the vocabulary's layout, then the texts.

    eod   an id that ends every document, where GPTDataset resets attention and positions
    text  the tokenizer of the texts; None: images alone

    Of a list of texts one is drawn by the row's key. In interleaved rows a list with a text or null for each image
    place puts the texts between the images. Tokens that a text spells although they belong to images are left out.
    """

    def __init__(self, vocab: VisualVocab, eod: int | None = None, text: TextTokenizer | None = None) -> None:
        self.vocab, self.eod, self.text = vocab, eod, text
        self.dtype = np.dtype("uint16" if vocab.dtype == "uint16" else "int32")
        if vocab.vocab_size - 1 > np.iinfo(self.dtype).max:
            raise BatchError(
                f"ids up to {vocab.vocab_size - 1} do not fit into Megatron's {self.dtype}; "
                "the vocabulary must be smaller"
            )

    def write(
        self, output: Output, name: str, rows: Sequence[TokenizedRow], types: Mapping[str, pa.DataType]
    ) -> dict[str, int]:
        if not rows:
            return {}
        documents = [self._document(row) for row in rows]
        lengths = [len(document) for document in documents]
        keys = json.dumps([row.key for row in rows], ensure_ascii=False) + "\n"
        writes: dict[str, Callable[[str], Any]] = {
            f"{name}.bin": lambda path: np.concatenate(documents).tofile(path),
            f"{name}.idx": lambda path: Path(path).write_bytes(megatron_index(lengths, self.dtype)),
            f"{name}.keys.json": lambda path: Path(path).write_text(keys, encoding="utf-8"),
        }
        return {file: output.publish(file, write) for file, write in writes.items()}

    def _document(self, row: TokenizedRow) -> np.ndarray:
        between: list[Any] = []
        after: list[Any] = []
        for column in self.text.columns if self.text else ():
            words = parse_texts(row.columns.get(column), f"{column} of {row.key!r}")
            aligned = isinstance(words, list) and len(words) == len(row.images)
            (between if aligned else after).append(words)
        ids: list[int] = []
        for place, image in enumerate(row.images):
            ids += [] if image is None else self._image(image)
            for words in between:
                ids += self._words(words[place], row)
        for words in after:
            ids += self._words(draw_text(words, row.key), row)
        return np.array(ids + ([] if self.eod is None else [self.eod])).astype(self.dtype)

    def _image(self, image: TokenizedImage) -> list[int]:
        codes, positions = (torch.from_numpy(values.astype(np.int64)) for values in (image.codes, image.positions))
        places = None if self.vocab.layout == "none" else positions
        return self.vocab.to_ids(codes, positions=places, grid=(image.grid[0], image.grid[1])).tolist()

    def _words(self, words: Any, row: TokenizedRow) -> list[int]:
        if words is None or self.text is None:
            return []
        if not isinstance(words, str):
            raise DataError(f"a text of {row.key!r} is {type(words).__name__}, expected text or a list of texts")
        ids = [id for id in self.text.encode(words) if not self.vocab.is_visual(id)]
        if ids and max(ids) >= self.vocab.image_start:
            raise ConfigError(
                f"the text tokenizer gives the id {max(ids)}, expected ids below vocab_size={self.vocab.image_start}"
            )
        return ids


def megatron_index(lengths: Sequence[int], dtype: np.dtype) -> bytes:
    """Returns the `.idx` file of documents that are one sequence each.

    It holds a header, lengths (int32), byte offsets (int64), and the first sequence of each document (int64).
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)])[:-1] * dtype.itemsize
    header = _MAGIC + struct.pack("<QBQQ", _VERSION, _TYPES[dtype.name], len(lengths), len(lengths) + 1)
    arrays = np.asarray(lengths, "<i4"), offsets.astype("<i8"), np.arange(len(lengths) + 1, dtype="<i8")
    return header + b"".join(array.tobytes() for array in arrays)
