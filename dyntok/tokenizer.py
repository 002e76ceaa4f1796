"""The tokenizer: the methods that users call, and checks of their arguments.

Not here: the parts and how they work together (`network.py`), files and the hub (`checkpoint/`), LaVIT's further parts
(`lavit/`).
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from typing_extensions import Unpack

from dyntok.chunks import (
    Chunk,
    Failures,
    Originals,
    Rows,
    join_images,
    join_margins,
    limited,
    load_chunks,
    require_finite,
    split_chunks,
    without_failures,
)
from dyntok.config import ImageConfig
from dyntok.device import integers_on
from dyntok.encoding import Encoding, unchecked
from dyntok.errors import CodeError, ConfigError, FingerprintError
from dyntok.features import Features
from dyntok.image import DEFAULT_MAX_PIXELS, ImageSource, resize, restore, to_image
from dyntok.model.decoder import Decoder
from dyntok.network import Choice, Merge, TokenizerNetwork
from dyntok.original import Original
from dyntok.policy import KeepOptions, KeepPolicy
from dyntok.validation import check_computed

IntegerRows: TypeAlias = Iterable[Tensor | Sequence[int]]  # one row of integers per image
Codes: TypeAlias = Encoding | IntegerRows
OnError: TypeAlias = Literal["raise", "skip"]
Fit: TypeAlias = Literal["keep", "crop", "squash", "pad"]
Size: TypeAlias = int | tuple[int, int]  # (height, width) in pixels, or both
Decoding: TypeAlias = Literal["full", "scaled"]  # of JPEG files

BATCH_SIZE = 32
_DECODED_PATCHES = 32 * 256  # of the images that are decoded together: what bounds the memory


class DynamicVisualTokenizer(TokenizerNetwork):
    """Images to short sequences of integers, and back.

    >>> tok = dyntok.load()
    >>> enc = tok.encode("cat.jpg")
    >>> enc.codes[0]                         # LongTensor [T]; T depends on the picture
    >>> tok.decode(enc)[0].save("again.png")

    `dyntok.load` makes one. On a CPU the codes of an image depend on that image alone: not on the batch, the order, the
    process or the run. On a GPU they may differ in rare close decisions, unless `batch_invariant` is true.
    """

    # Pictures in, pictures out.

    def encode(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        policy: KeepPolicy | None = None,
        errors: OnError = "raise",
        fit: Fit | None = None,
        max_patches: int | None = None,
        size: Size | None = None,
        decoding: Decoding | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        batch_size: int = BATCH_SIZE,
        workers: int | None = None,
        margins: bool = False,
        refine: int = 0,
        **options: Unpack[KeepOptions],
    ) -> Encoding:
        """Returns the codes of one image or many.

        images: paths, bytes, PIL images, uint8 arrays [H, W(, C)], tensors [3, H, W] (see `image.py`); one or an
            iterable of them.
        policy: how many patches each image keeps; the options of `KeepPolicy` (budget, threshold, sample, psnr,
            max_tokens, places) are accepted here, too. By default the selector decides.
        errors: "skip" leaves bad images out; `Encoding.failures` lists them and `source_index` gives the input of each
            row.
        fit: how a picture meets its grid: "keep" (the whole picture in its own shape), "crop", "squash" or "pad". By
            default as the configuration says.
        max_patches: the most patches of a picture, 64 to 4,096. More patches show more detail and take more tokens.
        size: (height, width) in pixels, or both as one number: the rectangle that pictures are fitted to. It takes the
            place of `max_patches`.
        decoding: "scaled" reads large JPEG files at a fraction of their size, which is faster and changes some codes;
            "full" does not. By default as the configuration says.
        max_pixels: larger images are refused before they are decoded; `load_image` says more about limits.
        batch_size: the number of images that a GPU computes together. A CPU takes them one by one, and so does a GPU
            where `batch_invariant` is true.
        workers: threads that decode paths and bytes ahead; by default one per core for a GPU, and none for a CPU.
        margins: also report how many decisions were close; see `Encoding.margins`.
        refine: rounds, at most 15, that try other codes near the vectors and keep those from which the decoder paints a
            closer picture: the error of its pixels and features falls, and that of its pixels alone does not rise. The
            number of codes stays. Needs a pixel head. A round takes as long as about 20 decodings.

        Raises `ImageError` on the first bad image unless they are skipped, and `ConfigError` on contradictory options.
        A GPU is not waited for: where its numbers are not finite, the error comes when the codes are read.
        """
        keep = KeepPolicy.of(policy, options)
        failures, originals = self._failures(errors), Originals()
        chunks = load_chunks(
            images,
            self.image_config(fit=fit, max_patches=max_patches, size=size, decoding=decoding),
            self._at_once(batch_size),
            max_pixels=max_pixels,
            failures=failures,
            originals=originals,
            workers=self._decoding_threads(workers),
        )
        return self._encode_chunks(chunks, keep, self.merger, failures, originals, margins=margins, refine=refine)

    def __call__(self, images: ImageSource | Iterable[ImageSource], **options: Any) -> Encoding:
        """Returns the codes of one image or many; the same as `encode`."""
        return self.encode(images, **options)

    def decode(
        self,
        codes: Codes,
        *,
        positions: IntegerRows | None = None,
        grid: tuple[int, int] | None = None,
        size: Size | Literal["original"] | None = None,
    ) -> list[Image.Image]:
        """Returns one image for each row of codes.

        codes: an `Encoding`, or codes alone as an LLM writes them: one list of integers per image.
        positions: of the codes, where they are not an `Encoding`. Pictures are sharper with positions; without them the
            decoder guesses. A decoder with placement "rank" does not use the positions of an `Encoding`.
        grid: (rows, columns) of patches, where it is not the tokenizer's own.
        size: (height, width) of the images in pixels, or both as one number; by default that of their grids.
            "original": the size and shape that each had before `encode`; what was cut off is gray, and padding is cut
            off again.

        Codes alone are read as a lattice where the tokenizer keeps canonical masks. Those are the right places for
        codes that were encoded with `places="lattice"`. Other codes need their positions, and look wrong without.

        Raises `CodeError` on codes or positions out of range, an image without codes or with more codes than patches,
        positions for a decoder that cannot use them, or a tokenizer without a pixel head; and `FingerprintError` on
        codes of another tokenizer.
        """
        encoding = self._as_encoding(codes, positions, grid)
        self._require_pixel_head()
        originals = self._originals(encoding) if size == "original" else None
        height_width = None if size is None or size == "original" else pair(size)
        images: dict[int, Image.Image] = {}
        for rows in _rows_by_grid(encoding):
            for row, pixels in zip(rows, self.decode_to_pixels(encoding[rows]), strict=True):
                image = to_image(pixels, self.config.image)
                if originals is not None:
                    image = restore(image, originals[row], self.config.image)
                images[row] = image if height_width is None else resize(image, height_width)
        return [images[row] for row in range(len(encoding))]

    def features(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        policy: KeepPolicy | None = None,
        fit: Fit | None = None,
        max_patches: int | None = None,
        size: Size | None = None,
        decoding: Decoding | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        batch_size: int = BATCH_SIZE,
        workers: int | None = None,
        **options: Unpack[KeepOptions],
    ) -> Features:
        """Returns the merged tokens that `encode` would quantize, for LLMs that read embeddings.

        Arguments and errors are those of `encode`, without `errors`, `margins` and `refine`: the first bad image
        raises.
        """
        keep = KeepPolicy.of(policy, options)
        config = self.image_config(fit=fit, max_patches=max_patches, size=size, decoding=decoding)
        threads = self._decoding_threads(workers)
        chunks = load_chunks(images, config, self._at_once(batch_size), max_pixels=max_pixels, workers=threads)
        return self._merge_chunks(chunks, keep, self.merger, self.backbone.embed_dim)

    # Tensors in, tensors out.

    def encode_tensor(
        self,
        pixels: Tensor,
        *,
        policy: KeepPolicy | None = None,
        keep_mask: Tensor | None = None,
        errors: OnError = "raise",
        batch_size: int = BATCH_SIZE,
        margins: bool = False,
        refine: int = 0,
        **options: Unpack[KeepOptions],
    ) -> Encoding:
        """Returns the codes of normalized pixels, float [B, 3, H, W]; other arguments are those of `encode`.

        uint8 pixels are normalized on the device of the weights.
        keep_mask: bool [B, N], the patches to keep, at least one per image, in place of all options of a policy.
        errors: "skip" leaves out images for which the network computes NaN or infinite values.

        Raises `ImageError` on other pixels, `ConfigError` on contradictory options or a mask that does not fit.
        """
        choice: Choice = self._choice(pixels, keep_mask, KeepPolicy.of(policy, options))
        chunks, failures = self._split(pixels, batch_size), self._failures(errors)
        return self._encode_chunks(chunks, choice, self.merger, failures, margins=margins, refine=refine)

    def features_tensor(
        self,
        pixels: Tensor,
        *,
        policy: KeepPolicy | None = None,
        batch_size: int = BATCH_SIZE,
        **options: Unpack[KeepOptions],
    ) -> Features:
        """Returns the `features` of normalized pixels, float [B, 3, H, W]."""
        keep = KeepPolicy.of(policy, options)
        return self._merge_chunks(self._split(pixels, batch_size), keep, self.merger, self.backbone.embed_dim)

    def decode_to_features(
        self, codes: Codes, *, positions: IntegerRows | None = None, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Returns patch features [B, N, D] for codes of images with one grid; no pixel head is needed.

        Arguments and errors are those of `decode`.
        """
        return self._decode_features(self._as_encoding(codes, positions, grid), self.require_decoder())

    def decode_to_pixels(
        self, codes: Codes, *, positions: IntegerRows | None = None, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Returns normalized pixels [B, 3, H, W] for codes of images with one grid.

        Arguments and errors are those of `decode`.
        """
        head, encoding = self._require_pixel_head(), self._as_encoding(codes, positions, grid)
        with self.inference():
            pixels = head(self._decode_features(encoding, self.require_decoder()), self._one_grid(encoding))
            return require_finite(pixels, self.dtype)

    def image_config(
        self,
        *,
        fit: Fit | None = None,
        max_patches: int | None = None,
        size: Size | None = None,
        decoding: Decoding | None = None,
    ) -> ImageConfig:
        """Returns how pictures are prepared under these options of `encode`.

        Raises `ConfigError` on values out of range, and where the tokenizer knows one grid alone.
        """
        given = max_patches is not None or size is not None or fit == "keep"
        if given and not self.any_grid:
            rows, columns = self.grid
            raise ConfigError(
                f"this tokenizer knows the grid {rows} x {columns} alone; leave out max_patches, size and fit='keep'"
            )
        if max_patches is not None and size is not None:
            raise ConfigError(f"max_patches={max_patches} and size={size} were both given, expected one of them")
        if decoding not in (None, "full", "scaled"):
            raise ConfigError(f"decoding is {decoding!r}, expected 'full' or 'scaled'")
        options = {"resize": fit, "max_patches": max_patches, "size": None if size is None else pair(size)}
        changes: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        if max_patches is not None:
            changes["size"] = None  # a size of the configuration would be preferred
        if decoding is not None:
            changes["decoding"] = "scaled" if decoding == "scaled" else None
        try:
            return dataclasses.replace(self.config.image, **changes)
        except ConfigError as error:  # it names fields of a configuration, not options
            raise ConfigError(str(error).replace("image.resize", "fit").removeprefix("image.")) from error

    def _failures(self, errors: OnError) -> Failures | None:
        if errors not in ("raise", "skip"):
            raise ConfigError(f"errors is {errors!r}, expected 'raise' or 'skip'")
        return [] if errors == "skip" else None

    def _split(self, pixels: Tensor, batch_size: int) -> Iterator[Chunk]:
        self._check_pixels(pixels)
        return split_chunks(pixels, self._at_once(batch_size))

    def _encode_chunks(
        self,
        chunks: Iterable[Chunk],
        choice: Choice,
        merge: Merge,
        failures: Failures | None,
        originals: Originals | None = None,
        *,
        margins: bool = False,
        refine: int = 0,
    ) -> Encoding:
        self._check_refine(refine, margins)
        self._check_choice(choice)
        if refine:
            pixels = _DECODED_PATCHES * self.backbone.patch_size**2
            chunks = (part for chunk in chunks for part in limited(chunk, pixels))
        rows: Iterator[Rows] = (
            self._run(chunk, choice, merge, quantize=True, margins=margins, refine=refine) for chunk in chunks
        )
        if failures is not None or self.device.type == "cpu":  # else the codes say it, and nothing is waited for here
            rows = without_failures(rows, self.dtype, failures)
        done, nothing = list(rows), torch.empty(0, dtype=torch.long, device=self.device)
        source, codes, positions, cu_seqlens, grids = join_images(done, nothing)
        failed = tuple(sorted(failures or [], key=lambda failure: failure[0]))
        return unchecked(
            packed_codes=codes,
            packed_positions=positions,
            cu_seqlens=cu_seqlens,
            grids=grids,
            fingerprint=self.fingerprint,
            failures=failed,
            source_index=integers_on(self.device, source),
            margins=join_margins(done, self.device) if margins else None,
            originals=None if originals is None else tuple(originals[index] for index in source),
        )

    def _merge_chunks(self, chunks: Iterable[Chunk], choice: Choice, merge: Merge, width: int) -> Features:
        self._check_choice(choice)
        rows = (self._run(chunk, choice, merge, quantize=False) for chunk in chunks)
        done = list(without_failures(rows, self.dtype))
        _, *packed = join_images(done, torch.empty(0, width, device=self.device, dtype=self.dtype))
        return Features(*packed)

    def _originals(self, encoding: Encoding) -> tuple[Original, ...]:
        """Returns the originals of an encoding. Raises `CodeError` where they are unknown or too large to paint."""
        if encoding.originals is None:
            raise CodeError(
                "size is 'original', but these codes do not say how large their pictures were; "
                "give size=(height, width), or encode the pictures again"
            )
        for i, (height, width) in enumerate(original.size for original in encoding.originals):
            if height * width > DEFAULT_MAX_PIXELS:
                raise CodeError(
                    f"the original of image {i} has {width} x {height} pixels, the limit is {DEFAULT_MAX_PIXELS:,}; "
                    "give a smaller size=(height, width)"
                )
        return encoding.originals

    def _as_encoding(
        self, codes: Codes, positions: IntegerRows | None, grid: tuple[int, int] | None, decoder: Decoder | None = None
    ) -> Encoding:
        """Returns codes as an `Encoding` that this tokenizer can decode.

        decoder: the one that will read them, if it is not the tokenizer's first.
        """
        if isinstance(codes, str | os.PathLike):
            raise CodeError(
                f"codes is the text {str(codes)[:300]!r}, expected an Encoding or one list of integers per image; "
                "read a file that `dyntok encode` wrote with json.load(open(path))['codes'], "
                "or use `dyntok decode` on the command line"
            )
        if not isinstance(codes, Encoding):
            if not isinstance(codes, Iterable):
                got = type(codes).__name__
                raise CodeError(f"codes are {got}, expected an Encoding or one list of integers per image")
            if positions is not None and (decoder or self.require_decoder()).placement == "rank":
                raise CodeError("positions were given, but this decoder uses only the order of codes; leave them out")
            codes = Encoding.pack(codes, positions, self.grid if grid is None else grid)
        elif positions is not None or grid is not None:
            raise CodeError("positions= or grid= was given with an Encoding, which has its own; leave them out")
        if codes.fingerprint not in (None, self.fingerprint):
            raise FingerprintError(
                f"these codes were written by the tokenizer {codes.fingerprint}, this one is {self.fingerprint}; "
                "load the one that wrote them"
            )
        self._check_grids(codes.grids)
        check_computed(codes.packed_codes, codes.cu_seqlens, codes.source_index)
        return codes.to(self.device)


def _rows_by_grid(encoding: Encoding) -> Iterator[list[int]]:
    """Yields the numbers of images with the same grid, fewer of large ones, until every image has its turn."""
    groups: dict[tuple[int, int], list[int]] = {}
    for row, (rows, columns) in enumerate(encoding.grids.tolist()):
        groups.setdefault((rows, columns), []).append(row)
    for (rows, columns), images in groups.items():
        size = min(BATCH_SIZE, max(1, _DECODED_PATCHES // (rows * columns)))
        yield from (images[i : i + size] for i in range(0, len(images), size))


def pair(size: Size) -> tuple[int, int]:
    """Returns a size as (height, width). Raises `ConfigError` on anything but positive whole numbers."""
    pair = (size, size) if isinstance(size, int) else size
    whole = isinstance(pair, tuple | list) and len(pair) == 2 and all(type(side) is int and side > 0 for side in pair)
    if not whole:
        raise ConfigError(f"size is {size!r}, expected (height, width) in pixels, or one number for both")
    return pair[0], pair[1]
