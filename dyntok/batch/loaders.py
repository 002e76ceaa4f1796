"""Finished codes for other loaders: a memory map of ids, LitData's optimized tokens, Megatron-Energon's metadata.

Each takes an output folder of `dyntok batch`. Megatron's own files are a format of the run itself (`formats.py`).
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dyntok.addresses import StorageOptions, wrap_storage_errors
from dyntok.batch.dataset import CodesDataset
from dyntok.batch.manifest import recorded_files
from dyntok.errors import BatchError, CodeError, ConfigError, DyntokError, FingerprintError, MissingDependencyError
from dyntok.structure import require_path, require_type
from dyntok.texts import draw_text, parse_texts
from dyntok.vocab import VisualVocab

_LITDATA_CHUNK = "64MB"


def document_ids(
    folder: str,
    vocab: VisualVocab,
    *,
    text: str | None = None,
    encode: Callable[[str], list[int]] | None = None,
    eod: int | None = None,
    storage: StorageOptions | None = None,
) -> Iterator[np.ndarray]:
    """Yields the ids of every row of an output folder, int64: its images, its text, and `eod`.

    text: an extra column whose text follows the images; of a list of texts one is drawn by the key. `encode` gives the
        ids of that text, without special tokens
    eod: an id that ends every document; None: none

    Raises `ConfigError` where `text` and `encode` do not go together, `FingerprintError` where the vocabulary is
    another tokenizer's, `DataError` on what is no such folder.
    """
    require_type("vocab", vocab, VisualVocab, "a VisualVocab")
    if (text is None) != (encode is None):
        raise ConfigError("text= names the column and encode= makes ids of it; give both, or neither")
    if eod is not None and not (type(eod) is int and 0 <= eod < 2**32):
        raise ConfigError(f"eod is {eod!r}, expected an id of the LLM's vocabulary")
    data = CodesDataset(folder, columns=[text] if text else [], storage=storage)
    if vocab.fingerprint not in (None, data.fingerprint):
        raise FingerprintError(f"the vocabulary is that of {vocab.fingerprint}, the codes come from {data.fingerprint}")
    for batch in data:
        images = vocab.to_ids(batch.encoding)
        texts = batch.columns[text] if text else [None] * len(batch.keys)
        rows: list[list[torch.Tensor]] = [[] for _ in batch.keys]
        for row, ids in zip(batch.row_of_image, images, strict=True):
            rows[row].append(ids)
        for row, written, key in zip(rows, texts, batch.keys, strict=True):
            words = draw_text(parse_texts(written, f"{text} of {key!r}"), key)
            if words is not None and encode is not None:
                # a caption that spells visual tokens must not open an image
                row.append(torch.tensor([id for id in encode(words) if not vocab.is_visual(id)], dtype=torch.long))
            if row and eod is not None:
                row.append(torch.tensor([eod]))
            if sum(map(len, row)):
                yield torch.cat(row).numpy()


def write_memmap(folder: str, path: str | Path, vocab: VisualVocab, **options: Any) -> int:
    """Writes all ids one after another into one file, as small trainers map it; returns their number.

    The ids are uint16 or uint32, whichever is the narrowest (`vocab.dtype`). A JSON file beside it says which, and
    where documents begin. options and errors are those of `document_ids`; `BatchError` where a file can't be written.

    >>> write_memmap("codes/", "train.bin", vocab, eod=50256)
    >>> ids = np.memmap("train.bin", dtype=np.uint16, mode="r")
    """
    require_path("the file to write", path)
    path, starts, count = Path(path), [], 0
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            for ids in document_ids(folder, vocab, **options):
                file.write(_narrowed(ids, vocab.dtype).tobytes())
                starts.append(count)
                count += len(ids)
        facts = {"dtype": vocab.dtype, "ids": count, "documents": starts, "fingerprint": vocab.fingerprint}
        path.with_suffix(".json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        if isinstance(error, DyntokError):
            raise
        raise BatchError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return count


def write_litdata(folder: str, output: str | Path, vocab: VisualVocab, **options: Any) -> int:
    """Writes LitData's optimized tokens into a new folder; returns the number of documents.

    >>> write_litdata("codes/", "tokens/", vocab, eod=2)
    >>> data = StreamingDataset("tokens/", item_loader=TokensLoader(block_size=2049), shuffle=True)

    options and errors are those of `document_ids`; `BatchError` where the folder holds something already,
    `MissingDependencyError` without litdata.
    """
    try:
        from litdata.streaming.item_loader import TokensLoader
        from litdata.streaming.writer import BinaryWriter
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of("litdata", "litdata") from error

    require_path("the folder to write", output)
    require_type("vocab", vocab, VisualVocab, "a VisualVocab")
    output, number = Path(output), 0
    with wrap_storage_errors("write", str(output)):
        if output.exists() and any(output.iterdir()):
            raise BatchError(f"{output} is not empty; name a new folder")
        output.mkdir(parents=True, exist_ok=True)
    writer = BinaryWriter(str(output), chunk_bytes=_LITDATA_CHUNK, item_loader=TokensLoader())
    dtype = "uint16" if vocab.dtype == "uint16" else "int32"  # PyTorch computes with these
    for ids in document_ids(folder, vocab, **options):
        writer[number] = torch.from_numpy(_narrowed(ids, dtype))
        number += 1
    writer.done()
    writer.merge()
    return number


def _narrowed(ids: np.ndarray, dtype: str) -> np.ndarray:
    """Returns ids in the type that their file has for this vocabulary. Raises `CodeError` where one does not fit."""
    if ids.max() > np.iinfo(dtype).max:
        raise CodeError(
            f"id {ids.max()} of a text, or of eod, does not fit {dtype}, the type of ids in the file; "
            "expected a vocabulary that begins after all ids of texts"
        )
    return ids.astype(dtype)


def prepare_energon(folder: str | Path, *, workers: int = 1) -> int:
    """Adds Megatron-Energon's metadata (`.nv-meta`) to a local folder of `dyntok batch --format webdataset`.

    Returns the number of samples. Energon then reads the folder as crude samples with `codes.npy`, `positions.npy`,
    `json` and texts; all of them are in the split "train".

    Raises `DataError` where the folder is no output, `BatchError` where it holds no tars, `MissingDependencyError`
    without megatron-energon.
    """
    try:
        from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of("megatron-energon", "energon") from error

    require_path("folder", folder)
    folder = Path(folder)
    tars = [file.name for file in recorded_files(folder) if file.name.endswith(".tar")]
    if not tars:
        raise BatchError(f"{folder} has no tars; dyntok batch --format webdataset writes them")
    WebdatasetPreparator.prepare_dataset(
        folder, tars, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=workers
    )
    meta = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    text = "".join(f"{name}: {value}\n" for name, value in meta.items())
    (folder / ".nv-meta" / "dataset.yaml").write_text(text, encoding="utf-8")
    facts = json.loads((folder / ".nv-meta" / ".info.json").read_text(encoding="utf-8"))
    return sum(facts["shard_counts"].values())
