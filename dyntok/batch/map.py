"""Codes for the `map` of other libraries: Hugging Face `datasets`, Ray Data, plain dicts of lists."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from dyntok.batch.engines.rows import DecodedImage, TokenizedImage
from dyntok.batch.engines.stages import DecodeOptions, to_picture, tokenize_pictures
from dyntok.batch.options import BatchOptions
from dyntok.batch.shapes import check_shapes, code_type, position_type
from dyntok.errors import DataError, FingerprintError, ImageError
from dyntok.image import DEFAULT_MAX_PIXELS
from dyntok.loading import load
from dyntok.structure import require_methods
from dyntok.tokenizer import Decoding, DynamicVisualTokenizer, Fit, Size

_IMPORTED_IN = os.getpid()


class TokenizeColumn:
    """Turns a batch with a column of images into one with their codes.

    The new columns are codes, positions, grid, width, height, crop_box and error, and margins on request.

    >>> dataset.map(dyntok.batch.TokenizeColumn(), batched=True, remove_columns="image")  # Hugging Face datasets
    >>> ray.data.read_parquet(...).map_batches(dyntok.batch.TokenizeColumn, concurrency=4)  # Ray Data

    image: the column; PIL images, uint8 arrays, bytes, paths, or dicts with bytes. The image column is not returned:
        `datasets` keeps it unless it is removed, Ray drops it. The other columns stay.
    model, device, batch_invariant, other options: as in `dyntok.load` and `encode`. Each process loads the tokenizer
        when it first needs it.

    A bad image has no codes (empty arrays, zeros for grid, size, box and margins) and a reason in `error`, which is
    empty otherwise. The columns have the same types in every batch.

    The fingerprint of the tokenizer is part of the pickled object, so the cache of `datasets` notices other weights.
    Raises `DataError` where the image column is missing or holds a single image, `FingerprintError` where the
    tokenizer changed after the object was pickled.
    """

    def __init__(
        self,
        model: str | os.PathLike | None = None,
        *,
        image: str = "image",
        budget: int | float | None = None,
        threshold: float | None = None,
        max_tokens: int | None = None,
        psnr: float | None = None,
        places: Literal["free", "map", "lattice"] | None = None,
        fit: Fit | None = None,
        max_patches: int | None = None,
        size: Size | None = None,
        decoding: Decoding | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        device: str = "cpu",
        batch_invariant: bool = False,
        margins: bool = False,
        refine: int = 0,
    ) -> None:
        self.model, self.image, self.device = model, image, device
        self.options = BatchOptions(
            budget=budget,
            threshold=threshold,
            max_tokens=max_tokens,
            psnr=psnr,
            places=places,
            fit=fit,
            max_patches=max_patches,
            size=size,
            decoding=decoding,
            max_pixels=max_pixels,
            batch_invariant=batch_invariant,
            margins=margins,
            refine=refine,
        )
        self._tokenizer: DynamicVisualTokenizer | None = None
        self._fingerprint: str | None = None  # of the tokenizer in the process that pickled this object

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_tokenizer": None, "_fingerprint": self.tokenizer.fingerprint}

    @property
    def tokenizer(self) -> DynamicVisualTokenizer:
        """Returns the tokenizer, loaded now where it was not needed before."""
        if self._tokenizer is None:
            if os.getpid() != _IMPORTED_IN:  # forked, as `map(num_proc=)` does: OpenMP would wait for lost threads
                torch.set_num_threads(1)
            tokenizer = load(self.model, device=self.device, batch_invariant=self.options.batch_invariant)
            if self._fingerprint not in (None, tokenizer.fingerprint):
                raise FingerprintError(
                    f"{self.model} is the tokenizer {tokenizer.fingerprint} now and was {self._fingerprint} when this "
                    "object was pickled; make a new TokenizeColumn"
                )
            check_shapes(tokenizer, self.options)
            self._tokenizer = tokenizer
        return self._tokenizer

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        require_methods("the batch", batch, ["keys"], "columns by name, as map(..., batched=True) gives them")
        pictures = [self._picture(image) for image in self._images(batch)]
        good = [picture for picture in pictures if isinstance(picture, DecodedImage)]
        results = iter(tokenize_pictures(good, self.tokenizer, self.options))
        tokenized = [next(results) if isinstance(picture, DecodedImage) else picture for picture in pictures]
        rest = {name: values for name, values in batch.items() if name != self.image}
        return {**rest, **self._columns(tokenized)}

    def _images(self, batch: Mapping[str, Sequence[Any]]) -> Sequence[Any]:
        if self.image not in batch:
            raise DataError(
                f"the batch has no column {self.image!r}; it has {', '.join(batch)}; image= names the one with images"
            )
        images = batch[self.image]
        single = images is None or isinstance(images, str | bytes | os.PathLike | Mapping | Image.Image)
        if isinstance(images, np.ndarray | torch.Tensor):
            single = images.ndim == 2 or images.ndim == 3 and (images.shape[2] in (1, 3, 4) or images.shape[0] == 3)
        if single:
            raise DataError(
                f"the column {self.image!r} holds one image ({type(images).__name__}), expected a list of images; "
                "call map(..., batched=True) or map_batches(...)"
            )
        return images

    def _picture(self, image: Any) -> DecodedImage | str:
        """Returns the picture, or why there is none."""
        if isinstance(image, Mapping):
            image = image.get("bytes") or image.get("path")
        if image is None:
            return "is null"
        if isinstance(image, np.ndarray) and image.dtype == object:
            image = np.stack(list(image))
        try:
            return to_picture(image, DecodeOptions.of(self.tokenizer, self.options))
        except ImageError as error:
            return str(error)

    def _columns(self, results: Sequence[TokenizedImage | ImageError | str]) -> dict[str, Any]:
        """Returns NumPy values, whose types do not depend on which images are good."""
        codes = np.zeros(0, code_type(self.tokenizer))
        positions = np.zeros(0, position_type(self.tokenizer, self.options))
        none = TokenizedImage(codes, positions, (0, 0), (0, 0), (0, 0, 0, 0))
        images = [result if isinstance(result, TokenizedImage) else none for result in results]
        columns: dict[str, Any] = {
            "codes": [image.codes for image in images],
            "positions": [image.positions for image in images],
            "grid": [np.array(image.grid, np.uint16) for image in images],
            "width": np.array([image.size[0] for image in images], np.uint32),
            "height": np.array([image.size[1] for image in images], np.uint32),
            "crop_box": [np.array(image.crop_box, np.uint32) for image in images],
            "error": ["" if isinstance(result, TokenizedImage) else str(result) for result in results],
        }
        if self.options.margins:
            columns["margins"] = [np.array(image.margins or (0, 0), np.float32) for image in images]
        return columns
