"""The tokenizer: all parts together, and the doors users come through. The only file that knows all the parts."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

from dyntok.checkpoint.pretrained import Persistent
from dyntok.config import ImageConfig, TokenizerConfig
from dyntok.encoding import Encoding
from dyntok.errors import CheckpointError, CodeError, ConfigError, FingerprintError, ImageError
from dyntok.features import Features
from dyntok.image import DEFAULT_MAX_PIXELS, ImageSource, is_single, to_image, to_pixels
from dyntok.lavit.conditioning import Conditioning
from dyntok.lavit.diffusion import FILES, DiffusionDecoder
from dyntok.lavit.understanding import Understanding
from dyntok.model.backbone import Backbone
from dyntok.model.codebook import Codebook
from dyntok.model.decoder import Decoder
from dyntok.model.merger import build_merger
from dyntok.model.pixel_head import PixelHead
from dyntok.model.selector import Selector
from dyntok.policy import KeepPolicy
from dyntok.ragged import cu_seqlens_from_mask

_Rows: TypeAlias = Iterable[Tensor | Sequence[int]]  # one row of integers per image
Codes: TypeAlias = Encoding | _Rows

_Policy: TypeAlias = Callable[
    [Tensor, Sequence[int]], Tensor
]  # log-probabilities [B, N, 2], places in the call -> keep mask [B, N]
_CHUNK = 32  # images at once, where they need not be taken singly
_PAINTED = ImageConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))  # of pixels in [0, 1]


class DynamicVisualTokenizer(Persistent):
    """Images to short sequences of integers, and back.

    >>> tok = dyntok.load()
    >>> enc = tok.encode("cat.jpg")
    >>> enc.codes[0]             # LongTensor [T]: as many codes as the picture needs
    >>> tok.decode(enc)[0].save("again.png")

    Made by `dyntok.load`, `from_pretrained`, or untrained from a configuration. In float32 on a CPU the codes of an image depend on that
    image alone: not on batch, order, process or run. On a GPU or in half precision they may differ in rare close decisions.
    """

    def __init__(self, config: TokenizerConfig, *, pretrained_backbone: bool = False) -> None:
        """pretrained_backbone: fetch the backbone's weights from timm's hub (for training a new tokenizer)."""
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.backbone, config.image.img_size, pretrained=pretrained_backbone)
        width, code_dim = self.backbone.embed_dim, config.codebook.dim
        self.selector = Selector(width, self.backbone.grid, config.selector.dither)
        self.merger = build_merger(width, config.merger)
        self.projection = nn.Linear(width, code_dim)
        if config.codebook.projection == "mlp":
            self.projection = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, code_dim))
        self.codebook = Codebook(config.codebook.size, code_dim)
        for name in ("decoder", "highres_decoder"):
            section = getattr(config, name)
            dithered = config.selector.dither > 0
            decoder = (
                None if section is None else Decoder(self.backbone.grid, code_dim, width, section, dithered=dithered)
            )
            self.add_module(name, decoder)
        paints = config.decoder is not None and config.decoder.pixels
        self.pixel_head = (
            PixelHead(self.decoder.out_dim, self.backbone.grid, self.backbone.patch_size) if paints else None
        )
        reads = config.understanding_dim is not None
        self.understanding = Understanding(width, config.merger, config.understanding_dim) if reads else None
        self._painters: dict[tuple, DiffusionDecoder] = {}  # by folder, device and dtype

    # The easy door: pictures in, pictures out.

    def encode(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        budget: int | float | None = None,
        threshold: float | None = None,
        sample: torch.Generator | None = None,
        max_tokens: int | None = None,
        errors: Literal["raise", "skip"] = "raise",
        exact: bool = False,
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> Encoding:
        """Codes of one image or many. How many per image: see `KeepPolicy`; by default as many as the selector finds worth it.

        images: paths, bytes, PIL images, uint8 arrays [H, W(, C)], tensors [3, H, W] (see `image.py`); one or an iterable of them.
        errors: "skip" leaves bad images out; `Encoding.failures` lists them and `source_index` says where each row came from.
        exact: merge by the softmax formula of LaVIT's released code (dense, slower).
        max_pixels: larger images are refused before they are decoded; more about limits at `load_image`.

        Raises `ImageError` on the first bad image (unless skipped), `ConfigError` on contradictory options.
        """
        if errors not in ("raise", "skip"):
            raise ConfigError(f"errors is {errors!r}, expected 'raise' or 'skip'")
        policy = KeepPolicy(budget, threshold, sample, max_tokens)
        failures: list[tuple[int, ImageError]] = []
        source_index: list[int] = []
        parts = []
        for places, pixels in self._chunks(images, max_pixels, None if errors == "raise" else failures):
            source_index += places
            parts.append(self._encode(pixels, policy, places, exact))
        return self._pack(parts, failures, source_index)

    def decode(
        self,
        codes: Codes,
        *,
        positions: _Rows | None = None,
        grid: tuple[int, int] | None = None,
        highres: bool = False,
        size: tuple[int, int] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
    ) -> list[Image.Image]:
        """Images from an `Encoding`, or from codes alone as an LLM writes them: one list of integers per image.

        With positions the picture is sharper; without, the decoder guesses them from the order. A decoder that knows tokens by their rank
        (placement "rank", as LaVIT's) does not use those of an `Encoding`. grid: (rows, columns), where it is not the tokenizer's own.

        Where a diffusion model paints (LaVIT), the other arguments are its options, see `DiffusionDecoder`; highres: by the decoder for
        larger pictures. It is loaded when it is first needed.

        Raises `CodeError` on codes or positions out of range, an image without codes or with more codes than patches, positions given to a
        decoder that has no use for them, or a tokenizer that makes no images; `ConfigError` on options that it has no use for;
        `FingerprintError` on codes of another tokenizer.
        """
        encoding = self._as_encoding(codes, positions, grid, highres)
        pieces = (encoding[i : i + _CHUNK] for i in range(0, len(encoding), _CHUNK))
        options = {"size": size, "steps": steps, "guidance": guidance, "generator": generator, "batch_size": batch_size}
        options = {name: value for name, value in options.items() if value is not None}
        if self.pixel_head is None:
            painter = self._painter(highres)
            painted = (painter(*self.decode_to_conditioning(piece, highres=highres), **options) for piece in pieces)
            return [to_image(pixels, _PAINTED) for piece in painted for pixels in piece]
        if options or highres:
            names = ", ".join([*options, *["highres"] * highres])
            raise ConfigError(f"{names} given, but this tokenizer paints without a diffusion model; leave them out")
        return [to_image(pixels, self.config.image) for piece in pieces for pixels in self.decode_to_pixels(piece)]

    # The raw door: tensors in, tensors out.

    @property
    def device(self) -> torch.device:
        return self.codebook.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Of most weights; see `in_precision`."""
        return next(self.backbone.parameters()).dtype

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.backbone.grid

    def _at_once(self, images: int) -> int:
        # matrix products round differently at different shapes: on a CPU every image is computed alone, always at the same shapes
        return 1 if self.device.type == "cpu" else images

    def encode_tensor(
        self,
        pixels: Tensor,
        *,
        budget: int | float | None = None,
        threshold: float | None = None,
        sample: torch.Generator | None = None,
        max_tokens: int | None = None,
        keep: Tensor | None = None,
        exact: bool = False,
        batch_size: int = _CHUNK,
    ) -> Encoding:
        """Codes of normalized pixels, float [B, 3, S, S]; the options are those of `encode`, and two more:

        keep: bool [B, N], the patches to keep, chosen by the caller instead of the selector; at least one per image. It takes the place
            of every other choice, `max_tokens` included.
        batch_size: images at once on a GPU; a CPU takes them singly.

        Raises `ImageError` on other pixels, `ConfigError` on contradictory options or a mask that does not fit.
        """
        policy: _Policy = KeepPolicy(budget, threshold, sample, max_tokens)
        self._check_pixels(pixels)
        if keep is not None:
            if policy != KeepPolicy():
                raise ConfigError(
                    "keep was given with budget, threshold, sample or max_tokens, expected the mask alone"
                )
            policy = self._given(keep, len(pixels))
        parts = [self._encode(part, policy, places, exact) for places, part in self._pieces(pixels, batch_size)]
        return self._pack(parts, [], list(range(len(pixels))))

    def features(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        path: Literal["codes", "understanding"] = "codes",
        budget: int | float | None = None,
        threshold: float | None = None,
        sample: torch.Generator | None = None,
        max_tokens: int | None = None,
        exact: bool = False,
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> Features:
        """Continuous merged tokens, not quantized, for LLMs that read embeddings; other options and errors are those of `encode`.

        path: "codes", the tokens that `encode` would quantize, or "understanding", what LaVIT feeds its LLM: a merger of its own and a
            projection, loaded when first needed. Raises `ConfigError` where the tokenizer has no such path.
        """
        policy = KeepPolicy(budget, threshold, sample, max_tokens)
        return self._continuous(self._chunks(images, max_pixels), policy, exact, path)

    def features_tensor(
        self,
        pixels: Tensor,
        *,
        path: Literal["codes", "understanding"] = "codes",
        budget: int | float | None = None,
        threshold: float | None = None,
        sample: torch.Generator | None = None,
        max_tokens: int | None = None,
        exact: bool = False,
    ) -> Features:
        """`features` of normalized pixels, float [B, 3, S, S]."""
        policy = KeepPolicy(budget, threshold, sample, max_tokens)
        self._check_pixels(pixels)
        return self._continuous(self._pieces(pixels), policy, exact, path)

    def decode_to_features(
        self,
        codes: Codes,
        *,
        positions: _Rows | None = None,
        grid: tuple[int, int] | None = None,
        highres: bool = False,
    ) -> Tensor:
        """Patch features [B, N, D] from codes; arguments and errors as in `decode`, but nothing that paints is needed."""
        encoding = self._as_encoding(codes, positions, grid, highres)
        with self.inference():
            vectors = self.codebook.lookup(encoding.packed_codes)
            return self._decoder(highres)(vectors, encoding.cu_seqlens, encoding.packed_positions)

    def decode_to_conditioning(
        self,
        codes: Codes,
        *,
        positions: _Rows | None = None,
        grid: tuple[int, int] | None = None,
        highres: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What a diffusion U-Net reads: prompt embeddings [B, N, E], and the pooled embedding [B, P] or None; otherwise as `decode`."""
        conditions = self._conditions(highres)
        with self.inference():
            return conditions(self.decode_to_features(codes, positions=positions, grid=grid, highres=highres))

    def decode_to_pixels(
        self, codes: Codes, *, positions: _Rows | None = None, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Normalised pixels [B, 3, S, S] from codes, by the pixel head; arguments and errors as in `decode`."""
        if self.pixel_head is None:
            raise CodeError(
                "this tokenizer has no pixel head, so it makes no pixels at once; decode_to_features(codes) gives patch features"
            )
        with self.inference():
            return self.pixel_head(self.decode_to_features(codes, positions=positions, grid=grid))

    def part(self, name: Literal["decoder", "highres_decoder", "understanding"]) -> nn.Module:
        """That part, fetched now where it was not needed before. Raises `ConfigError` where the tokenizer has none."""
        if getattr(self, name) is None:
            if self.late_parts is None:
                raise ConfigError(
                    f"this tokenizer has no {name.replace('_', ' ')}; load one that has, or do without it"
                )
            sections, part = self.late_parts.fetch(name, self)
            self.config = dataclasses.replace(self.config, **sections)
            setattr(self, name, part)
        return getattr(self, name)

    def _decoder(self, highres: bool) -> Decoder:
        return self.part("highres_decoder" if highres else "decoder")

    def _conditions(self, highres: bool) -> Conditioning:
        conditions = self._decoder(highres).conditions
        if conditions is None:
            has = "no pixel head and " if self.pixel_head is None else ""
            raise CodeError(
                f"this tokenizer has {has}no conditions for a diffusion model; decode_to_features(codes) gives patch features"
            )
        return conditions

    def _painter(self, highres: bool) -> DiffusionDecoder:
        self._conditions(highres)  # refuses a tokenizer that makes no images
        folder = (self.config.highres_decoder if highres else self.config.decoder).conditions.folder
        key = folder, self.device, self.dtype
        if key not in self._painters:
            if self.origin is None:
                raise CheckpointError(
                    "this tokenizer was not loaded from anywhere, so no diffusion model lies beside it; load a saved one"
                )
            if self.late_parts is not None:
                painter = self.late_parts.painter(*key)
            else:
                painter = DiffusionDecoder.load(self.origin.folder(folder, FILES), device=self.device, dtype=self.dtype)
            self._painters = {k: v for k, v in self._painters.items() if k[1:] == key[1:]} | {key: painter}
        return self._painters[key]

    def _given(self, keep: Tensor, images: int) -> _Policy:
        """A policy that keeps what the caller's mask says."""
        shape = [images, self.grid[0] * self.grid[1]]
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool or list(keep.shape) != shape:
            got = f"{keep.dtype} {list(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
            raise ConfigError(
                f"keep is {got}, expected a bool tensor {shape}: one entry for each patch of each image, in raster order"
            )
        if not keep.any(1).all():
            image = int((~keep.any(1)).nonzero()[0])
            raise ConfigError(f"keep drops every patch of image {image}, expected at least one that is kept")
        keep = keep.to(self.device)
        return lambda log_probs, places: keep[places[0] : places[0] + len(log_probs)]

    def _chunks(
        self,
        images: ImageSource | Iterable[ImageSource],
        max_pixels: int,
        failures: list[tuple[int, ImageError]] | None = None,
    ) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """(places among the inputs, normalized pixels [b, 3, S, S]) of readable images; the others go to `failures`, or raise if None."""
        single = is_single(images)

        def readable() -> Iterator[tuple[int, Tensor]]:
            for place, image in enumerate([images] if single else images):
                try:
                    yield place, to_pixels(image, self.config.image, max_pixels=max_pixels)
                except ImageError as error:
                    if failures is not None:
                        failures.append((place, error))
                    elif single or isinstance(image, str | os.PathLike):  # it is told by its name
                        raise
                    else:
                        raise ImageError(f"input {place}: {error}") from error

        for chunk in batched(readable(), self._at_once(_CHUNK)):
            places, pixels = zip(*chunk, strict=True)
            yield places, torch.stack(pixels)

    def _pieces(self, pixels: Tensor, batch_size: int = _CHUNK) -> Iterator[tuple[range, Tensor]]:
        """(places, normalized pixels [b, 3, S, S])"""
        size = self._at_once(batch_size)
        for start in range(0, len(pixels), size):
            part = pixels[start : start + size]
            # a copy, always laid out and aligned alike: how a kernel rounds may depend on both
            yield range(start, start + len(part)), part.clone(memory_format=torch.contiguous_format)

    def _choose(self, pixels: Tensor, policy: _Policy, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] -> backbone features [B, N, D], keep mask [B, N]"""
        features = self.backbone(pixels.to(self.device, self.dtype))
        return features, policy(self.selector(features), places)

    def _encode(self, pixels: Tensor, policy: _Policy, places: Sequence[int], exact: bool) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] -> codes [T], keep mask [B, N]"""
        with self.inference():
            features, keep = self._choose(pixels, policy, places)
            return self.codebook(self.projection(self.merger(features, keep, exact=exact))), keep

    def _continuous(
        self, chunks: Iterable[tuple[Sequence[int], Tensor]], policy: _Policy, exact: bool, path: str
    ) -> Features:
        if path not in ("codes", "understanding"):
            raise ConfigError(f"path is {path!r}, expected 'codes' or 'understanding'")
        merger = self.merger if path == "codes" else self.part("understanding")
        width = self.backbone.embed_dim if path == "codes" else self.config.understanding_dim
        parts = []
        for places, pixels in chunks:
            with self.inference():
                features, keep = self._choose(pixels, policy, places)
                parts.append((merger(features, keep, exact=exact), keep))
        return Features(*self._join(parts, torch.empty(0, width, device=self.device, dtype=self.dtype)))

    def _join(self, parts: list[tuple[Tensor, Tensor]], nothing: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(rows, keep mask) pairs -> all rows [T, ...], their positions [T], cu_seqlens [B+1], grids [B, 2]; `nothing` is rows [0, ...]."""
        no_image = torch.empty(0, self.grid[0] * self.grid[1], dtype=torch.bool, device=self.device)
        rows, masks = zip((nothing, no_image), *parts, strict=True)
        keep = torch.cat(masks)
        return (
            torch.cat(rows),
            keep.nonzero()[:, 1],
            cu_seqlens_from_mask(keep),
            torch.tensor(self.grid, device=self.device).repeat(len(keep), 1),
        )

    def _pack(
        self, parts: list[tuple[Tensor, Tensor]], failures: list[tuple[int, ImageError]], source_index: list[int]
    ) -> Encoding:
        packed = self._join(parts, torch.empty(0, dtype=torch.long, device=self.device))
        source = torch.tensor(source_index, dtype=torch.long, device=self.device)
        return Encoding(*packed, self.fingerprint, tuple(failures), source)

    def _check_pixels(self, pixels: Tensor) -> None:
        shape = (3, self.config.image.img_size, self.config.image.img_size)
        if not isinstance(pixels, Tensor) or tuple(pixels.shape[1:]) != shape or not pixels.is_floating_point():
            got = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
            raise ImageError(
                f"pixels are {got}, expected normalized floats [B, {', '.join(map(str, shape))}]; encode() prepares images"
            )
        if not pixels.isfinite().all():
            raise ImageError("pixels hold NaN or infinite values, expected finite ones")

    def _as_encoding(
        self, codes: Codes, positions: _Rows | None, grid: tuple[int, int] | None, highres: bool = False
    ) -> Encoding:
        if not isinstance(codes, Encoding):
            if not isinstance(codes, Iterable):
                raise CodeError(
                    f"codes are {type(codes).__name__}, expected an Encoding or one list of integers per image"
                )
            if positions is not None and self._decoder(highres).placement == "rank":
                raise CodeError(
                    "positions were given, but this decoder knows tokens by their rank alone; leave positions out"
                )
            codes = Encoding.pack(codes, positions, grid or self.grid)
        elif positions is not None or grid is not None:
            raise CodeError(
                "positions= or grid= was given with an Encoding, which has its own; give them with plain lists of codes only"
            )
        if codes.fingerprint not in (None, self.fingerprint):
            written, own = codes.fingerprint, self.fingerprint
            raise FingerprintError(
                f"these codes were written by the tokenizer {written}, this one is {own}; load the one that wrote them"
            )
        if (codes.grids != torch.tensor(self.grid, device=codes.device)).any():
            raise CodeError(
                f"an image has another grid than {self.grid[0]} x {self.grid[1]}, which is all that this tokenizer decodes"
            )
        return codes.to(self.device)


def batched(items: Iterable, size: int) -> Iterator[tuple]:
    """Tuples of `size` items, the last of what is left."""
    items = iter(items)
    while chunk := tuple(itertools.islice(items, size)):
        yield chunk
