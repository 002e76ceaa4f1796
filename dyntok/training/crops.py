"""How many pictures each batch has, of which size, and the random crop of each; all by a seed and numbers alone.

Not here: where pictures come from (`data.py`, `stream.py`), how grids are drawn (`grids.py`).
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dyntok.config import ImageConfig
from dyntok.fitting import target_size
from dyntok.image import normalized
from dyntok.training.grids import Grids


@dataclass
class Crops:
    """Batches of random crops, for rank `rank` of `world`.

    Without `grids`, a batch has `batch_size` pictures of the tokenizer's own size. With `grids`, each batch has a grid
    of its own, and as many pictures as make up the patches of `batch_size` pictures of the tokenizer's own size.

    A crop has the batch's aspect ratio and is `min_crop` to 1 times as large as the largest one. Half of the crops are
    mirrored.
    """

    config: ImageConfig
    batch_size: int
    seed: int
    min_crop: float
    rank: int = 0
    world: int = 1
    grids: Grids | None = None
    _firsts: list[int] = field(default_factory=lambda: [0])  # with grids: `first` of every batch so far

    def size(self, number: int) -> tuple[int, int]:
        """Returns (height, width) in pixels of the pictures of a batch."""
        if self.grids is None:
            return target_size(self.config)
        rows, columns = self.grids.grid(self.seed, number)
        return rows * self._patch_size, columns * self._patch_size

    def count(self, number: int) -> int:
        """Returns how many pictures a batch has on each rank."""
        if self.grids is None:
            return self.batch_size
        height, width = target_size(self.config)
        usual = height // self._patch_size * (width // self._patch_size)
        return max(1, round(self.batch_size * usual / self.grids.patches(self.seed, number)))

    def places(self, number: int) -> range:
        """Returns this rank's pictures of a batch, by their numbers among all pictures of the run."""
        first = self._first(number)
        return range(first + self.rank, first + self.count(number) * self.world, self.world)

    def crop(self, image: Image.Image, place: int, size: tuple[int, int]) -> Tensor:
        """Returns a picture's crop at (height, width): normalized, float32 [3, H, W]."""
        height, width = size
        generator = torch.Generator("cpu").manual_seed(self.seed * 2_000_003 + place)
        draw = torch.rand(4, generator=generator, device="cpu").tolist()
        share = self.min_crop + (1 - self.min_crop) * draw[0]
        crop_width = min(image.width, image.height * width / height) * share
        crop_height = crop_width * height / width
        left, top = draw[1] * (image.width - crop_width), draw[2] * (image.height - crop_height)
        box = (left, top, min(left + crop_width, image.width), min(top + crop_height, image.height))
        crop = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
        if draw[3] < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return normalized(np.asarray(crop), self.config)

    @property
    def _patch_size(self) -> int:
        assert self.config.patch_size is not None  # a recipe with grids has a tokenizer that takes any grid
        return self.config.patch_size

    def _first(self, number: int) -> int:
        if self.grids is None:
            return number * self.batch_size * self.world
        while len(self._firsts) <= number:
            self._firsts.append(self._firsts[-1] + self.count(len(self._firsts) - 1) * self.world)
        return self._firsts[number]
