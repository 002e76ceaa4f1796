"""A `VisualProcessor` on disk, beside its language model: its options as JSON, and where its three parts are."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dyntok.checkpoint.hub import Origin
from dyntok.errors import CheckpointError, ConfigError, MissingDependencyError
from dyntok.loading import load
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.vocab import VOCAB_FILE, VisualVocab

PROCESSOR_FILE = "processor_config.json"  # by this name AutoProcessor of transformers looks for it
VISUAL = "visual"  # the folder of the tokenizer of pictures; config.json beside it is the language model's

_SAVED = ("budget", "threshold", "max_tokens", "fit", "max_patches", "size", "placeholder", "visual_tokens")
_CALLERS = ("local_paths", "fetch")  # what a server allows; no saved file decides that
_HUB = ("revision", "local_files_only", "token", "cache_dir", "force_download")
_OF_AUTO = ("trust_remote_code", "_from_auto", "_commit_hash")  # AutoProcessor passes these to every class


def save_parts(
    folder: str | os.PathLike,
    tokenizer: Any,
    visual: DynamicVisualTokenizer,
    vocab: VisualVocab,
    options: Mapping[str, Any],
) -> None:
    """Writes the parts of a processor, and its options for `AutoProcessor`, into the folder of a language model."""
    folder = Path(folder).expanduser()
    tokenizer.save_pretrained(folder)
    vocab.save_pretrained(folder)
    visual.save_pretrained(folder / VISUAL)
    saved = {"processor_class": "VisualProcessor", **options}
    text = json.dumps(saved, indent=2, default=lambda number: number.item())  # numbers of NumPy
    (folder / PROCESSOR_FILE).write_text(text + "\n", encoding="utf-8")


def load_parts(
    name: str | os.PathLike, given: Mapping[str, Any]
) -> tuple[Any, DynamicVisualTokenizer, VisualVocab, dict[str, Any]]:
    """Returns tokenizer, tokenizer of pictures, vocabulary and the constructor's options; given: of `from_pretrained`.

    Raises `CheckpointError`, `ConfigError`.
    """
    if unknown := sorted(set(given) - {*_SAVED, *_CALLERS, *_HUB, *_OF_AUTO, "device"}):
        known = ", ".join([*_SAVED, *_CALLERS, "device", *_HUB])
        raise ConfigError(f"{', '.join(unknown)}: no options of a processor of pictures, expected {known}")
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of("transformers", "transformers") from error

    hub = {option: given[option] for option in _HUB if given.get(option) is not None}
    origin = Origin(name, **hub)
    visual = origin.path if origin.path and not (origin.path / VISUAL).is_dir() else origin.folder(VISUAL)
    options = _saved(origin) | {option: given[option] for option in (*_SAVED, *_CALLERS) if option in given}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(origin.path or name), **hub)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} holds no tokenizer of a language model that transformers can load "
            f"({(str(error).splitlines() or [''])[0]}); VisualProcessor.save_pretrained writes one"
        ) from error
    return (
        tokenizer,
        load(str(visual), device=given.get("device", "cpu")),
        VisualVocab.from_pretrained(origin.file(VOCAB_FILE).parent),
        options,
    )


def _saved(origin: Origin) -> dict[str, Any]:
    """Returns the options that were saved; none where the parts were put into a folder one by one."""
    if origin.path is not None and not (origin.path / PROCESSOR_FILE).is_file():
        return {}
    path = origin.file(PROCESSOR_FILE)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"can't read {path}: {error}") from error
    if not isinstance(values, dict) or values.pop("processor_class", None) != "VisualProcessor":
        raise CheckpointError(f"{path} belongs to another processor; VisualProcessor.save_pretrained writes it")
    if unknown := sorted(set(values) - set(_SAVED)):
        raise CheckpointError(f"{path} holds {', '.join(unknown)}, expected some of {', '.join(_SAVED)}")
    return values
