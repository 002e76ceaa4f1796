"""Photographs for training and evaluation: folders of images and webdataset tars, as one indexed data set.

Order and augmentation are functions of a seed and a step alone, so that a resumed run sees what an undisturbed one would.
Not here: decoding of single images (`dyntok/image.py`).
"""

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dyntok.config import ImageConfig
from dyntok.errors import DataError
from dyntok.image import load_image, to_pixels

_IMAGE_SUFFIXES = frozenset(".jpg .jpeg .png .webp .gif .bmp .tif .tiff .avif".split())
HOLDOUT = 20  # one in so many images is for validation


def is_validation(key: str) -> bool:
    """The same split everywhere and for ever: by a hash of the key."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % HOLDOUT == 0


@dataclass(frozen=True)
class Sample:
    """Where one image lies: a file, or a span of bytes in a tar."""

    key: str
    path: str
    offset: int = 0
    size: int | None = None
    label: str | None = None

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read() if self.size is None else file.read(self.size)


def find_samples(sources: Sequence[str | Path], split: str = "all") -> list[Sample]:
    """All images below folders (the parent folder's name is the label) and in webdataset tars (`KEY.cls.txt` or `KEY.cls` is the label).

    split: "all", "train" or "validation". A source may be a folder of tars, too. Raises `DataError` where there is nothing.
    """
    samples = [sample for source in sources for sample in _walk(Path(source))]
    if split != "all":
        samples = [sample for sample in samples if is_validation(sample.key) == (split == "validation")]
    if not samples:
        raise DataError(f"no images (split {split!r}) in {', '.join(map(str, sources))}; expected folders of images or webdataset tars")
    return samples


def _walk(source: Path) -> Iterator[Sample]:
    if not source.exists():
        raise DataError(f"{source} does not exist; expected a folder of images, an image, or a webdataset tar")
    if source.is_file():
        if source.suffix == ".tar":
            yield from _tar_samples(source)
        else:
            yield Sample(source.stem, str(source))
        return
    for path in sorted(source.rglob("*")):
        if path.suffix == ".tar":
            yield from _tar_samples(path)
        elif path.suffix.lower() in _IMAGE_SUFFIXES and path.is_file():
            label = path.parent.name if path.parent != source else None
            yield Sample(str(path.relative_to(source).with_suffix("")), str(path), label=label)


def _tar_samples(path: Path) -> Iterator[Sample]:
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not member.isfile():
                    continue
                if f".{extension.lower()}" in _IMAGE_SUFFIXES:
                    images[key] = member
                elif extension in ("cls", "cls.txt") and member.size < 1024:
                    labels[key] = tar.extractfile(member).read().decode(errors="replace").strip()
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"can't read {path}: {error}; expected an uncompressed webdataset tar") from error
    for key, member in images.items():
        yield Sample(key, str(path), member.offset_data, member.size, labels.get(key))


class TrainingImages(torch.utils.data.Dataset):
    """Random crops of `samples`, batch by batch: item i is batch number i, float32 [batch_size, 3, S, S].

    Each pass over the data is a new permutation. A crop has a side of `min_crop` to 1 times the short side (its aspect ratio kept), and is
    mirrored half of the time. Rank r of world w draws the places r, r + w, ... of every global batch.
    """

    def __init__(
        self, samples: Sequence[Sample], config: ImageConfig, batch_size: int, *, seed: int, min_crop: float, rank: int = 0, world: int = 1
    ) -> None:
        self.samples, self.config, self.batch_size = samples, config, batch_size
        self.seed, self.min_crop, self.rank, self.world = seed, min_crop, rank, world
        self._order: tuple[int, Tensor] | None = None

    def __getitem__(self, step: int) -> Tensor:
        first = step * self.batch_size * self.world
        return torch.stack([self._item(first + i) for i in range(self.rank, self.batch_size * self.world, self.world)])

    def _item(self, place: int) -> Tensor:
        epoch, index = divmod(place, len(self.samples))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(len(self.samples), generator=generator)
        image = load_image(self.samples[int(self._order[1][index])].read())
        draw = torch.rand(4, generator=torch.Generator().manual_seed(self.seed * 2_000_003 + place)).tolist()
        side = min(image.size) * (self.min_crop + (1 - self.min_crop) * draw[0])
        left, top = draw[1] * (image.width - side), draw[2] * (image.height - side)
        size = (self.config.img_size,) * 2
        crop = image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        if draw[3] < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_pixels(crop, self.config)


def available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
