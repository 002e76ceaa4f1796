"""The tokenizer: all parts together, and the doors users come through. The only file that knows all the parts."""

import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from huggingface_hub import ModelHubMixin
from PIL import Image
from torch import Tensor, nn

from dyntok import checkpoint
from dyntok.backbone import Backbone
from dyntok.codebook import Codebook
from dyntok.config import TokenizerConfig
from dyntok.decoder import Decoder
from dyntok.encoding import Encoding
from dyntok.errors import CheckpointError, CodeError, ConfigError, FingerprintError, ImageError
from dyntok.features import Features
from dyntok.image import ImageSource, to_image, to_pixels
from dyntok.merger import Merger, cu_seqlens_of
from dyntok.pixels import PixelHead
from dyntok.selector import KeepPolicy, Selector

BUNDLED = Path(__file__).parent / "pretrained" / "tiny"

_Rows: TypeAlias = Iterable[Tensor | Sequence[int]]  # one row of integers per image
Codes: TypeAlias = Encoding | _Rows

_Policy: TypeAlias = Callable[[Tensor, Sequence[int]], Tensor]  # log-probabilities [B, N, 2], places in the call -> keep mask [B, N]
_CHUNK = 32  # images at once, where they need not be taken singly


class DynamicVisualTokenizer(
    nn.Module, ModelHubMixin, library_name="dyntok", tags=["image-tokenizer"], model_card_template=checkpoint.MODEL_CARD
):
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
        merger = config.merger
        self.merger = Merger(width, merger.depth, merger.num_heads, merger.mlp_ratio, norm=merger.norm, init_scale=merger.init_scale)
        self.projection = nn.Linear(width, code_dim)
        if config.codebook.projection == "mlp":
            self.projection = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, code_dim))
        self.codebook = Codebook(config.codebook.size, code_dim)
        decoder = config.decoder
        decoder_dim = decoder.embed_dim or width
        self.decoder = Decoder(
            self.backbone.grid, code_dim, decoder_dim, width, decoder.depth, decoder.num_heads, decoder.mlp_ratio,
            placement=decoder.placement, conv=decoder.conv, head=decoder.head, init_scale=decoder.init_scale,
        )  # fmt: skip
        features_dim = decoder_dim if decoder.head == "none" else width
        self.pixel_head = PixelHead(features_dim, self.backbone.grid, self.backbone.patch_size) if decoder.pixels else None
        self._fingerprint: tuple[list, str] | None = None  # of which state, and the hash

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
    ) -> Encoding:
        """Codes of one image or many. How many per image: see `KeepPolicy`; by default as many as the selector finds worth it.

        images: paths, bytes, PIL images, uint8 arrays [H, W(, C)], tensors [3, H, W] (see `image.py`); one or an iterable of them.
        errors: "skip" leaves bad images out; `Encoding.failures` lists them and `source_index` says where each row came from.
        exact: merge by the softmax formula of LaVIT's released code (dense, slower).

        Raises `ImageError` on the first bad image (unless skipped), `ConfigError` on contradictory options.
        """
        if errors not in ("raise", "skip"):
            raise ConfigError(f"errors is {errors!r}, expected 'raise' or 'skip'")
        policy = KeepPolicy(budget, threshold, sample, max_tokens)
        failures: list[tuple[int, ImageError]] = []
        source_index: list[int] = []
        parts = []
        for places, pixels in self._chunks(images, None if errors == "raise" else failures):
            source_index += places
            parts.append(self._encode(pixels, policy, places, exact))
        return self._pack(parts, failures, source_index)

    def decode(self, codes: Codes, *, positions: _Rows | None = None, grid: tuple[int, int] | None = None) -> list[Image.Image]:
        """Images from an `Encoding`, or from codes alone as an LLM writes them: one list of integers per image.

        With positions the picture is sharper; without, the decoder guesses them from the order. grid: (rows, columns), where it is not
        the tokenizer's own.

        Raises `CodeError` on codes or positions out of range, an image without codes or with more codes than patches, or a tokenizer
        without a pixel head; `FingerprintError` on codes of another tokenizer.
        """
        encoding = self._as_encoding(codes, positions, grid)
        pieces = (encoding[i : i + _CHUNK] for i in range(0, len(encoding), _CHUNK))
        return [to_image(pixels, self.config.image) for piece in pieces for pixels in self.decode_pixels(piece)]

    # The raw door: tensors in, tensors out.

    @property
    def device(self) -> torch.device:
        return self.codebook.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.codebook.embedding.dtype

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.backbone.grid

    @property
    def _chunk(self) -> int:
        # matrix products round differently at different shapes: on a CPU every image is computed alone, always at the same shapes
        return 1 if self.device.type == "cpu" else _CHUNK

    def encode_pixels(
        self,
        pixels: Tensor,
        *,
        budget: int | float | None = None,
        threshold: float | None = None,
        sample: torch.Generator | None = None,
        max_tokens: int | None = None,
        keep: Tensor | None = None,
        exact: bool = False,
    ) -> Encoding:
        """Codes of normalised pixels, float [B, 3, S, S]; the options are those of `encode`, and one more:

        keep: bool [B, N], the patches to keep, chosen by the caller instead of the selector; at least one per image. It takes the place
            of every other choice, `max_tokens` included.

        Raises `ImageError` on other pixels, `ConfigError` on contradictory options or a mask that does not fit.
        """
        policy: _Policy = KeepPolicy(budget, threshold, sample, max_tokens)
        self._check_pixels(pixels)
        if keep is not None:
            if policy != KeepPolicy():
                raise ConfigError("keep was given with budget, threshold, sample or max_tokens, expected the mask alone")
            policy = self._given(keep, len(pixels))
        places = range(len(pixels))
        parts = []
        for start in range(0, len(pixels), self._chunk):
            rows = slice(start, start + self._chunk)
            # a copy, always laid out and aligned alike: how a kernel rounds may depend on both
            part = pixels[rows].clone(memory_format=torch.contiguous_format)
            parts.append(self._encode(part, policy, places[rows], exact))
        return self._pack(parts, [], list(places))

    def features(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        budget: int | float | None = None,
        threshold: float | None = None,
        sample: torch.Generator | None = None,
        max_tokens: int | None = None,
        exact: bool = False,
    ) -> Features:
        """Continuous merged tokens, not quantized, for LLMs that read embeddings; options and errors are those of `encode`."""
        policy = KeepPolicy(budget, threshold, sample, max_tokens)
        parts = [self._merge(pixels, policy, places, exact) for places, pixels in self._chunks(images, None)]
        return Features(*self._join(parts, torch.empty(0, self.backbone.embed_dim, device=self.device, dtype=self.dtype)))

    def decode_features(self, codes: Codes, *, positions: _Rows | None = None, grid: tuple[int, int] | None = None) -> Tensor:
        """Patch features [B, N, D] from codes; arguments and errors as in `decode`, but no pixel head is needed."""
        encoding = self._as_encoding(codes, positions, grid)
        with _evaluating(self):
            vectors = self.codebook.lookup(encoding.packed_codes)
            return self.decoder(vectors, encoding.cu_seqlens, encoding.packed_positions)

    def decode_pixels(self, codes: Codes, *, positions: _Rows | None = None, grid: tuple[int, int] | None = None) -> Tensor:
        """Normalised pixels [B, 3, S, S] from codes; arguments and errors as in `decode`."""
        if self.pixel_head is None:
            raise CodeError("this tokenizer has no pixel head, so it can't make images; decode_features(codes) gives patch features")
        with _evaluating(self):
            return self.pixel_head(self.decode_features(codes, positions=positions, grid=grid))

    def _given(self, keep: Tensor, images: int) -> _Policy:
        """A policy that keeps what the caller's mask says."""
        shape = [images, self.grid[0] * self.grid[1]]
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool or list(keep.shape) != shape:
            got = f"{keep.dtype} {list(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
            raise ConfigError(f"keep is {got}, expected a bool tensor {shape}: one entry for each patch of each image, in raster order")
        if not keep.any(1).all():
            image = int((~keep.any(1)).nonzero()[0])
            raise ConfigError(f"keep drops every patch of image {image}, expected at least one that is kept")
        keep = keep.to(self.device)
        return lambda log_probs, places: keep[places[0] : places[0] + len(log_probs)]

    def _chunks(
        self, images: ImageSource | Iterable[ImageSource], failures: list[tuple[int, ImageError]] | None
    ) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """(places among the inputs, normalised pixels [b, 3, S, S]) of readable images; the others go to `failures`, or raise if None."""

        def readable() -> Iterator[tuple[int, Tensor]]:
            for place, image in enumerate([images] if _is_single(images) else images):
                try:
                    yield place, to_pixels(image, self.config.image)
                except ImageError as error:
                    if failures is None:
                        raise
                    failures.append((place, error))

        for chunk in batched(readable(), self._chunk):
            places, pixels = zip(*chunk, strict=True)
            yield places, torch.stack(pixels)

    def _merge(self, pixels: Tensor, policy: _Policy, places: Sequence[int], exact: bool) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] -> merged tokens [T, D], keep mask [B, N]"""
        with _evaluating(self):
            features = self.backbone(pixels.to(self.device, self.dtype))
            keep = policy(self.selector(features), places)
            return self.merger(features, keep, exact=exact), keep

    def _encode(self, pixels: Tensor, policy: _Policy, places: Sequence[int], exact: bool) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] -> codes [T], keep mask [B, N]"""
        merged, keep = self._merge(pixels, policy, places, exact)
        with _evaluating(self):
            return self.codebook(self.projection(merged)), keep

    def _join(self, parts: list[tuple[Tensor, Tensor]], nothing: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(rows, keep mask) pairs -> all rows [T, ...], their positions [T], cu_seqlens [B+1], grids [B, 2]; `nothing` is rows [0, ...]."""
        no_image = torch.empty(0, self.grid[0] * self.grid[1], dtype=torch.bool, device=self.device)
        rows, masks = zip((nothing, no_image), *parts, strict=True)
        keep = torch.cat(masks)
        return torch.cat(rows), keep.nonzero()[:, 1], cu_seqlens_of(keep), torch.tensor(self.grid, device=self.device).repeat(len(keep), 1)

    def _pack(self, parts: list[tuple[Tensor, Tensor]], failures: list[tuple[int, ImageError]], source_index: list[int]) -> Encoding:
        packed = self._join(parts, torch.empty(0, dtype=torch.long, device=self.device))
        source = torch.tensor(source_index, dtype=torch.long, device=self.device)
        return Encoding(*packed, self.fingerprint, tuple(failures), source)

    def _check_pixels(self, pixels: Tensor) -> None:
        shape = (3, self.config.image.img_size, self.config.image.img_size)
        if not isinstance(pixels, Tensor) or tuple(pixels.shape[1:]) != shape or not pixels.is_floating_point():
            got = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
            raise ImageError(f"pixels are {got}, expected normalised floats [B, {', '.join(map(str, shape))}]; encode() prepares images")
        if not pixels.isfinite().all():
            raise ImageError("pixels hold NaN or infinite values, expected finite ones")

    def _as_encoding(self, codes: Codes, positions: _Rows | None, grid: tuple[int, int] | None) -> Encoding:
        if not isinstance(codes, Encoding):
            if not isinstance(codes, Iterable):
                raise CodeError(f"codes are {type(codes).__name__}, expected an Encoding or one list of integers per image")
            codes = Encoding.pack(codes, positions, grid or self.grid)
        elif positions is not None or grid is not None:
            raise CodeError("positions= or grid= was given with an Encoding, which has its own; give them with plain lists of codes only")
        if codes.fingerprint not in (None, self.fingerprint):
            written, own = codes.fingerprint, self.fingerprint
            raise FingerprintError(f"these codes were written by the tokenizer {written}, this one is {own}; load the one that wrote them")
        if (codes.grids != torch.tensor(self.grid, device=codes.device)).any():
            raise CodeError(f"an image has another grid than {self.grid[0]} x {self.grid[1]}, which is all that this tokenizer decodes")
        return codes.to(self.device)

    # Checkpoints.

    @property
    def fingerprint(self) -> str:
        """Hash of configuration and weights: whatever stores codes stores it beside them.

        Kept until weights change in any way that PyTorch notices; writing through `.data` is not one.
        """
        tensors = self.state_dict().values()
        state = [(t.data_ptr(), t.dtype, t._version) for t in tensors if not t.is_inference()]
        if self._fingerprint is None or self._fingerprint[0] != state or len(state) < len(tensors):
            self._fingerprint = state, checkpoint.fingerprint(self.config, self.state_dict())
        return self._fingerprint[1]

    def _apply(self, *args, **kwargs) -> "DynamicVisualTokenizer":
        self._fingerprint = None  # moving to another dtype and back changes values, but no version
        return super()._apply(*args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        dtype: torch.dtype | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **push_options,
    ) -> str | None:
        """Write `config.json`, `model.safetensors` and, where there is none, a short model card into a folder.

        dtype: of the stored weights. Codes are defined on what is stored: rounding to half precision makes another tokenizer.
        push_to_hub: send the folder's checkpoint to the hub as `repo_id` (default: the folder's name); options as in `push_to_hub`.

        Returns the address of the hub's commit, if there is one. Raises `CheckpointError`.
        """
        if push_options and not push_to_hub:
            raise TypeError(f"save_pretrained got {', '.join(push_options)}, which only push_to_hub=True has a use for")
        folder = Path(save_directory)
        checkpoint.save(folder, self.config, self.state_dict(), dtype=dtype)
        if not (folder / "README.md").exists():
            self.generate_model_card().save(folder / "README.md")
        return checkpoint.upload(folder, repo_id or folder.absolute().name, **push_options) if push_to_hub else None

    def push_to_hub(self, repo_id: str, *, dtype: torch.dtype | None = None, **options) -> str:
        """Send the tokenizer to the hub with a short model card; to send your own card, use `save_pretrained(..., push_to_hub=True)`.

        options: private, token, branch, create_pr, commit_message. Returns the commit's address. Raises `CheckpointError`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, dtype=dtype)
            return checkpoint.upload(folder, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "DynamicVisualTokenizer":
        """From a folder or a hub repository, in evaluation mode. Raises `CheckpointError` on anything that does not fit."""
        options = {"revision": revision, "local_files_only": local_files_only, "token": token}
        folder = checkpoint.resolve(name_or_path, cache_dir=cache_dir, force_download=force_download, **options)
        config, state = checkpoint.load(folder)
        try:
            tokenizer = cls(config)
        except ConfigError as error:
            raise CheckpointError(f"no tokenizer can be made from {folder / checkpoint.CONFIG_NAME}: {error}") from error
        checkpoint.check_state_dict(tokenizer, state)
        tokenizer.load_state_dict(state)
        return tokenizer.to(device, dtype).eval()


def load(name_or_path: str | os.PathLike | None = None, **options) -> DynamicVisualTokenizer:
    """A tokenizer by hub name or folder; without a name the bundled `tiny`, which needs no network.

    Options are those of `DynamicVisualTokenizer.from_pretrained`: revision, device, dtype, local_files_only, ...
    """
    return DynamicVisualTokenizer.from_pretrained(BUNDLED if name_or_path is None else name_or_path, **options)


def batched(items: Iterable, size: int) -> Iterator[tuple]:
    """Tuples of `size` items, the last of what is left."""
    items = iter(items)
    while chunk := tuple(itertools.islice(items, size)):
        yield chunk


def _is_single(images: object) -> bool:
    if isinstance(images, torch.Tensor | np.ndarray):
        return images.ndim < 4
    # strings, bytes and open files can be iterated over, but not image by image
    return isinstance(images, str | bytes | os.PathLike | Image.Image) or hasattr(images, "read") or not isinstance(images, Iterable)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Without gradients, and in evaluation mode while it lasts."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True
