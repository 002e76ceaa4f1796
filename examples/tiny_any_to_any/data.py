"""Captioned photographs as codes in Parquet, the text tokenizer trained on their captions, and the split."""

import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

import dyntok
from dyntok.image import load_image
from dyntok.llm import Document, read_documents
from dyntok.training.sources import is_validation

CODES, MIRRORED = "codes.parquet", "-mirrored"
TEXT_TOKENS, MAX_TOKENS = 2048, 64


def photographs(source: Path) -> Iterator[tuple[str, bytes, list[str]]]:
    """(key, JPEG, captions) of webdataset tars with KEY.jpg and KEY.captions.json."""
    for path in sorted(source.glob("*.tar")):
        with tarfile.open(path) as tar:
            images: dict[str, bytes] = {}
            captions: dict[str, list[str]] = {}
            for member in tar:
                key, _, extension = member.name.partition(".")
                if extension == "jpg":
                    images[key] = tar.extractfile(member).read()
                elif extension == "captions.json":
                    captions[key] = [
                        text.replace(" .", ".").replace(" ,", ",").strip()
                        for text in json.load(tar.extractfile(member))
                    ]
                if key in images and key in captions:
                    yield key, images.pop(key), captions.pop(key)


def prepare(source: Path, folder: Path) -> Path:
    """Writes what `dyntok batch` would write. Training photographs are encoded again, mirrored and cropped."""
    path = folder / CODES
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = dyntok.load()
    rows: dict[str, list] = {"key": [], "codes": [], "positions": [], "grid": [], "captions": []}
    for key, image, captions in tqdm(photographs(source), desc="encode", unit=" photographs", disable=None):
        photo = load_image(image)
        pictures = {key: photo}
        if not is_validation(key):
            pictures[f"{key}{MIRRORED}"] = _mirrored(photo, key)
        for name, picture in pictures.items():
            encoding = tokenizer.encode(picture, max_tokens=MAX_TOKENS, places="map")
            rows["key"].append(name)
            rows["codes"].append(encoding.codes[0].tolist())
            rows["positions"].append(encoding.positions[0].tolist())
            rows["grid"].append(encoding.grids[0].tolist())
            rows["captions"].append(captions)
    types = {
        "key": pa.string(),
        "codes": pa.list_(pa.uint16()),
        "positions": pa.list_(pa.uint16()),
        "grid": pa.list_(pa.uint16(), 2),
        "captions": pa.list_(pa.string()),
    }
    table = pa.table({name: pa.array(values, types[name]) for name, values in rows.items()})
    description = json.dumps({"tokenizer": {"fingerprint": tokenizer.fingerprint}})
    pq.write_table(table.replace_schema_metadata({"dyntok": description}), path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)
    return path


def _mirrored(photo: Image.Image, key: str) -> Image.Image:
    """Turned left to right, and a random part of it: sides of 0.8 to 1 of the photograph's."""
    draw = random.Random(key)
    width, height = (round(side * draw.uniform(0.8, 1)) for side in photo.size)
    left, top = draw.randint(0, photo.width - width), draw.randint(0, photo.height - height)
    return ImageOps.mirror(photo).crop((left, top, left + width, top + height))


def in_split(key: str, split: str) -> bool:
    """Whether it belongs to "train" or "validation"."""
    return is_validation(key.removesuffix(MIRRORED)) == (split == "validation")


def documents(path: Path, split: str, epoch: int = 0) -> Iterator[Document]:
    """Those of "train" or "validation", each with the caption that is drawn for this epoch."""
    for document in read_documents(path, text="captions", epoch=epoch):
        if in_split(document.key, split):
            yield document


def captions(path: Path, split: str) -> dict[str, list[str]]:
    """All captions by key."""
    rows = pq.read_table(path, columns=["key", "captions"]).to_pylist()
    return {
        row["key"]: row["captions"] for row in rows if in_split(row["key"], split) and not row["key"].endswith(MIRRORED)
    }


def text_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `TEXT_TOKENS` entries, begin, end and padding included."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=TEXT_TOKENS, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
