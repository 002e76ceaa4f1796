"""Documents of text and images in any order, read from Parquet: a row is a document of a text and its images."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dyntok.errors import DataError, MissingDependencyError
from dyntok.vocab import VisualVocab


@dataclass(frozen=True)
class ImageCodes:
    """One image of a document: its codes, and the positions and grid that the vocabulary's layout writes."""

    codes: Tensor | Sequence[int]
    positions: Tensor | Sequence[int] | None = None
    grid: tuple[int, int] | None = None

    def to_ids(self, vocab: VisualVocab) -> list[int]:
        """Returns the image as ids, start and end included. Raises `CodeError` where they can't say its layout."""
        known = vocab.layout != "none"
        grid = self.grid if known or vocab.sides else None
        return vocab.to_ids(self.codes, positions=self.positions if known else None, grid=grid).tolist()


@dataclass(frozen=True)
class Document:
    """Text and images, one after another. Random draws for a document depend on its `key`, not on its place."""

    key: str
    segments: tuple[str | ImageCodes, ...]


def read_documents(
    source: str | Path, *, text: str | None = "caption", positions: bool = False, epoch: int = 0, seed: int = 0
) -> Iterator[Document]:
    """Documents from a Parquet file, or from all in a folder that have `key` and `codes`, in the order of their names;
    streamed.

    text: the column whose text goes with the images of a row; of a list of texts one is drawn for each epoch; None:
    images alone
    positions: whether to read them

    A row may hold one image (`codes` is a list) or several (a list of lists). Where it holds as many texts as images,
    nulls included, they stand at the same places of an interleaved document. A row without codes and text is left out.

    Raises `DataError` where there are no such files, where a column is missing or of the wrong type,
    `MissingDependencyError` without pyarrow.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of("pyarrow", "transformers") from error

    source = Path(source)
    paths = sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
    wanted = ["key", "codes", *["positions"] * positions, *[text] * (text is not None)]
    found = False
    for path in paths:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                names = file.schema_arrow.names
                if not {"key", "codes"} <= set(names):
                    continue
                found = True
                missing = [name for name in wanted if name not in names]
                if missing:
                    raise DataError(
                        f"{path} has no column {', '.join(missing)}, only {', '.join(names)}; "
                        "text= names the column of texts"
                    )
                for batch in file.iter_batches(batch_size=1024, columns=wanted):
                    for row in batch.to_pylist():
                        yield from _documents(row, text, f"{seed} {epoch}", path)
        except (OSError, pyarrow.ArrowException) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"can't read {path}: {error}; expected Parquet with the columns {', '.join(wanted)}"
            ) from error
    if not found:
        raise DataError(f"no Parquet with the columns key and codes in {source}; `dyntok batch` writes such files")


def _documents(row: dict[str, Any], text: str | None, draw: str, path: Path) -> Iterator[Document]:
    codes, places, words, key = (
        row["codes"] or [],
        row.get("positions"),
        row[text] if text is not None else None,
        str(row["key"]),
    )
    nested = any(code is None or isinstance(code, list) for code in codes)
    images = (codes if nested else [codes]) if codes else []
    places = (places if nested else [places]) if places else [None] * len(images)
    if (
        nested and isinstance(words, list) and len(words) == len(codes)
    ):  # interleaved, as web pages are: at each place a text or an image
        texts = list(words)
    else:
        if isinstance(words, list):
            words = words[int(_share(f"{draw} text {key}") * len(words))] if words else None
        images, places, texts = [*images, None], [*places, None], [None] * len(images) + [words]
    segments: list[str | ImageCodes] = []
    for words, image, place in zip(texts, images, places, strict=True):
        if words is not None and not isinstance(words, str):
            raise DataError(f"{path}: {text} of {key} is {type(words).__name__}, expected text or a list of texts")
        if image:
            segments.append(ImageCodes(image, place))
        if words:
            segments.append(words)
    if segments:
        yield Document(key, tuple(segments))


def in_drawn_order(document: Document, *, epoch: int = 0, seed: int = 0) -> Document:
    """An image and its text, in either order with equal chances, as LaVIT trains; other documents stay as they are.

    Image first teaches to describe, text first to paint. The draw depends on the key, the epoch and the seed.
    """
    kinds = [isinstance(segment, str) for segment in document.segments]
    if sorted(kinds) != [False, True] or _share(f"{seed} {epoch} order {document.key}") < 0.5:
        return document
    return replace(document, segments=document.segments[::-1])


def _share(text: str) -> float:
    """A number from 0 to 1 that belongs to this text."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogateescape")).digest()[:6], "big") / 2**48
