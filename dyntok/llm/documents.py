"""Documents of text and images in any order, read from Parquet: a row is a document of a text and its images."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from dyntok.errors import DataError, MissingDependencyError
from dyntok.structure import require_path, require_type
from dyntok.texts import draw_text, parse_texts, share
from dyntok.vocab import VisualVocab

if TYPE_CHECKING:
    from dyntok.batch.manifest import RecordedFile


@dataclass(frozen=True)
class ImageCodes:
    """One image of a document: its codes, and the positions and grid that the vocabulary's layout writes."""

    codes: Tensor | Sequence[int]
    positions: Tensor | Sequence[int] | None = None
    grid: tuple[int, int] | None = None

    def to_ids(self, vocab: VisualVocab) -> list[int]:
        """Returns the image as ids, start and end included. Raises `CodeError` where they can't say its layout."""
        places = None if vocab.layout == "none" else self.positions
        return vocab.to_ids(self.codes, positions=places, grid=self.grid).tolist()


@dataclass(frozen=True)
class Document:
    """Text and images, one after another. Random draws for a document depend on its `key`, not on its place."""

    key: str
    segments: tuple[str | ImageCodes, ...]
    fingerprint: str | None = None  # of the tokenizer that made the codes


def read_documents(
    source: str | Path, *, text: str | None = "caption", positions: bool | None = None, epoch: int = 0, seed: int = 0
) -> Iterator[Document]:
    """Yields the documents of an output of `dyntok batch`, of a folder of Parquet files, or of one file.

    text: the column whose text goes with the images of a row. Of a list of texts one is drawn for each epoch; a text
        that is a list of strings in JSON, as `.json` companions are, is such a list. None: images alone.
    positions: whether to read the places of codes, which most layouts of a vocabulary write; None: where they are there

    Files come in the order of their names. Of an output of `dyntok batch` only the files are read that its records
    name, as `dyntok.batch.read` does. Files of a folder without records are read if they have the columns `key` and
    `codes`.

    A row may hold one image (`codes` is a list) or several (a list of lists). Where it holds as many texts as images,
    nulls included, they stand at the same places of an interleaved document. A row without codes and text is left out.

    Raises `DataError` where there are no such files, and where a column is missing or of the wrong type;
    `MissingDependencyError` without pyarrow.
    """
    require_path("source", source)
    if text is not None:
        require_type("text", text, str, "the name of a column, or None")
    found = False
    for path, recorded in _files(Path(source)):
        for row, fingerprint in _rows(path, recorded, text, positions):
            found = True
            if row is not None:
                yield from _documents(row, text, f"{seed} {epoch}", path, fingerprint)
    if not found:
        raise DataError(f"no Parquet with the columns key and codes in {source}; `dyntok batch` writes such files")


_Rows: TypeAlias = Iterator[tuple[dict[str, Any] | None, str | None]]  # a row or none, and the fingerprint of its codes


def _files(source: Path) -> "list[tuple[Path, RecordedFile | None]]":
    """Returns the files of a folder that may hold documents; of an output, those that its records name."""
    if not source.is_dir():
        return [(source, _record_of(source) if source.suffix == ".tar" else None)]
    outputs = {path.parent.parent for path in source.rglob("__run__/run.json")}
    files: list[tuple[Path, RecordedFile | None]] = [
        (path, None) for path in source.rglob("*.parquet") if outputs.isdisjoint(path.parents)
    ]
    if outputs:
        from dyntok.batch.manifest import recorded_files

        files += [(output / file.name, file) for output in outputs for file in recorded_files(output)]
    return sorted(files, key=lambda pair: pair[0])


def _record_of(tar: Path) -> "RecordedFile":
    from dyntok.batch.manifest import recorded_files

    found = next((file for file in recorded_files(tar.parent) if file.name == tar.name), None)
    if found is None:
        raise DataError(f"{tar} is not named by a record of the run in {tar.parent}, so it is no part of the output")
    return found


def _rows(path: Path, recorded: "RecordedFile | None", text: str | None, positions: bool | None) -> _Rows:
    if recorded is not None:
        recorded.check(str(path.parent), size=path.stat().st_size if path.exists() else None)
        if path.suffix == ".tar":
            return _tar_rows(path, recorded, text)
    return _parquet_rows(path, text, positions)


