"""The parts of a tokenizer put together: from pixels to codes or tokens, and from codes to patch features.

Not here: the methods that users call (`tokenizer.py`), and what a part computes (`model/`).
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import Self

from dyntok.checkpoint.pretrained import PretrainedModule
from dyntok.chunks import Chunk, Rows, finite_images, require_finite
from dyntok.config import MAX_PATCHES, DecoderConfig, TokenizerConfig
from dyntok.encoding import Encoding
from dyntok.errors import CodeError, ConfigError, ImageError
from dyntok.fitting import target_size
from dyntok.image import normalize
from dyntok.layout import MAX_SIDE, canonical_mask
from dyntok.margins import close_choices, close_codes, shares
from dyntok.model.backbone import Backbone
from dyntok.model.codebook import Codebook
from dyntok.model.decoder import Decoder
from dyntok.model.merger import build_merger
from dyntok.model.pixel_head import PixelHead
from dyntok.model.selector import Selector
from dyntok.policy import KeepPolicy, ranks
from dyntok.precision import HALF
from dyntok.ragged import cu_seqlens_from_mask
from dyntok.refine import Pictures, check_rounds, refine_codes
from dyntok.structure import require_type
from dyntok.target import normalized, shortest_mask, visible
from dyntok.validation import refuse
from dyntok_kernels import compact
from dyntok_kernels.limits import HEAD_DIMS, HEAD_DIMS_IN_WORDS, MAX_CODE_DIM

Choice: TypeAlias = Callable[[Tensor, Sequence[int]], Tensor]  # log-probabilities [B, N, 2], input indices -> keep mask
_MAX_THREADS = 16  # that decode pictures for a GPU, by default
Merge: TypeAlias = Callable[..., Tensor]  # features [B, N, D], keep mask [B, N], total=T, grid= -> tokens [T, D]


class TokenizerNetwork(PretrainedModule):
    """Backbone, selector, merger, projection, codebook, decoder and pixel head of a tokenizer, and their sizes."""

    def __init__(self, config: TokenizerConfig, *, pretrained_backbone: bool = False) -> None:
        """Makes an untrained tokenizer. pretrained_backbone: fetch the backbone's weights from timm's hub."""
        require_type("config", config, TokenizerConfig, "a TokenizerConfig, such as TokenizerConfig.preset('tiny')")
        super().__init__(config)
        self.backbone = Backbone(config.backbone, config.image.img_size, pretrained=pretrained_backbone)
        width, code_dim = self.backbone.embed_dim, config.codebook.dim
        self._check_any_grid()
        table = self.backbone.grid if config.selector.bias == "table" else None
        self.selector = Selector(width, table, config.selector.dither, config.selector.first)
        self.merger = build_merger(width, config.merger)
        self.projection: nn.Linear | nn.Sequential = nn.Linear(width, code_dim)
        if config.codebook.projection == "mlp":
            self.projection = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, code_dim))
        self.codebook = Codebook(config.codebook.size, code_dim)
        self.decoder = None if config.decoder is None else self._build_decoder(config.decoder)
        self.pixel_head: PixelHead | None = None
        if config.decoder is not None and config.decoder.pixels and self.decoder is not None:
            self.pixel_head = PixelHead(self.decoder.out_dim, self.backbone.patch_size)

    @property
    def vocab_size(self) -> int:
        """Returns the number of codes, K; the same as `len(tok)`."""
        return len(self.codebook.embedding)

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def max_tokens(self) -> int:
        """Returns the number of patches of an image, and so of its codes, at most: unless `encode` is given
        `max_patches` or `size`.
        """
        return self.config.image.max_patches or self.grid[0] * self.grid[1]

    @property
    def any_grid(self) -> bool:
        """Returns whether images have grids of their own; otherwise every image has the same."""
        return self.config.image.max_patches is not None

    @property
    def image_size(self) -> int:
        """Returns the side in pixels of the square that images are fitted to, unless they keep their shape."""
        return target_size(self.config.image)[0]

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches of a square image, and of codes that come without a grid."""
        if self.any_grid:
            rows, columns = target_size(self.config.image)
            return rows // self.backbone.patch_size, columns // self.backbone.patch_size
        return self.backbone.grid

    @property
    def device(self) -> torch.device:  # type: ignore[override]  # accelerate and timm expect the same
        """Returns the device of the weights."""
        return self.codebook.embedding.device

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Returns the dtype of most weights; see `in_precision`."""
        return next(self.backbone.parameters()).dtype

    @property
    def name(self) -> str:
        """Returns the name or folder that it was loaded from, or "untrained"."""
        return "untrained" if self.origin is None else self.origin.name

    def __repr__(self) -> str:
        shape = f"{self.image_size} x {self.image_size} pixels, {self.grid[0]} x {self.grid[1]} patches"
        if self.any_grid:
            shape = f"images of any shape, up to {self.max_tokens} patches"
        facts = f"{self.name}, {shape}, {self.vocab_size} codes"
        return f"{type(self).__name__}({facts}, fingerprint {self.fingerprint})"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if moved.device.type == "cuda":
            self._check_gpu(moved.dtype)
        fixed = [
            (part, name, buffer)
            for part in self.modules()
            for name, buffer in part.named_buffers(recurse=False)
            if name in part._non_persistent_buffers_set and buffer.dtype == torch.float32
        ]
        super()._apply(fn, recurse)
        for part, name, buffer in fixed:
            now = part._buffers[name]
            # such as the frequencies of positions: no later cast would bring back what is rounded
            if now is not None and now.dtype in HALF and not buffer.is_meta:
                part._buffers[name] = buffer.to(now.device)
        return self

    def _check_gpu(self, dtype: torch.dtype) -> None:
        """Raises `ConfigError` where the dtype or a size is one that the GPU kernels do not take."""
        config, width = self.config, self.backbone.embed_dim
        if dtype == torch.float64:
            raise ConfigError(
                "the weights are float64, and a GPU takes fp32, bf16 and fp16; use one of these, or a CPU"
            )
        if config.codebook.dim > MAX_CODE_DIM:
            raise ConfigError(
                f"codebook.dim is {config.codebook.dim}, and a GPU searches codes of at most {MAX_CODE_DIM} channels; "
                "choose fewer, or use a CPU"
            )
        heads = {}
        if config.merger.kind == "blocks" and config.merger.depth:
            heads["merger"] = (width, config.merger.num_heads)
        for part, section in vars(config).items():  # LaVIT has a second decoder
            if isinstance(section, DecoderConfig) and section.placement == "rank" and section.depth:
                heads[part] = (section.embed_dim or width, section.num_heads)
        for part, (channels, count) in heads.items():
            if channels // count not in HEAD_DIMS:
                raise ConfigError(
                    f"{part}.num_heads is {count}, so its heads have {channels // count} of {channels} channels, "
                    f"and a GPU takes {HEAD_DIMS_IN_WORDS}; choose another number, or use a CPU"
                )

    def require_decoder(self) -> Decoder:
        """Returns the decoder. Raises `ConfigError` where the tokenizer has none."""
        if self.decoder is None:
            raise ConfigError("this tokenizer has no decoder, so it can only encode; load one that has a decoder")
        return self.decoder

    def _build_decoder(self, config: DecoderConfig) -> Decoder:
        dithered = self.config.selector.dither > 0
        return Decoder(self.grid, self.config.codebook.dim, self.backbone.embed_dim, config, dithered=dithered)

    def _check_any_grid(self) -> None:
        """Raises `ConfigError` where the configuration allows any grid and one of the parts does not."""
        config, backbone = self.config, self.backbone
        if config.image.max_patches is None:
            return
        if config.image.patch_size != backbone.patch_size:
            raise ConfigError(
                f"image.patch_size is {config.image.patch_size}, but the backbone's patches have "
                f"{backbone.patch_size} pixels; use that number"
            )
        fixed = {
            "backbone.kwargs.dynamic_img_size: true": not backbone.any_grid,
            "selector.bias: fixed": config.selector.dither > 0 and config.selector.bias == "table",
            "decoder.position: rotary": config.decoder is not None and config.decoder.position == "table",
        }
        if wrong := [option for option, missing in fixed.items() if missing]:
            raise ConfigError(f"image.max_patches needs parts that take any grid; set {', '.join(wrong)}")

    def _require_pixel_head(self) -> PixelHead:
        if self.pixel_head is None:
            rest = "; decode_to_features(codes) gives patch features" if self.decoder else "; it can only encode"
            raise CodeError(f"this tokenizer has no pixel head, so it cannot make images{rest}")
        return self.pixel_head

    def _check_pixels(self, pixels: Tensor) -> None:
        shape, limits = f"3, {self.image_size}, {self.image_size}", ""
        sides: tuple[int, ...] = (self.image_size, self.image_size)
        fits = isinstance(pixels, Tensor) and (pixels.is_floating_point() or pixels.dtype == torch.uint8)
        fits = fits and pixels.dim() == 4 and pixels.shape[1] == 3
        if self.any_grid:
            patch = self.backbone.patch_size
            shape = "3, H, W"
            limits = f" with sides that are multiples of {patch}, and at most {MAX_PATCHES:,} patches"
            sides = tuple(pixels.shape[2:]) if fits else ()
            fits = fits and all(side and side % patch == 0 and side <= MAX_SIDE * patch for side in sides)
            fits = fits and sides[0] * sides[1] <= MAX_PATCHES * patch**2
        if not fits or tuple(pixels.shape[2:]) != sides:
            got = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
            raise ImageError(
                f"pixels are {got}, expected normalized floats [B, {shape}]{limits}, or uint8; encode() prepares images"
            )
        # on a GPU the host would wait for it; the network finds such an image a moment later
        if pixels.device.type == "cpu" and pixels.is_floating_point() and not pixels.isfinite().all():
            raise ImageError("pixels hold NaN or infinite values, expected finite ones")

    def _check_grids(self, grids: Tensor) -> None:
        """Raises `CodeError` on a grid, int64 [B, 2], that the tokenizer does not decode."""
        if self.any_grid:  # without a limit, a file with one code could ask for any amount of memory
            expected = f"expected sides of at most {MAX_SIDE} patches"
            refuse((grids > MAX_SIDE).any(1), lambda i: f"the grid of image {i} is {grids[i].tolist()}, {expected}")
        elif (grids != torch.tensor(self.grid, device=grids.device)).any():
            rows, columns = self.grid
            raise CodeError(f"an image has another grid than {rows} x {columns}, the only one this tokenizer decodes")

    def _at_once(self, images: int) -> int:
        # matrix products round differently at different shapes; what must not depend on them is computed alone
        if type(images) is not int or images < 1:
            raise ConfigError(f"batch_size is {images!r}, expected an int of at least 1")
        return 1 if self.batch_invariant or self.device.type == "cpu" else images

    def _decoding_threads(self, workers: int | None) -> int:
        if workers is None:
            return 0 if self.device.type == "cpu" else min(_MAX_THREADS, os.cpu_count() or 1)
        if type(workers) is not int or workers < 0:
            raise ConfigError(f"workers is {workers!r}, expected an int of 0 or more")
        return workers

    def _on_device(self, chunk: Chunk) -> Chunk:
        """Returns the chunk with normalized pixels on the device. What is sent there is not waited for."""
        pixels, to_gpu = chunk.pixels, self.device.type == "cuda"
        if to_gpu and pixels.device.type == "cpu":
            pixels = pixels.pin_memory()
        pixels = pixels.to(self.device, non_blocking=to_gpu)
        if pixels.dtype == torch.uint8:
            pixels = normalize(pixels, self.config.image)
        return dataclasses.replace(chunk, pixels=pixels)

    def _choice(self, pixels: Tensor, keep_mask: Tensor | None, policy: KeepPolicy) -> Choice:
        """Returns the policy, or a choice that follows the given mask."""
        if keep_mask is None:
            return policy
        if policy != KeepPolicy():
            raise ConfigError("keep_mask was given with other options of a policy, expected the mask alone")
        self._check_pixels(pixels)
        rows, columns = self.backbone.grid_of(pixels)
        shape = [len(pixels), rows * columns]
        if not isinstance(keep_mask, Tensor) or keep_mask.dtype != torch.bool or list(keep_mask.shape) != shape:
            got = f"{keep_mask.dtype} {list(keep_mask.shape)}" if isinstance(keep_mask, Tensor) else type(keep_mask)
            raise ConfigError(f"keep_mask is {got}, expected a bool tensor {shape}: a row of patches for each image")
        if not keep_mask.any(1).all():
            image = int((~keep_mask.any(1)).nonzero()[0])
            raise ConfigError(f"keep_mask drops every patch of image {image}, expected at least one kept patch")
        mask = keep_mask.to(self.device)
        return lambda log_probs, indices: mask[indices[0] : indices[0] + len(log_probs)]

    def _check_choice(self, choice: Choice) -> None:
        if isinstance(choice, KeepPolicy) and choice.psnr is not None and self.pixel_head is None:
            raise ConfigError(f"psnr is {choice.psnr}, but this tokenizer has no pixel head; leave it out")

    def _check_refine(self, refine: int, margins: bool) -> None:
        if not check_rounds(refine, margins=margins):
            return
        if self.pixel_head is None:
            raise ConfigError(f"refine is {refine}, but this tokenizer has no pixel head; leave it out")
        if any(parameter.is_inference() for parameter in self.parameters()):
            raise ConfigError(
                "refine needs derivatives, and these weights were made in torch.inference_mode(); make them outside"
            )

    def _run(
        self, chunk: Chunk, choice: Choice, merge: Merge, *, quantize: bool, margins: bool = False, refine: int = 0
    ) -> Rows:
        """Returns the codes, or else the merged tokens, of a chunk.

        The host reads one result of the device, the lengths, and none where the budget is exact. An image whose numbers
        are not all finite has codes of -1.
        """
        chunk, grid = self._on_device(chunk), self.backbone.grid_of(chunk.pixels)
        with self.inference():
            features = self.backbone(chunk.pixels.to(self.dtype))
            log_probs = self.selector(features, grid)
            if isinstance(choice, KeepPolicy):
                keep = self._keep(choice, chunk, features, log_probs, merge)
            else:
                keep = choice(log_probs, chunk.input_indices)
            count = choice.count(keep.shape[1]) if isinstance(choice, KeepPolicy) else None
            lengths = keep.sum(1).tolist() if count is None else [count] * len(keep)
            tokens = merge(features, keep, total=sum(lengths), grid=grid)
            vectors = self.projection(tokens) if quantize else tokens
            finite = finite_images(features, log_probs, vectors, cu_seqlens_from_mask(keep))
            if quantize:
                finite &= self.codebook.embedding.sum(dtype=torch.float32).isfinite()
            patches = compact(keep)[0][: sum(lengths)].long()
            image, positions = patches // keep.shape[1], patches % keep.shape[1]
            values = vectors
            if quantize:
                codes = self.codebook(vectors)
                if refine:
                    pictures = self._pictures(chunk, features, keep, image, positions)
                    codes, bounded = self._refined(codes, vectors, pictures, refine)
                    finite &= bounded
                values = codes.where(finite[image], -1)
            close = self._margins(vectors, log_probs, keep, chunk, choice) if margins else None
            return Rows(chunk.input_indices, values, positions, lengths, finite, grid, close)

    def _margins(self, vectors: Tensor, log_probs: Tensor, keep: Tensor, chunk: Chunk, choice: Choice) -> Tensor:
        """Returns the shares of close decisions of a chunk, float32 [B, 2]. A given mask and `psnr` have none."""
        choices = torch.zeros_like(keep)
        if isinstance(choice, KeepPolicy) and choice.psnr is None:
            choices = close_choices(choice.distance(log_probs, chunk.input_indices), self.dtype)
        with torch.autocast(vectors.device.type, enabled=False):
            codes = close_codes(vectors, self.codebook.embedding, self.dtype)
        return shares(codes, choices, cu_seqlens_from_mask(keep))

    def _keep(self, policy: KeepPolicy, chunk: Chunk, features: Tensor, log_probs: Tensor, merge: Merge) -> Tensor:
        """Returns the keep mask of a policy with its patches at the places that it allows, bool [B, N]."""
        grid = self.backbone.grid_of(chunk.pixels)
        places = policy.places or self.config.selector.places
        if policy.psnr is None:
            return canonical_mask(policy(log_probs, chunk.input_indices), grid, places)

        def reconstruct(mask: Tensor) -> Tensor:
            keep = canonical_mask(mask, grid, places)
            vectors = self.codebook.lookup(self.codebook(self.projection(merge(features, keep, grid=grid))))
            return self._paint(vectors, cu_seqlens_from_mask(keep), keep.nonzero()[:, 1], grid)

        mask = shortest_mask(
            ranks(log_probs), chunk.pixels, policy.psnr, self.config.image, policy.max_tokens, reconstruct
        )
        return canonical_mask(mask, grid, places)

    def _paint(self, vectors: Tensor, cu_seqlens: Tensor, positions: Tensor, grid: tuple[int, int]) -> Tensor:
        """Returns normalized pixels [B, 3, H, W] from code vectors [T, C] at positions [T]."""
        head, decoder = self._require_pixel_head(), self.require_decoder()
        known = None if decoder.placement == "rank" else positions
        return head(decoder(vectors, cu_seqlens, known, grid=grid), grid)

    def _pictures(self, chunk: Chunk, features: Tensor, keep: Tensor, image: Tensor, positions: Tensor) -> Pictures:
        """Returns what `refine` compares. image, positions: of each token, [T]."""
        grid, cu_seqlens, config = self.backbone.grid_of(chunk.pixels), cu_seqlens_from_mask(keep), self.config.image
        return Pictures(
            visible(chunk.pixels, config),
            features.float(),
            lambda rows: visible(self._paint(rows, cu_seqlens, positions, grid), config),
            lambda painted: self.backbone(normalized(painted, config).to(self.dtype)).float(),
            image,
            torch.stack([positions // grid[1], positions % grid[1]], 1),
            grid,
        )

    def _refined(self, codes: Tensor, vectors: Tensor, pictures: Pictures, rounds: int) -> tuple[Tensor, Tensor]:
        """Returns codes [T] after so many rounds, and whether all numbers of a picture were finite, bool [B]."""
        rows = self.codebook.embedding
        rows = rows if rows.dtype == torch.float64 else rows.float()
        codes, error = refine_codes(codes, vectors, rows, pictures, rounds)
        return codes, error.isfinite()

    def _decode_features(self, encoding: Encoding, decoder: Decoder) -> Tensor:
        grid = self._one_grid(encoding)
        with self.inference():
            vectors = self.codebook.lookup(encoding.packed_codes)
            features = decoder(vectors, encoding.cu_seqlens, encoding.packed_positions, grid=grid)
            return require_finite(features, self.dtype)

    def _one_grid(self, encoding: Encoding) -> tuple[int, int]:
        grids = encoding.grids.unique(dim=0).tolist()
        if len(grids) > 1:
            raise CodeError(
                f"the images have {len(grids)} different grids, expected one in a batch of tensors; decode() takes any"
            )
        return tuple(grids[0]) if grids else self.grid
