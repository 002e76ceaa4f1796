"""Checkpoints on disk: a folder with `config.json` and safetensors.

No pickle is ever read, and nothing here builds a model: `save` takes and `load` returns a configuration and named
tensors. Not here: the way to a folder on the Hugging Face hub (`hub.py`).
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dyntok.checkpoint.assemble import few
from dyntok.checkpoint.fingerprint import dense, fingerprint, rounded
from dyntok.config import TokenizerConfig
from dyntok.errors import CheckpointError, ConfigError
from dyntok.structure import without_unused

C = TypeVar("C", bound=TokenizerConfig)

FORMAT = "dyntok"
FORMAT_VERSION = 1
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
IMAGES_NAME = "preprocessor_config.json"  # by this name AutoImageProcessor of transformers looks for it

_MAX_CONFIG_BYTES = 1 << 20
_MAX_SHARD_BYTES = 5_000_000_000
_MAX_INDEX_BYTES = 16 << 20
_SHARD = re.compile(r"model[\w.-]*\.safetensors")
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_TEMPORARY = re.compile(rf"({WEIGHTS.pattern}|(preprocessor_)?config\.json)\.tmp")
_STORED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def save(
    folder: str | os.PathLike,
    config: TokenizerConfig,
    state_dict: Mapping[str, Tensor],
    *,
    kind: str = "dynamic",
    dtype: torch.dtype | None = None,
) -> str:
    """Writes a checkpoint into `folder` and returns the fingerprint.

    The folder is made if needed, and a checkpoint in it is replaced.

    kind: of the tokenizer, for whoever loads it. The `Auto` classes of transformers find a "dynamic" one.
    dtype: of the stored floating-point tensors; by default they are stored as they are.

    Everything is written under temporary names first. While files are moved into place the folder has no config.json,
    so that a reader sees the old checkpoint, the new one or a clear error, never a mixture.

    Raises `CheckpointError` on what can't be stored, such as a value too large for `dtype`, and on a full disk.
    """
    folder = Path(folder)
    if not state_dict:
        raise CheckpointError(f"there are no tensors to save in {folder}")
    if dtype is not None and dtype not in _STORED:
        raise ConfigError(f"can't store weights as {dtype}, expected one of {', '.join(map(str, _STORED))}")
    for name, tensor in state_dict.items():
        dense(name, tensor)
    header: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dyntok_version": _version(),
        "kind": kind,
        "fingerprint": fingerprint(config, state_dict, dtype=dtype),
        "config": config.to_dict(),
    }
    auto: dict[str, Any] = {}
    if kind == "dynamic":
        header = {"model_type": FORMAT, **header}
        auto[IMAGES_NAME] = {"image_processor_type": "DyntokImageProcessor", "image": header["config"]["image"]}
    split = split_state_dict_into_shards_factory(
        dict(state_dict),
        get_storage_size=lambda t: t.numel() * (dtype if dtype and t.is_floating_point() else t.dtype).itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=_MAX_SHARD_BYTES,
    )
    more = [INDEX_NAME] if split.is_sharded else []
    names = [*split.filename_to_tensors, *more, *auto, CONFIG_NAME]  # config.json last
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in {**auto, CONFIG_NAME: header}.items():
            _write_json(folder / f"{name}.tmp", values)
        for shard, members in split.filename_to_tensors.items():
            tensors = _separate({name: _stored(name, state_dict[name], dtype) for name in members})
            save_file(tensors, folder / f"{shard}.tmp", metadata={"format": "pt"})
            # safetensors writes files that only their owner can read
            shutil.copymode(folder / f"{CONFIG_NAME}.tmp", folder / f"{shard}.tmp")
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            _write_json(folder / f"{INDEX_NAME}.tmp", index)
        (folder / CONFIG_NAME).unlink(missing_ok=True)
        (folder / IMAGES_NAME).unlink(missing_ok=True)
        _remove(folder, WEIGHTS)
        for name in names:
            os.replace(folder / f"{name}.tmp", folder / name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"can't write the checkpoint to {folder}: {error}") from error
    finally:
        _remove(folder, _TEMPORARY)
    return str(header["fingerprint"])


def load(
    folder: str | os.PathLike,
    config_class: type[C] = TokenizerConfig,  # type: ignore[assignment]  # PEP 696 defaults need Python 3.13
    kind: str | None = None,
) -> tuple[C, dict[str, Tensor]]:
    """Returns the configuration and the tensors, on the CPU in the dtype they are stored in.

    kind: of the tokenizer that is expected; None accepts every kind.

    Raises `CheckpointError` on files that are missing, damaged or of another kind.
    """
    folder = Path(folder)
    header = read_header(folder)
    written = header.get("kind", kind)
    if kind not in (None, written):
        raise CheckpointError(
            f"{folder} holds a tokenizer of the kind {str(written)[:40]!r}, expected {kind!r}; "
            "load it with dyntok.load, or upgrade: pip install -U dyntok"
        )
    return _build_config(folder, header, config_class), _load_weights(folder)


def read_header(folder: Path) -> dict[str, Any]:
    """Returns the content of config.json.

    Raises `CheckpointError` where it was not written by dyntok, or by a newer version.
    """
    path = folder / CONFIG_NAME
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; expected one with {CONFIG_NAME} and {WEIGHTS_NAME}")
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG_NAME}; expected the folder that save_pretrained wrote")
    header = _read_json(path, _MAX_CONFIG_BYTES)
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f'{path} is not of dyntok; expected "format": "{FORMAT}", got {str(header.get("format"))[:40]!r}'
        )
    version = header.get("format_version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path} states format_version {str(version)[:40]!r}, expected a positive integer")
    if version > FORMAT_VERSION:
        wrote = str(header.get("dyntok_version"))[:40]
        raise CheckpointError(f"{path} has format {version}, written by dyntok {wrote}; upgrade: pip install -U dyntok")
    return header


def _build_config(folder: Path, header: dict[str, Any], config_class: type[C]) -> C:
    try:
        return config_class.from_dict(without_unused(config_class, header.get("config")))
    except (ConfigError, ArithmeticError) as error:
        raise CheckpointError(f"{folder / CONFIG_NAME}: {error}") from error


def _load_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS_NAME).is_file():
        return _load_tensors(folder / WEIGHTS_NAME)
    if not (folder / INDEX_NAME).is_file():
        raise CheckpointError(f"{folder} holds no weights; expected {WEIGHTS_NAME}, or {INDEX_NAME} and its shards")
    index = _read_json(folder / INDEX_NAME, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{folder / INDEX_NAME} has no weight_map")
    for shard in index.values():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{folder / INDEX_NAME} names the shard {str(shard)[:80]!r}, expected a file name model*.safetensors"
            )
    shards = sorted(set(index.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(shards)} shards: {few(missing)}; download or copy it again"
        )
    state = {}
    for shard in shards:
        tensors = _load_tensors(folder / shard)
        listed = {name for name, where in index.items() if where == shard}
        if listed != set(tensors):
            differing = few(sorted(listed ^ set(tensors)))
            raise CheckpointError(
                f"{folder / shard} and {INDEX_NAME} disagree about {differing}; download or copy both again"
            )
        state.update(tensors)
    return state


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file ({error}); download or copy it again"
        ) from error


def _read_json(path: Path, limit: int) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            raw = file.read(limit + 1)
        if len(raw) > limit:
            raise CheckpointError(f"{path} is larger than {limit} bytes, which no checkpoint of dyntok needs")
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return rounded(name, dense(name, tensor), dtype).cpu().contiguous()


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share memory; a copy keeps every name of the state dict in the file.
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return separate


def _remove(folder: Path, pattern: re.Pattern) -> None:
    for path in folder.glob("*"):
        if pattern.fullmatch(path.name):
            path.unlink()


def _version() -> str:
    try:
        return metadata.version("dyntok")
    except metadata.PackageNotFoundError:
        return "unknown"
