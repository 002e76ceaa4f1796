"""Codes for the `map` of other libraries: Hugging Face `datasets`, Ray Data, plain dicts of lists."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dyntok.batch.engines.stages import Picture, tokens_of
from dyntok.batch.options import BatchOptions
from dyntok.errors import DataError, ImageError
from dyntok.image import DEFAULT_MAX_PIXELS, to_array
from dyntok.loading import load
from dyntok.tokenizer import DynamicVisualTokenizer

_IMPORTED_IN = os.getpid()


class TokenizeColumn:
    """A batch with a column of images becomes a batch with codes, positions, grid, width, height and error.

    >>> dataset.map(dyntok.batch.TokenizeColumn(), batched=True, remove_columns="image")  # Hugging Face datasets
    >>> ray.data.read_parquet(...).map_batches(dyntok.batch.TokenizeColumn, concurrency=4)  # Ray Data

    image: the column; PIL images, uint8 arrays, bytes, paths, or dicts with bytes. The other columns stay, but for Ray the image goes.
    model, device, other options: as in `dyntok.load` and `encode`. The tokenizer is loaded when it is first needed, in every process anew.

    A bad image has null codes, and a reason in the column `error`, which is empty otherwise. Raises `DataError` where the image column
    is missing.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        image: str = "image",
        budget: int | float | None = None,
        threshold: float | None = None,
        max_tokens: int | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        device: str = "cpu",
    ) -> None:
        self.model, self.image, self.device = model, image, device
        self.options = BatchOptions(budget=budget, threshold=threshold, max_tokens=max_tokens, max_pixels=max_pixels)
        self._tokenizer: DynamicVisualTokenizer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_tokenizer": None}

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        if self.image not in batch:
            raise DataError(
                f"the batch has no column {self.image!r}; it has {', '.join(batch)}; image= names the one with images"
            )
        if self._tokenizer is None:
            if (
                os.getpid() != _IMPORTED_IN
            ):  # forked, as `map(num_proc=)` does: OpenMP would wait for threads that the parent had
                torch.set_num_threads(1)
            self._tokenizer = load(self.model, device=self.device)
        images = [self._picture(image) for image in batch[self.image]]
        pictures = [image for image in images if isinstance(image, Picture)]
        tokens = iter(tokens_of(pictures, self._tokenizer, self.options))
        rows = [next(tokens) if isinstance(image, Picture) else None for image in images]
        columns = {name: [row and getattr(row, name) for row in rows] for name in ("codes", "positions", "grid")}
        columns["grid"] = [grid and list(grid) for grid in columns["grid"]]
        columns |= {name: [row and row.size[i] for row in rows] for i, name in enumerate(("width", "height"))}
        columns["error"] = [
            "" if isinstance(image, Picture) else image for image in images
        ]  # not None, which has no type
        rest = {name: values for name, values in batch.items() if name != self.image}
        return {**rest, **columns}

    def _picture(self, image: Any) -> Picture | str:
        """Or why there is none."""
        if isinstance(image, Mapping):
            image = image.get("bytes") or image.get("path")
        if image is None:
            return "is null"
        if isinstance(image, np.ndarray) and image.dtype == object:
            image = np.stack(image)
        try:
            return Picture(*to_array(image, self._tokenizer.config.image, max_pixels=self.options.max_pixels))
        except ImageError as error:
            return str(error)