def _parquet_rows(path: Path, text: str | None, positions: bool | None) -> _Rows:
    """Yields the rows of a file, first of all None where the file has the columns of documents."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of("pyarrow", "transformers") from error

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if not {"key", "codes"} <= set(names):
                return
            fingerprint = _fingerprint(file.schema_arrow.metadata or {})
            yield None, fingerprint
            wanted = ["key", "codes", *(["positions"] if positions else []), *([] if text is None else [text])]
            if missing := [name for name in wanted if name not in names]:
                raise DataError(
                    f"{path} has no column {', '.join(missing)}, only {', '.join(names)}; "
                    "text= names the column of texts"
                )
            places = [name for name in ("positions", "grid") if name in names and positions is not False]
            for batch in file.iter_batches(batch_size=1024, columns=list(dict.fromkeys([*wanted, *places]))):
                for row in batch.to_pylist():
                    yield row, fingerprint
    except (OSError, pyarrow.ArrowException) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"can't read {path}: {error}; expected Parquet with the columns key and codes") from error


def _tar_rows(path: Path, recorded: "RecordedFile", text: str | None) -> _Rows:
    from dyntok.batch.manifest import read_description
    from dyntok.batch.shard_reader import read_block
    from dyntok.batch.storage import Output

    output = Output(path.parent, {})
    fingerprint = read_description(output)["tokenizer"]["fingerprint"]
    for row in read_block(output, recorded, 0, [] if text is None else [text]):
        (image,) = row.images
        codes, positions = image.codes.tolist(), image.positions.tolist()
        columns = {"key": row.key, "codes": codes, "positions": positions, "grid": list(image.grid)}
        yield {**columns, **row.columns}, fingerprint


def _fingerprint(metadata: Mapping[bytes, bytes]) -> str | None:
    """Returns the tokenizer's fingerprint in the metadata of Parquet, None where it is not there."""
    try:
        return json.loads(metadata[b"dyntok"])["tokenizer"]["fingerprint"]
    except (KeyError, TypeError, ValueError):
        return None


def _documents(
    row: dict[str, Any], text: str | None, draw: str, path: Path, fingerprint: str | None
) -> Iterator[Document]:
    codes, key = row["codes"] or [], str(row["key"])
    words = None if text is None else parse_texts(row[text], f"{path}: {text} of {key}")
    nested = any(code is None or isinstance(code, list) for code in codes)
    images = _images(row, nested) if codes else []
    if nested and isinstance(words, list) and len(words) == len(codes):  # interleaved: a text or an image at each place
        texts = list(words)
    else:
        images, texts = [*images, None], [None] * len(images) + [draw_text(words, key, draw)]
    segments: list[str | ImageCodes] = []
    for words, image in zip(texts, images, strict=True):
        if words is not None and not isinstance(words, str):
            raise DataError(f"{path}: {text} of {key} is {type(words).__name__}, expected text or a list of texts")
        segments += [part for part in (image, words) if part]
    if segments:
        yield Document(key, tuple(segments), fingerprint)


def _images(row: dict[str, Any], nested: bool) -> list[ImageCodes | None]:
    """Returns the images of a row, None where there is none at a place of an interleaved document."""
    columns = [row.get(name) for name in ("codes", "positions", "grid")]
    rows = [column if nested else [column] for column in columns]
    codes, positions, grids = (values or [None] * len(rows[0] or []) for values in rows)
    if not len(codes) == len(positions) == len(grids):
        raise DataError(
            f"row {row.get('key')!r} has {len(codes)} lists of codes, {len(positions)} of positions and {len(grids)} "
            "grids, expected equally many"
        )
    return [
        ImageCodes(own, places, tuple(grid) if grid else None) if own else None
        for own, places, grid in zip(codes, positions, grids, strict=True)
    ]


def in_drawn_order(document: Document, *, epoch: int = 0, seed: int = 0) -> Document:
    """Returns an image and its text in either order with equal chances, as LaVIT trains.

    Other documents stay as they are. Image first teaches to describe, text first to paint.
    The draw depends on the key, the epoch and the seed.
    """
    require_type("document", document, Document, "a Document")
    kinds = [isinstance(segment, str) for segment in document.segments]
    if sorted(kinds) != [False, True] or share(f"{seed} {epoch} order {document.key}") < 0.5:
        return document
    return replace(document, segments=document.segments[::-1])
