"""LaVIT's released files as a tokenizer, one file at a time, when it is needed.

The weights are under the Llama 2 license; nothing of them is in this package. Not here: the diffusion models
(`diffusion.py`).
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dyntok.checkpoint.assemble import check_finite, check_state_dict, fill, new_on_meta
from dyntok.checkpoint.hub import Origin
from dyntok.device import check_device
from dyntok.errors import CheckpointError
from dyntok.lavit.decoder import LavitDecoder
from dyntok.lavit.diffusion import DiffusionDecoder
from dyntok.lavit.sizes import Sizes, decoder_config, encoder_config
from dyntok.lavit.states import backbone_state, decoder_state, encoder_state, understanding_state
from dyntok.lavit.tokenizer import LavitTokenizer, Part
from dyntok.lavit.understanding import Understanding
from dyntok.lavit.weights import ReleasedWeights
from dyntok.precision import cast, dtype_named

RELEASES = ("rain1011/LaVIT-7B-v2",)
FILES = {
    "backbone": "visual_tokenizer/eva_vitg_psz14.bin",
    "encoder": "visual_tokenizer/tokenizer_encoder.bin",
    "decoder": "visual_tokenizer/tokenizer_decoder.bin",
    "highres_decoder": "visual_tokenizer/highres_tokenizer_decoder.bin",
    "understanding": "language_model/visual_weight.bin",
}
DIFFUSION_FOLDERS = {"decoder": "pixel_decoding", "highres_decoder": "highres_pixel_decoding"}

_CARD = """---
license: llama2
library_name: dyntok
tags: [image-tokenizer, dyntok, lavit]
---
# LaVIT's visual tokenizer as a dyntok checkpoint

The weights of LaVIT (ICLR 2024, arXiv 2309.04669) as its authors released them, from {source},
converted by `dyntok import-lavit`.

**License.** These weights are under the LLAMA 2 Community License and its acceptable use policy, as stated by their
authors: Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights
Reserved. Whoever passes this folder on passes the license on with it. dyntok's own Apache-2.0 license covers the code
that reads the weights, not the weights.
"""

_DIFFUSION_FILES = ("unet/*", "vae/*", "scheduler/*", "uncond_embeddings.bin")
_Fetched: TypeAlias = tuple[dict[str, Any], nn.Module, dict[str, Tensor]]  # sections, part, its tensors
_ADVICE = "Check heads and vit_heads in config=, or fetch the file again."


def is_release(name_or_path: str | os.PathLike) -> bool:
    """Returns whether this names LaVIT's released files.

    They are a repository on the hub, or a folder laid out like it, which need not be complete.
    """
    folder = Path(os.path.expanduser(name_or_path))
    if not folder.is_dir():
        return str(name_or_path) in RELEASES
    return any((folder / file).is_file() for file in FILES.values())


def load_release(
    origin: Origin,
    *,
    config: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
) -> LavitTokenizer:
    """Returns LaVIT's tokenizer from its released files, in a folder or on the hub.

    origin: a folder laid out like the repository, or the repository.

    Only the backbone and the encoder are fetched now (about 3 GB); a decoder, the understanding path and the diffusion
    models follow when they are first needed. config: see `Sizes`; head counts must be given where they are not the
    released ones.

    Raises `CheckpointError` on a file that can't be fetched, holds anything but tensors, or lacks a tensor or has one
    too many, and `ConfigError` on a config that does not fit the files.
    """
    device, dtype, sizes = check_device(device), dtype_named(dtype), Sizes.of(config)
    backbone = ReleasedWeights.read(origin.file(FILES["backbone"]))
    origin = origin.pinned(backbone.file)
    encoder = ReleasedWeights.read(origin.file(FILES["encoder"]))
    whole = encoder_config(backbone, encoder, sizes)
    model, rest = backbone_state(backbone), encoder_state(encoder)
    for weights in (backbone, encoder):
        weights.check_all_used()
    tokenizer = new_on_meta(lambda: LavitTokenizer(whole))
    with _naming(backbone.file):
        check_state_dict(tokenizer.backbone.model, model, _ADVICE)
        check_finite(model)
    with _naming(encoder.file):
        fill(tokenizer, {f"backbone.model.{name}": value for name, value in model.items()} | rest, _ADVICE)
    tokenizer.origin, tokenizer.card = origin, _card(origin)
    tokenizer.lazy_parts = ReleasedParts(origin, sizes)
    return tokenizer.in_precision(dtype).to(device).eval()


class ReleasedParts:
    """The parts that are not needed for encoding."""

    def __init__(self, origin: Origin, sizes: Sizes) -> None:
        self.origin, self.sizes = origin, sizes

    def fetch(self, name: Part, tokenizer: LavitTokenizer) -> tuple[Mapping[str, Any], nn.Module]:
        """Returns the sections of the configuration that change, and the part."""
        weights = ReleasedWeights.read(self.origin.file(FILES[name]))
        if name == "understanding":
            section, part, state = self._understanding(weights, tokenizer)
        else:
            section, part, state = self._decoder(name, weights, tokenizer)
        weights.check_all_used()
        with _naming(weights.file):
            fill(part, state, _ADVICE)
        return section, cast(part, tokenizer.dtype).to(tokenizer.device).train(tokenizer.training)

    def _understanding(self, weights: ReleasedWeights, tokenizer: LavitTokenizer) -> _Fetched:
        out_dim = weights.shape("vit_proj.weight")[0]
        self.sizes.check(weights.file, llm_dim=out_dim)
        part = new_on_meta(lambda: Understanding(tokenizer.backbone.embed_dim, tokenizer.config.merger, out_dim))
        return {"understanding_dim": out_dim}, part, understanding_state(weights)

    def _decoder(self, name: Part, weights: ReleasedWeights, tokenizer: LavitTokenizer) -> _Fetched:
        width, code_dim = tokenizer.backbone.embed_dim, tokenizer.config.codebook.dim
        config = decoder_config(weights, self.sizes, width, DIFFUSION_FOLDERS[name])
        part = new_on_meta(lambda: LavitDecoder(tokenizer.grid, code_dim, width, config))
        return {name: config}, part, decoder_state(weights)

    def diffusion_decoder(self, folder: str, device: torch.device, dtype: torch.dtype) -> DiffusionDecoder:
        """Returns the diffusion model in that folder."""
        return DiffusionDecoder.load(
            self.origin.folder(folder, _DIFFUSION_FILES), pickles=True, device=device, dtype=dtype
        )


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Adds the file's name to a `CheckpointError`."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _card(origin: Origin) -> str:
    source = "a local copy" if origin.path is not None else f"{origin.name_or_path} at {origin.revision}"
    return _CARD.format(source=source)
