"""Encodes samples in batches, for an evaluation: pixels, pictures, codes and code vectors side by side.

Not here: measuring them (`evaluate.py`).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from dyntok.chunks import batched
from dyntok.config import ImageConfig
from dyntok.encoding import Encoding
from dyntok.errors import ImageError
from dyntok.image import DEFAULT_MAX_PIXELS, to_image, to_pixels
from dyntok.policy import KeepPolicy
from dyntok.target import visible
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.training.masks import even_mask, random_mask, seed_of
from dyntok.training.sources import ImageSample

Selection = Literal["learned", "random", "even"]
Failure = tuple[str, str]  # a key, and the reason


@dataclass
class EncodedBatch:
    """The readable images of a batch that have one shape, and their codes, on the CPU."""

    samples: list[ImageSample]
    pixels: Tensor  # [B, 3, H, W], normalized
    originals: Tensor  # [B, 3, H, W] in [0, 1], rounded to 8 bits
    images: list[Image.Image]  # the same as pictures
    encoding: Encoding
    vectors: Tensor  # [T, C]


@dataclass
class SampleEncoder:
    """Encodes samples batch by batch.

    image: how pictures are prepared, see `DynamicVisualTokenizer.image_config`.
    selection: "random" and "even" replace the patches that `policy` keeps by the same number of others (`masks.py`).
    refine: rounds that try other codes, as in `encode`.
    progress: called after each batch with the number of images done so far, of all calls, and `total`.
    """

    tokenizer: DynamicVisualTokenizer
    policy: KeepPolicy
    selection: Selection
    batch_size: int
    total: int
    image: ImageConfig
    progress: Callable[[int, int], None] | None = None
    max_pixels: int = DEFAULT_MAX_PIXELS
    refine: int = 0
    done: int = 0

    def batches(self, samples: Sequence[ImageSample], failed: list[Failure]) -> Iterator[EncodedBatch]:
        """Yields the samples in order, those of one shape together. Unreadable ones are appended to `failed`."""
        for part in batched(samples, self.batch_size):
            shapes: dict[torch.Size, list[tuple[ImageSample, Tensor]]] = defaultdict(list)
            for sample, pixels in self._read(part, failed):
                shapes[pixels.shape].append((sample, pixels))
            for rows in shapes.values():
                yield self._encoded_batch([sample for sample, _ in rows], torch.stack([row for _, row in rows]))
            self.done += len(part)
            if self.progress is not None:
                self.progress(self.done, self.total)

    def _encoded_batch(self, samples: list[ImageSample], pixels: Tensor) -> EncodedBatch:
        encoding = self._encode(samples, pixels).to("cpu")
        vectors = self.tokenizer.codebook.lookup(encoding.packed_codes.to(self.tokenizer.device)).cpu()
        images = [to_image(row, self.image) for row in pixels]
        return EncodedBatch(samples, pixels, to_visible(pixels, self.image), images, encoding, vectors)

    def _read(self, samples: Sequence[ImageSample], failed: list[Failure]) -> Iterator[tuple[ImageSample, Tensor]]:
        for sample in samples:
            try:
                yield sample, to_pixels(sample.read(), self.image, max_pixels=self.max_pixels)
            except (ImageError, OSError) as error:
                failed.append((sample.key, str(error)))

    def _encode(self, samples: Sequence[ImageSample], pixels: Tensor) -> Encoding:
        if self.policy.sample is not None:
            pairs = zip(samples, pixels, strict=True)
            encoding = Encoding.cat([self._sample(sample, row[None]) for sample, row in pairs])
        else:
            encoding = self.tokenizer.encode_tensor(pixels, policy=self.policy, refine=self._first_refine)
        if self.selection == "learned":
            return encoding
        masks = [
            self._mask(count, sample.key, self.tokenizer.backbone.grid_of(pixels))
            for count, sample in zip(encoding.lengths.tolist(), samples, strict=True)
        ]
        return self.tokenizer.encode_tensor(pixels, keep_mask=torch.stack(masks), refine=self.refine)

    @property
    def _first_refine(self) -> int:
        """Returns 0 where the first codes only say how many patches to keep."""
        return self.refine if self.selection == "learned" else 0

    def _mask(self, count: int, key: str, grid: tuple[int, int]) -> Tensor:
        return even_mask(count, grid) if self.selection == "even" else random_mask(count, grid, key)

    def _sample(self, sample: ImageSample, pixels: Tensor) -> Encoding:
        # seeded by the key: an image's place among the others must not matter
        seed = seed_of(sample.key, f"sample/{self.policy.seed}")
        generator = torch.Generator().manual_seed(seed)
        limit = self.policy.max_tokens
        return self.tokenizer.encode_tensor(pixels, sample=generator, max_tokens=limit, refine=self._first_refine)


def to_visible(pixels: Tensor, config: ImageConfig) -> Tensor:
    """Returns normalized pixels [B, 3, H, W] as a user sees them: in [0, 1], rounded to 8 bits."""
    return visible(pixels, config).mul(255).round() / 255
