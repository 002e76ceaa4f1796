"""Encodes samples in batches, for an evaluation: pixels, pictures, codes and code vectors side by side.

Not here: measuring them (`evaluate.py`).
"""

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
from dyntok.image import to_image, to_pixels
from dyntok.policy import KeepPolicy
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.training.masks import even_mask, random_mask, seed_of
from dyntok.training.sources import ImageSample

Selection = Literal["learned", "random", "even"]
Failure = tuple[str, str]  # a key, and the reason


@dataclass
class EncodedBatch:
    """The readable images of a batch and their codes, on the CPU."""

    samples: list[ImageSample]
    pixels: Tensor  # [B, 3, S, S], normalized
    originals: Tensor  # [B, 3, S, S] in [0, 1], rounded to 8 bits
    images: list[Image.Image]  # the same as pictures
    encoding: Encoding
    vectors: Tensor  # [T, C]


@dataclass
class SampleEncoder:
    """Encodes samples batch by batch.

    selection: "random" and "even" replace the patches that `policy` keeps by the same number of others (`masks.py`).
    progress: called after each batch with the number of images done so far, of all calls, and `total`.
    """

    tokenizer: DynamicVisualTokenizer
    policy: KeepPolicy
    selection: Selection
    batch_size: int
    total: int
    progress: Callable[[int, int], None] | None = None
    done: int = 0

    def batches(self, samples: Sequence[ImageSample], failed: list[Failure]) -> Iterator[EncodedBatch]:
        """Yields the samples in order. Samples that can't be read are appended to `failed`."""
        image = self.tokenizer.config.image
        for part in batched(samples, self.batch_size):
            readable = list(self._read(part, failed))
            if readable:
                kept, tensors = zip(*readable, strict=True)
                pixels = torch.stack(tensors)
                encoding = self._encode(kept, pixels).to("cpu")
                vectors = self.tokenizer.codebook.lookup(encoding.packed_codes.to(self.tokenizer.device)).cpu()
                images = [to_image(row, image) for row in pixels]
                yield EncodedBatch(list(kept), pixels, to_visible(pixels, image), images, encoding, vectors)
            self.done += len(part)
            if self.progress is not None:
                self.progress(self.done, self.total)

    def _read(self, samples: Sequence[ImageSample], failed: list[Failure]) -> Iterator[tuple[ImageSample, Tensor]]:
        for sample in samples:
            try:
                yield sample, to_pixels(sample.read(), self.tokenizer.config.image)
            except (ImageError, OSError) as error:
                failed.append((sample.key, str(error)))

    def _encode(self, samples: Sequence[ImageSample], pixels: Tensor) -> Encoding:
        if self.policy.sample is not None:
            pairs = zip(samples, pixels, strict=True)
            encoding = Encoding.cat([self._sample(sample, row[None]) for sample, row in pairs])
        else:
            encoding = self.tokenizer.encode_tensor(pixels, policy=self.policy)
        if self.selection == "learned":
            return encoding
        masks = [
            self._mask(count, sample.key) for count, sample in zip(encoding.lengths.tolist(), samples, strict=True)
        ]
        return self.tokenizer.encode_tensor(pixels, keep_mask=torch.stack(masks))

    def _mask(self, count: int, key: str) -> Tensor:
        grid = self.tokenizer.grid
        return even_mask(count, grid) if self.selection == "even" else random_mask(count, grid, key)

    def _sample(self, sample: ImageSample, pixels: Tensor) -> Encoding:
        # seeded by the key: an image's place among the others must not matter
        seed = seed_of(sample.key, f"sample/{self.policy.seed}")
        generator = torch.Generator().manual_seed(seed)
        return self.tokenizer.encode_tensor(pixels, sample=generator, max_tokens=self.policy.max_tokens)


def to_visible(pixels: Tensor, config: ImageConfig) -> Tensor:
    """Normalized pixels [B, 3, S, S] -> the same as a user sees them: in [0, 1], rounded to 8 bits."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    return (pixels.float() * std + mean).clamp(0, 1).mul(255).round() / 255
