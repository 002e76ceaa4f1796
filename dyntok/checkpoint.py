"""Checkpoints: a folder of `config.json` and safetensors, its fingerprint, and the way to one on the Hugging Face hub.

No pickle is ever read, and nothing here builds a model: `save` takes and `load` returns a configuration and named tensors.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
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

_MAX_CONFIG_BYTES = 1 << 20
_MAX_INDEX_BYTES = 16 << 20
_CHUNK = 1 << 22  # elements hashed at a time
_SHARD = re.compile(r"model[\w.-]*\.safetensors")
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_TEMPORARY = re.compile(rf"({_WEIGHTS.pattern}|config\.json)\.tmp")
_WANTED = {"allow_patterns": [CONFIG_NAME, "model*.safetensors", INDEX_NAME, "README.md"], "ignore_patterns": ["*/*"]}
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
        split = huggingface_hub.split_state_dict_into_shards_factory(
            dict(state_dict),
            get_storage_size=lambda t: t.numel() * (dtype if dtype and t.is_floating_point() else t.dtype).itemsize,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ConfigError(f"max_shard_size is {max_shard_size!r}, expected bytes or a string such as '5GB' ({error})") from error
    names = [*split.filename_to_tensors, *([INDEX_NAME] if split.is_sharded else []), CONFIG_NAME]  # config.json last
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for shard, members in split.filename_to_tensors.items():
            tensors = _separate({name: _stored(name, state_dict[name], dtype) for name in members})
            save_file(tensors, folder / f"{shard}.tmp", metadata={"format": "pt"})
        if split.is_sharded:
            _write_json(folder / f"{INDEX_NAME}.tmp", {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
        _write_json(folder / f"{CONFIG_NAME}.tmp", header)
        (folder / CONFIG_NAME).unlink(missing_ok=True)
        _remove(folder, _WEIGHTS)
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
    config = _build_config(folder, _read_header(folder))
    return config, _load_weights(folder)


def recorded_fingerprint(folder: str | os.PathLike) -> str | None:
    """The fingerprint as config.json states it, without reading the weights; None where it states none."""
    value = _read_header(Path(folder)).get("fingerprint")
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"{Path(folder) / CONFIG_NAME} states a fingerprint of type {type(value).__name__}, expected a string")
    return value


def fingerprint(config: TokenizerConfig, state_dict: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> str:
    """16 hexadecimal digits (SHA-256) over the configuration and every tensor's name, shape and values.

    Floating tensors count as their float32 values, so a checkpoint stored in fp16 and its float32 upcast agree. With `dtype`: the
    fingerprint they would have after being stored as that. Read piece by piece; no copy of the model is made.
    """
    try:
        digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False).encode())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the configuration can't be written as JSON: {error}") from error
    for name in sorted(state_dict):
        tensor = _checked(name, state_dict[name])
        kind = "float32" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
        digest.update(f"\n{json.dumps([name, kind, list(tensor.shape)])}\n".encode())
        for piece in tensor.reshape(-1).split(_CHUNK):
            if tensor.is_floating_point():
                piece = _cast(name, piece, dtype).to(torch.float32)
            array = piece.cpu().numpy()
            digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False))
    return digest.hexdigest()[:16]


def check_state_dict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
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
        raise CheckpointError(f"the weights do not fit the configuration: {told}. Use the config.json that was saved with them.")


def resolve(
    name_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    force_download: bool = False,
) -> Path:
    """The folder of a checkpoint: an existing folder as it is, else the hub repository `org/name`, downloaded into the hub's cache.

    Fetches config.json first and the weights only when it is a dyntok checkpoint. Raises `CheckpointError`, which says the ways out.
    """
    path = os.path.expanduser(name_or_path)
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path) or not isinstance(name_or_path, str):
        raise CheckpointError(f"{path} is {'a file' if os.path.exists(path) else 'not there'}; expected the folder of a checkpoint")
    options = {"local_files_only": local_files_only, "token": token, "cache_dir": cache_dir, "force_download": force_download}
    try:
        folder = Path(huggingface_hub.snapshot_download(name_or_path, revision=revision, allow_patterns=[CONFIG_NAME], **options))
        if not (folder / CONFIG_NAME).is_file():
            raise CheckpointError(f"it has no {CONFIG_NAME}, so it is no dyntok checkpoint")
        _read_header(folder)
        commit = folder.name  # a branch may have moved since config.json was fetched
        return Path(huggingface_hub.snapshot_download(name_or_path, revision=commit, **_WANTED, **options))
    except CheckpointError as error:
        raise CheckpointError(f"{name_or_path} on the hub can't be used: {error}") from error
    except Exception as error:  # from the hub's client, whose HTTP library, and so its errors, change between versions
        raise CheckpointError(_hub_trouble(name_or_path, revision, local_files_only, error)) from error


def upload(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload a dyntok checkpoint",
) -> str:
    """Sends the checkpoint in `folder` and its README.md, in one commit, to a hub repository that is made if need be.

    Takes the place of a checkpoint there; other files stay. Returns the address of the commit, or of the pull request.
    Raises `CheckpointError`.
    """
    names = [path.name for path in Path(folder).iterdir() if path.name in (CONFIG_NAME, "README.md") or _WEIGHTS.fullmatch(path.name)]
    try:
        api = huggingface_hub.HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # weights in another number of shards would be taken for the new ones
        stale = [name for name in api.list_repo_files(repo_id, revision=branch) if _WEIGHTS.fullmatch(name) and name not in names]
        operations = [huggingface_hub.CommitOperationDelete(name) for name in stale]
        operations += [huggingface_hub.CommitOperationAdd(name, Path(folder) / name) for name in names]
        commit = api.create_commit(repo_id, operations, commit_message=commit_message, revision=branch, create_pr=create_pr)
    except Exception as error:  # as in `resolve`
        raise CheckpointError(f"can't upload {folder} to the hub as {repo_id!r}: {_first_line(error)}") from error
    return commit.pr_url or commit.commit_url


def _hub_trouble(name: str, revision: str | None, local_files_only: bool, error: Exception) -> str:
    if isinstance(error, HFValidationError):
        return f"{name!r} is neither a folder on this machine nor the name of a hub repository, such as 'org/name'"
    looked_for = f"looked for the hub repository {name!r}" + (f" at revision {revision!r}" if revision else "")
    if isinstance(error, GatedRepoError):
        why = "it is gated; ask for access on its page, then pass token=... or run `hf auth login`"
    elif isinstance(error, RepositoryNotFoundError):
        why = "it does not exist or is private; check the name, pass token=... or run `hf auth login`"
    elif isinstance(error, RevisionNotFoundError):
        why = "it has no such revision"
    elif local_files_only:
        why = "it is not in the local cache, or not all of it; download it once without local_files_only"
    elif isinstance(error, LocalEntryNotFoundError):
        why = "the hub can't be reached and the local cache does not hold it; check the connection and HF_HUB_OFFLINE"
    else:
        why = _first_line(error)
    return f"no folder {name!r} on this machine; {looked_for}: {why}. The path of a checkpoint's folder works without the hub."


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no details').splitlines()[0]}"


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; expected one with {CONFIG_NAME} and {WEIGHTS_NAME}")
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG_NAME}; expected the folder that save_pretrained wrote")
    header = _read_json(path, _MAX_CONFIG_BYTES)
    if header.get("format") != FORMAT:
        raise CheckpointError(f'{path} is not of dyntok; expected "format": "{FORMAT}", got {str(header.get("format"))[:40]!r}')
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
            raise CheckpointError(f"{folder / INDEX_NAME} names the shard {str(shard)[:80]!r}, expected a file name model*.safetensors")
    shards = sorted(set(index.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(shards)} shards: {_few(missing)}; download or copy it again")
    state = {}
    for shard in shards:
        tensors = _load_tensors(folder / shard)
        listed = {name for name, where in index.items() if where == shard}
        if listed != set(tensors):
            differing = _few(sorted(listed ^ set(tensors)))
            raise CheckpointError(f"{folder / shard} and {INDEX_NAME} disagree about {differing}; download or copy both again")
        state.update(tensors)
    return state


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file ({error}); download or copy it again") from error


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
        raise CheckpointError(f"{name} is no dense tensor with values ({type(tensor).__name__}); only those can be stored")
    return tensor.detach()


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    cast = tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
    if cast is not tensor and not torch.equal(tensor.isfinite(), cast.isfinite()):
        raise CheckpointError(f"{name} has values up to {tensor.abs().max():.3g}, too large for {dtype}; store it as float32 or bfloat16")
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
