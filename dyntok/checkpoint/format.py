"""Checkpoints: a folder of `config.json` and safetensors, and its fingerprint.

No pickle is ever read, and nothing here builds a model: `save` takes and `load` returns a configuration and named tensors.
Not here: the way to a folder on the Hugging Face hub (`hub.py`).
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dyntok.config import TokenizerConfig
from dyntok.errors import CheckpointError, ConfigError

FORMAT = "dyntok"
FORMAT_VERSION = 1
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

MODEL_CARD = """---
{{ card_data }}
---

# A dyntok tokenizer

Turns an image into a short sequence of integers whose length follows the picture, and back. `config.json` tells what it is made of.

```python
import dyntok

tok = dyntok.load("...")  # the name of this repository, or its folder
enc = tok.encode("cat.jpg")
```
"""

_ENCODING_SECTIONS = ("image", "backbone", "selector", "merger", "codebook")
READING_PARTS = ("decoder.", "highres_decoder.", "pixel_head.", "understanding.")
_MAX_CONFIG_BYTES = 1 << 20
_MAX_INDEX_BYTES = 16 << 20
_CHUNK = 1 << 22  # elements hashed at a time
_SHARD = re.compile(r"model[\w.-]*\.safetensors")
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_TEMPORARY = re.compile(rf"({WEIGHTS.pattern}|config\.json)\.tmp")
_STORED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def save(
    folder: str | os.PathLike,
    config: TokenizerConfig,
    state_dict: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> str:
    """Writes a checkpoint into `folder` (made if need be), replaces one that is there, and returns the fingerprint.

    Floating tensors are stored as `dtype` where one is given. Everything is written under temporary names first; while files are
    then moved into place the folder has no config.json, so that a reader sees the old checkpoint, the new one or a clear error,
    never a mixture. Raises `CheckpointError` on what can't be stored: a value too large for `dtype`, a full disk.
    """
    folder = Path(folder)
    if not state_dict:
        raise CheckpointError(f"there are no tensors to save in {folder}")
    if dtype is not None and dtype not in _STORED:
        raise ConfigError(f"can't store weights as {dtype}, expected one of {', '.join(map(str, _STORED))}")
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dyntok_version": _version(),
        "fingerprint": fingerprint(config, state_dict, dtype=dtype),
        "config": config.to_dict(),
    }
    try:
        split = split_state_dict_into_shards_factory(
            dict(state_dict),
            get_storage_size=lambda t: t.numel() * (dtype if dtype and t.is_floating_point() else t.dtype).itemsize,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ConfigError(
            f"max_shard_size is {max_shard_size!r}, expected bytes or a string such as '5GB' ({error})"
        ) from error
    names = [*split.filename_to_tensors, *([INDEX_NAME] if split.is_sharded else []), CONFIG_NAME]  # config.json last
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / f"{CONFIG_NAME}.tmp", header)
        for shard, members in split.filename_to_tensors.items():
            tensors = _separate({name: _stored(name, state_dict[name], dtype) for name in members})
            save_file(tensors, folder / f"{shard}.tmp", metadata={"format": "pt"})
            shutil.copymode(
                folder / f"{CONFIG_NAME}.tmp", folder / f"{shard}.tmp"
            )  # safetensors makes files for their owner alone
        if split.is_sharded:
            _write_json(
                folder / f"{INDEX_NAME}.tmp", {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            )
        (folder / CONFIG_NAME).unlink(missing_ok=True)
        _remove(folder, WEIGHTS)
        for name in names:
            os.replace(folder / f"{name}.tmp", folder / name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"can't write the checkpoint to {folder}: {error}") from error
    finally:
        _remove(folder, _TEMPORARY)
    return header["fingerprint"]


def load(folder: str | os.PathLike) -> tuple[TokenizerConfig, dict[str, Tensor]]:
    """The configuration and the tensors, on the CPU in the dtype they are stored in. Raises `CheckpointError`."""
    folder = Path(folder)
    config = _build_config(folder, read_header(folder))
    return config, _load_weights(folder)


def licensed_card(folder: Path) -> str | None:
    """The README.md of a checkpoint, where it names another licence than this package's: such weights carry it along."""
    try:
        with open(folder / "README.md", encoding="utf-8", errors="replace") as file:
            card = file.read(_MAX_CONFIG_BYTES)
    except OSError:
        return None
    licence = re.search(r"^license: *(\S+)", card, re.MULTILINE)
    return card if licence and licence[1] != "apache-2.0" else None


