"""`dyntok.load`: a tokenizer by name, whatever kind of files it comes in."""

import os
from pathlib import Path
from typing import Any

import torch

from dyntok.errors import ConfigError
from dyntok.lavit import convert as lavit
from dyntok.tokenizer import DynamicVisualTokenizer

BUNDLED = Path(__file__).parent / "pretrained" / "tiny"


def load(
    name_or_path: str | os.PathLike | None = None,
    *,
    config: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    **options,
) -> DynamicVisualTokenizer:
    """A tokenizer by hub name or folder; without a name the bundled `tiny`, which needs no network.

    The name or folder of LaVIT's released files ("rain1011/LaVIT-7B-v2") works, too: see `lavit.load`, to which `config` belongs.
    Other options are those of `DynamicVisualTokenizer.from_pretrained`: revision, dtype, local_files_only, ... Raises `ConfigError` on a
    device that is not there, before anything is read, and `CheckpointError` on files that are missing or do not fit.
    """
    try:
        torch.zeros(1, device=device).item()
    except (
        RuntimeError,
        AssertionError,
        ImportError,
    ) as error:  # by what is missing: a name, a build of PyTorch, a driver, a package
        raise ConfigError(
            f"PyTorch {torch.__version__} has no device {device!s} here; name another, such as cpu, cuda or mps"
        ) from error
    if config is not None and name_or_path is None:
        raise ConfigError("config= tells head counts of LaVIT's files; name their folder or repository, too")
    name = BUNDLED if name_or_path is None else name_or_path
    if config is not None or lavit.is_release(name):
        return lavit.load(name, config=config, device=device, **options)
    return DynamicVisualTokenizer.from_pretrained(name, device=device, **options)
