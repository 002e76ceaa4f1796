"""LaVIT's released files as an ordinary checkpoint (`dyntok import-lavit`)."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dyntok.checkpoint.hub import Origin
from dyntok.errors import ConfigError
from dyntok.lavit.release import DIFFUSION_FOLDERS, FILES, is_release, load_release
from dyntok.lavit.tokenizer import LavitTokenizer, Part

PARTS = ("decoder", "highres_decoder", "understanding", "pixels")


def convert(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    parts: Sequence[str] | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | str = torch.float32,
    revision: str | None = None,
) -> LavitTokenizer:
    """Writes the released files as an ordinary checkpoint and returns the tokenizer.

    The license note that must stay with the weights is written, too.

    parts: which of `PARTS` to convert besides the encoder; None: everything that is there. "pixels" are the diffusion
        models of the decoders (extra `diffusion`).
    config, dtype: see `load_release`. revision: of the repository on the hub.

    Raises as `load_release` does, `ConfigError` on an unknown part, pixels without a decoder or a folder that holds
    released files, and `CheckpointError` where the folder can't be written.
    """
    _check_parts(parts)
    if is_release(folder):
        raise ConfigError(
            f"{folder} holds released files, which would hide the new checkpoint; write it to another folder"
        )
    tokenizer, folder = load_release(Origin(source, revision), config=config, dtype=dtype), Path(folder).expanduser()
    assert tokenizer.origin is not None and tokenizer.lazy_parts is not None
    released = tokenizer.origin.path

    def wanted(name: str, path: str) -> bool:
        return name in parts if parts is not None else released is None or (released / path).exists()

    taken: list[Part] = [name for name in ("decoder", "highres_decoder", "understanding") if wanted(name, FILES[name])]
    for name in taken:
        tokenizer.part(name)
    models = [model for name, model in DIFFUSION_FOLDERS.items() if name in taken and wanted("pixels", model)]
    for model in models:  # first, because more can go wrong here
        tokenizer.lazy_parts.diffusion_decoder(model, torch.device("cpu"), tokenizer.dtype).save(folder / model)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _check_parts(parts: Sequence[str] | None) -> None:
    if unknown := sorted(set(parts or ()) - set(PARTS)):
        raise ConfigError(f"there is no part {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    if parts is not None and "pixels" in parts and not set(parts) & set(DIFFUSION_FOLDERS):
        raise ConfigError(f"pixels were requested without a decoder; add {' or '.join(DIFFUSION_FOLDERS)}")
