"""Photographs for training and evaluation: folders of images and webdataset tars, as one indexed data set.

Order and augmentation are functions of a seed and a step alone, so that a resumed run sees what an undisturbed one would.
Not here: decoding of single images (`dyntok/image.py`).
"""

import hashlib
import logging
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dyntok.config import ImageConfig
from dyntok.errors import DataError, ImageError
from dyntok.image import IMAGE_SUFFIXES, load_image, to_pixels

HOLDOUT = 20  # one in so many images is for validation

_GIVE_UP = 100  # unreadable images in a row: not the images are broken then, but the disk or the path
_log = logging.getLogger(__name__)


def is_validation(key: str) -> bool:
    """The same split everywhere and for ever: by a hash of the key."""
    return int(hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest(), 16) % HOLDOUT == 0


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
        raise DataError(
            f"no images (split {split!r}) in {', '.join(map(str, sources))}; expected folders of images or webdataset tars"
        )
    return samples


def digest_of(samples: Sequence[Sample]) -> str:
    """16 hexadecimal digits over all keys in their order: equal where training draws the same images."""
    return hashlib.sha256(b"\0".join(sample.key.encode(errors="surrogateescape") for sample in samples)).hexdigest()[
        :16
    ]


def _walk(source: Path) -> Iterator[Sample]:
    try:
        if source.is_file():
            yield from _file_samples(source, source.parent)
            return
        if not source.is_dir():
            raise DataError(f"{source} does not exist; expected a folder of images, an image, or a webdataset tar")
        paths = sorted(source.rglob("*"))
    except OSError as error:
        raise DataError(f"can't read {source}: {error.strerror or error}") from error
    for path in paths:
        if (path.suffix == ".tar" or path.suffix.lower() in IMAGE_SUFFIXES) and path.is_file():
            yield from _file_samples(path, source)


def _file_samples(path: Path, root: Path) -> Iterator[Sample]:
    if path.suffix == ".tar":
        yield from _tar_samples(path)
    elif path.suffix.lower() not in IMAGE_SUFFIXES:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(
            f"{path} is no image and no tar; expected a name that ends in {suffixes}, or .tar (uncompressed)"
        )
    else:
        label = path.parent.name if path.parent != root else None
        yield Sample(path.relative_to(root).with_suffix("").as_posix(), str(path), label=label)


def _tar_samples(path: Path) -> Iterator[Sample]:
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not member.isreg() or member.issparse():
                    continue
                if f".{extension.lower()}" in IMAGE_SUFFIXES:
                    images[key] = member
                elif extension in ("cls", "cls.txt") and member.size < 1024:
                    labels[key] = tar.extractfile(member).read().decode(errors="replace").strip()
            # a damaged header reads as the end
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"damaged at byte {tar.offset:,}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"can't read {path}: {error}; expected an uncompressed webdataset tar, intact") from error
    for key, member in images.items():
        yield Sample(key, str(path), member.offset_data, member.size, labels.get(key))


class TrainingImages(torch.utils.data.Dataset):
    """Random crops of `samples`, batch by batch: item i is batch number i, float32 [batch_size, 3, S, S].

    Each pass over the data is a new permutation. A crop has a side of `min_crop` to 1 times the short side (its aspect ratio kept), and is
    mirrored half of the time. Rank r of world w draws the places r, r + w, ... of every global batch. An image that can't be read is
    reported once, and the next one of the permutation takes its place; `unreadable` counts.

    Where nothing can be read, `batch` raises `DataError`, and an item is that error: a DataLoader's worker process would add a page of
    traceback to what it raises.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        config: ImageConfig,
        batch_size: int,
        *,
        seed: int,
        min_crop: float,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.samples, self.config, self.batch_size = samples, config, batch_size
        self.seed, self.min_crop, self.rank, self.world = seed, min_crop, rank, world
        self._order: tuple[int, Tensor] | None = None
        self._failed = torch.zeros(
            len(samples), dtype=torch.bool
        ).share_memory_()  # by index; shared with the loader's worker processes

    @property
    def unreadable(self) -> list[int]:
        """Indices of the samples that were met so far and could not be read."""
        return self._failed.nonzero()[:, 0].tolist()

    def __getitem__(self, step: int) -> Tensor | DataError:
        try:
            return self.batch(step)
        except DataError as error:
            return error

    def batch(self, step: int) -> Tensor:
        first = step * self.batch_size * self.world
        return torch.stack([self._item(first + i) for i in range(self.rank, self.batch_size * self.world, self.world)])

    def _item(self, place: int) -> Tensor:
        image = self._image(*divmod(place, len(self.samples)))
        draw = torch.rand(4, generator=torch.Generator().manual_seed(self.seed * 2_000_003 + place)).tolist()
        side = min(image.size) * (self.min_crop + (1 - self.min_crop) * draw[0])
        left, top = draw[1] * (image.width - side), draw[2] * (image.height - side)
        size = (self.config.img_size,) * 2
        crop = image.resize(
            size,
            Image.Resampling.BICUBIC,
            box=(left, top, min(left + side, image.width), min(top + side, image.height)),
        )
        if draw[3] < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_pixels(crop, self.config)

    def _image(self, epoch: int, place: int) -> Image.Image:
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(len(self.samples), generator=generator)
        tries = min(_GIVE_UP, len(self.samples))
        for i in range(tries):
            index = int(self._order[1][(place + i) % len(self.samples)])
            sample = self.samples[index]
            try:
                return load_image(sample.read())
            except (ImageError, OSError) as error:
                if not self._failed[index]:
                    self._failed[index] = True
                    _log.warning(
                        "left out %s of %s, unreadable image number %d: %s",
                        sample.key,
                        sample.path,
                        len(self.unreadable),
                        error,
                    )
                last = error
        raise DataError(f"{tries} images in a row can't be read, the last one {sample.key} of {sample.path}: {last}")