def fingerprint(config: TokenizerConfig, state_dict: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> str:
    """16 hexadecimal digits (SHA-256) over what makes codes and what they mean: sections and tensors from the image to the codebook, by
    name, shape and value. What reads codes (decoders, the pixel head, the understanding path) may change or be missing, and options that
    have their default values do not count, so that a later version with more of them agrees.

    Floating tensors count as their float32 values, so a checkpoint stored in fp16 and its float32 upcast agree. With `dtype`: the
    fingerprint they would have after being stored as that. Read piece by piece; no copy of the model is made.
    """
    try:
        sections = {name: value for name, value in config.stated().items() if name in _ENCODING_SECTIONS}
        digest = hashlib.sha256(json.dumps(sections, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the configuration can't be written as JSON: {error}") from error
    for name in sorted(state_dict):
        tensor = _checked(name, state_dict[name])
        if name.startswith(READING_PARTS):
            continue
        kind = "float32" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
        digest.update(f"\n{json.dumps([name, kind, list(tensor.shape)])}\n".encode())
        for piece in tensor.reshape(-1).split(_CHUNK):
            if tensor.is_floating_point():
                piece = _cast(name, piece, dtype).to(torch.float32)
            array = piece.cpu().numpy()
            digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False))
    return digest.hexdigest()[:16]


def check_state_dict(
    module: nn.Module, state: Mapping[str, Tensor], advice: str = "Use the config.json that was saved with them."
) -> None:
    """Raises a `CheckpointError` that names the tensors which are missing, not expected, or of another shape than the module's."""
    expected = module.state_dict()
    shapes = [
        f"{name} (checkpoint {list(state[name].shape)}, model {list(expected[name].shape)})"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    problems = {
        "missing": [name for name in expected if name not in state],
        "not expected": [name for name in state if name not in expected],
        "of another shape": shapes,
    }
    if any(problems.values()):
        told = "; ".join(f"{len(names)} {what}: {_few(names)}" for what, names in problems.items() if names)
        raise CheckpointError(f"the weights do not fit the configuration: {told}. {advice}")


def read_header(folder: Path) -> dict[str, Any]:
    """What config.json says, if it is one of dyntok in a format known here. Raises `CheckpointError`."""
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


def _build_config(folder: Path, header: dict[str, Any]) -> TokenizerConfig:
    try:
        return TokenizerConfig.from_dict(header.get("config"))
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
            f"{folder} lacks {len(missing)} of {len(shards)} shards: {_few(missing)}; download or copy it again"
        )
    state = {}
    for shard in shards:
        tensors = _load_tensors(folder / shard)
        listed = {name for name, where in index.items() if where == shard}
        if listed != set(tensors):
            differing = _few(sorted(listed ^ set(tensors)))
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


def _checked(name: str, tensor: Any) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.layout != torch.strided:
        raise CheckpointError(
            f"{name} is no dense tensor with values ({type(tensor).__name__}); only those can be stored"
        )
    return tensor.detach()


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    cast = tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
    if cast is not tensor and not torch.equal(tensor.isfinite(), cast.isfinite()):
        raise CheckpointError(
            f"{name} has values up to {tensor.abs().max():.3g}, too large for {dtype}; store it as float32 or bfloat16"
        )
    return cast


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return _cast(name, _checked(name, tensor), dtype).cpu().contiguous()


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


def _few(names: list[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _version() -> str:
    try:
        return metadata.version("dyntok")
    except metadata.PackageNotFoundError:
        return "unknown"
