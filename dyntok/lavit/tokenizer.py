"""`LavitTokenizer`: a tokenizer with the parts that only LaVIT has.

Those are a decoder for large pictures, the understanding path, and diffusion models that make pictures of patch
features. Not here: how LaVIT's released files are read (`release.py`).
"""

import dataclasses
import functools
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from typing_extensions import Unpack

from dyntok.checkpoint.hub import Origin
from dyntok.chunks import Originals, load_chunks
from dyntok.config import DecoderConfig, ImageConfig, TokenizerConfig
from dyntok.encoding import Encoding
from dyntok.errors import CheckpointError, CodeError, ConfigError
from dyntok.features import Features
from dyntok.image import DEFAULT_MAX_PIXELS, ImageSource, restore, to_image
from dyntok.lavit.conditioning import Conditioning
from dyntok.lavit.config import LavitConfig, LavitDecoderConfig
from dyntok.lavit.decoder import LavitDecoder
from dyntok.lavit.diffusion import FILES, DiffusionDecoder
from dyntok.lavit.understanding import Understanding
from dyntok.network import Merge
from dyntok.policy import KeepOptions, KeepPolicy
from dyntok.tokenizer import BATCH_SIZE, Codes, Decoding, DynamicVisualTokenizer, Fit, IntegerRows, OnError, Size, pair

Part = Literal["decoder", "highres_decoder", "understanding"]
FeaturePath = Literal["codes", "understanding"]

_UNIT_RANGE = ImageConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))  # of pixels in [0, 1]


class LazyParts(Protocol):
    """Fetches parts of a tokenizer when they are first needed."""

    def fetch(self, name: Part, tokenizer: "LavitTokenizer") -> tuple[Mapping[str, Any], nn.Module]:
        """Returns the sections of the configuration that change, and the part."""
        ...

    def diffusion_decoder(self, folder: str, device: torch.device, dtype: torch.dtype) -> DiffusionDecoder:
        """Returns the diffusion model in that folder."""
        ...


class LavitTokenizer(DynamicVisualTokenizer):
    """LaVIT's visual tokenizer: codes, continuous tokens for its LLM, and pictures by diffusion.

    >>> tok = dyntok.load("rain1011/LaVIT-7B-v2")
    >>> tok.decode(tok.encode("cat.jpg"), highres=True, size=(896, 1152))[0].save("again.png")

    Parts are fetched when they are first needed: only encoding is ready at once.
    """

    config_class: ClassVar[type[TokenizerConfig]] = LavitConfig
    kind: ClassVar[str] = "lavit"
    config: LavitConfig

    def __init__(self, config: LavitConfig, *, pretrained_backbone: bool = False) -> None:
        super().__init__(config, pretrained_backbone=pretrained_backbone)
        highres, out_dim = config.highres_decoder, config.understanding_dim
        self.highres_decoder = None if highres is None else self._build_decoder(highres)
        self.understanding: Understanding | None = None
        if out_dim is not None:
            self.understanding = Understanding(self.backbone.embed_dim, config.merger, out_dim)
        self.lazy_parts: LazyParts | None = None
        self._diffusion_decoders: dict[tuple[str, torch.device, torch.dtype], DiffusionDecoder] = {}

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
        lavit_softmax: bool = False,
        **options: Unpack[KeepOptions],
    ) -> Encoding:
        """Returns the codes of one image or many; other arguments and errors as in `DynamicVisualTokenizer.encode`.

        lavit_softmax: merge with the softmax formula of LaVIT's released code, which needs all patches and is slower.
        """
        keep, failures, originals = KeepPolicy.of(policy, options), self._failures(errors), Originals()
        config = self.image_config(fit=fit, max_patches=max_patches, size=size, decoding=decoding)
        at_once, merge = self._at_once(batch_size), self._merge("codes", lavit_softmax)
        chunks = load_chunks(
            images,
            config,
            at_once,
            max_pixels=max_pixels,
            failures=failures,
            originals=originals,
            workers=self._decoding_threads(workers),
        )
        return self._encode_chunks(chunks, keep, merge, failures, originals, margins=margins, refine=refine)

    def features(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        path: FeaturePath = "codes",
        policy: KeepPolicy | None = None,
        fit: Fit | None = None,
        max_patches: int | None = None,
        size: Size | None = None,
        decoding: Decoding | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        batch_size: int = BATCH_SIZE,
        workers: int | None = None,
        lavit_softmax: bool = False,
        **options: Unpack[KeepOptions],
    ) -> Features:
        """Returns continuous merged tokens; other arguments and errors as in `encode`.

        path: "codes" gives the tokens that `encode` would quantize. "understanding" gives what LaVIT feeds its LLM,
            made by a merger and a projection of their own, which are loaded when first needed. Raises `ConfigError`
            where the tokenizer has no such path.
        """
        keep, merge = KeepPolicy.of(policy, options), self._merge(path, lavit_softmax)
        config = self.image_config(fit=fit, max_patches=max_patches, size=size, decoding=decoding)
        threads = self._decoding_threads(workers)
        chunks = load_chunks(images, config, self._at_once(batch_size), max_pixels=max_pixels, workers=threads)
        return self._merge_chunks(chunks, keep, merge, self._width(path))

    def decode(
        self,
        codes: Codes,
        *,
        positions: IntegerRows | None = None,
        grid: tuple[int, int] | None = None,
        highres: bool = False,
        size: Size | Literal["original"] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 1,
    ) -> list[Image.Image]:
        """Returns one image for each row of codes, made by a diffusion model that is loaded when first needed.

        codes, positions, grid: as in `DynamicVisualTokenizer.decode`. highres: use the decoder and the model for larger
            pictures.
        size: (height, width) in pixels, as the diffusion model makes them; "original" scales its pictures.
        steps, guidance, generator, batch_size: see `DiffusionDecoder`.

        Raises as `DynamicVisualTokenizer.decode` does, and `ConfigError` on an option that does not fit.
        """
        encoding = self._encoding_for(codes, positions, grid, highres)
        diffusion = self._diffusion_decoder(highres)
        originals = self._originals(encoding) if size == "original" else None
        height_width = None if size is None or size == "original" else pair(size)
        images: list[Image.Image] = []
        for start in range(0, len(encoding), BATCH_SIZE):
            conditioning = self.decode_to_conditioning(encoding[start : start + BATCH_SIZE], highres=highres)
            pixels = diffusion(
                *conditioning,
                size=height_width,
                steps=steps,
                guidance=guidance,
                generator=generator,
                batch_size=batch_size,
            )
            images += [to_image(row, _UNIT_RANGE) for row in pixels]
        if originals is None:
            return images
        return [restore(image, each, self.config.image) for image, each in zip(images, originals, strict=True)]

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
        lavit_softmax: bool = False,
        **options: Unpack[KeepOptions],
    ) -> Encoding:
        """Returns the codes of normalized pixels, float [B, 3, S, S]; arguments as in `encode` and the base class."""
        choice = self._choice(pixels, keep_mask, KeepPolicy.of(policy, options))
        merge = self._merge("codes", lavit_softmax)
        chunks, failures = self._split(pixels, batch_size), self._failures(errors)
        return self._encode_chunks(chunks, choice, merge, failures, margins=margins, refine=refine)

    def features_tensor(
        self,
        pixels: Tensor,
        *,
        path: FeaturePath = "codes",
        policy: KeepPolicy | None = None,
        batch_size: int = BATCH_SIZE,
        lavit_softmax: bool = False,
        **options: Unpack[KeepOptions],
    ) -> Features:
        """Returns the `features` of normalized pixels, float [B, 3, S, S]."""
        keep, merge = KeepPolicy.of(policy, options), self._merge(path, lavit_softmax)
        return self._merge_chunks(self._split(pixels, batch_size), keep, merge, self._width(path))

    def decode_to_features(
        self,
        codes: Codes,
        *,
        positions: IntegerRows | None = None,
        grid: tuple[int, int] | None = None,
        highres: bool = False,
    ) -> Tensor:
        """Returns patch features [B, N, D] for codes.

        Arguments and errors are those of `decode`, but no diffusion model is needed.
        """
        encoding = self._encoding_for(codes, positions, grid, highres)
        return self._decode_features(encoding, self._decoder(highres))

    def decode_to_conditioning(
        self,
        codes: Codes,
        *,
        positions: IntegerRows | None = None,
        grid: tuple[int, int] | None = None,
        highres: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns what a diffusion U-Net reads.

        That is the prompt embeddings [B, N, E], and the pooled embedding [B, P] or None.
        """
        conditioning = self._conditioning(highres)
        with self.inference():
            return conditioning(self.decode_to_features(codes, positions=positions, grid=grid, highres=highres))

    # Parts that may not be there yet.

    def part(self, name: Part) -> nn.Module:
        """Returns that part and fetches it if needed. Raises `ConfigError` where the tokenizer has none."""
        if getattr(self, name) is None:
            if self.lazy_parts is None:
                raise ConfigError(f"this tokenizer has no {name.replace('_', ' ')}; load one that has it")
            sections, part = self.lazy_parts.fetch(name, self)
            self._config = dataclasses.replace(self.config, **sections)
            setattr(self, name, part)
        return getattr(self, name)

    def require_decoder(self) -> LavitDecoder:
        """Returns the decoder and fetches it if needed. Raises `ConfigError` where the tokenizer has none."""
        return self._decoder(highres=False)

    def _decoder(self, highres: bool) -> LavitDecoder:
        decoder = self.part("highres_decoder" if highres else "decoder")
        assert isinstance(decoder, LavitDecoder)
        return decoder

    def _build_decoder(self, config: DecoderConfig) -> LavitDecoder:
        assert isinstance(config, LavitDecoderConfig)
        dithered = self.config.selector.dither > 0
        return LavitDecoder(self.grid, self.config.codebook.dim, self.backbone.embed_dim, config, dithered=dithered)

    def _merge(self, path: FeaturePath, lavit_softmax: bool) -> Merge:
        if path not in ("codes", "understanding"):
            raise ConfigError(f"path is {path!r}, expected 'codes' or 'understanding'")
        merger = self.merger if path == "codes" else self.part("understanding")
        return functools.partial(merger, exact=True) if lavit_softmax else merger

    def _width(self, path: FeaturePath) -> int:
        return self.backbone.embed_dim if path == "codes" else self.config.understanding_dim

    def _encoding_for(
        self, codes: Codes, positions: IntegerRows | None, grid: tuple[int, int] | None, highres: bool
    ) -> Encoding:
        return self._as_encoding(codes, positions, grid, None if positions is None else self._decoder(highres))

    def _conditioning(self, highres: bool) -> Conditioning:
        conditioning = self._decoder(highres).conditions
        if conditioning is None:
            raise CodeError(
                "this tokenizer has neither a pixel head nor conditions for a diffusion model, "
                "so it cannot make images; decode_to_features(codes) gives patch features"
            )
        return conditioning

    # Diffusion models.

    def _diffusion_decoder(self, highres: bool) -> DiffusionDecoder:
        self._conditioning(highres)  # refuses a tokenizer that cannot make images
        decoder = self.config.highres_decoder if highres else self.config.decoder
        key = decoder.conditions.folder, self.device, self.dtype
        if key not in self._diffusion_decoders:
            if self.origin is None:
                raise CheckpointError(
                    "this tokenizer was not loaded from a folder, so it has no diffusion model; load a saved one"
                )
            # models for another device or dtype are not needed any more
            kept = {other: model for other, model in self._diffusion_decoders.items() if other[1:] == key[1:]}
            self._diffusion_decoders = kept | {key: self._load_diffusion(self.origin, *key)}
        return self._diffusion_decoders[key]

    def _load_diffusion(
        self, origin: Origin, folder: str, device: torch.device, dtype: torch.dtype
    ) -> DiffusionDecoder:
        if self.lazy_parts is not None:
            return self.lazy_parts.diffusion_decoder(folder, device, dtype)
        return DiffusionDecoder.load(origin.folder(folder, FILES), device=device, dtype=dtype)

    def _save_subfolders(self, folder: Path) -> Sequence[str]:
        """Copies the diffusion models of a checkpoint on this machine and returns the names of those below `folder`."""
        decoders = (self.config.decoder, self.config.highres_decoder)
        names = [decoder.conditions.folder for decoder in decoders if decoder and decoder.conditions]
        source = self.origin.path if self.origin is not None and self.lazy_parts is None else None
        try:
            for name in names:
                if source is not None and (source / name).is_dir() and source != folder.absolute():
                    shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
        except (OSError, shutil.Error) as error:
            raise CheckpointError(f"can't copy the diffusion model to {folder}: {error}") from error
        return [name for name in names if (folder / name).is_dir()]
