"""`load` makes a tokenizer from a name or a folder. Also here: the tokenizers that come with the package."""

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dyntok.checkpoint.format import CONFIG_NAME, read_header
from dyntok.checkpoint.hub import Origin
from dyntok.device import check_device
from dyntok.errors import CheckpointError, ConfigError
from dyntok.lavit.release import is_release, load_release
from dyntok.lavit.tokenizer import LavitTokenizer
from dyntok.precision import dtype_named
from dyntok.tokenizer import DynamicVisualTokenizer

PRETRAINED = Path(__file__).parent / "pretrained"  # holds a folder for each bundled tokenizer
BUNDLED = PRETRAINED / "flex"  # what `load` takes by default
EXAMPLE_IMAGE = Path(__file__).parent / "assets" / "astronaut.jpg"

_LAVIT_SECTIONS = ("highres_decoder", "understanding_dim")


def load(
    name_or_path: str | os.PathLike | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    force_download: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    batch_invariant: bool = False,
) -> DynamicVisualTokenizer:
    """Returns a tokenizer, ready to use.

    >>> tok = dyntok.load()                                  # the bundled "flex"; needs no network
    >>> tok = dyntok.load("org/name", device="cuda")         # from the Hugging Face hub
    >>> tok = dyntok.load("my-run/tokenizer")                # from a folder

    name_or_path: a bundled tokenizer (see `list_models`), a folder, or a repository on the hub. LaVIT's released files
        ("rain1011/LaVIT-7B-v2", or a folder laid out like it) give a `LavitTokenizer`. A bundled name wins over a
        folder of the same name.
    config: head counts of LaVIT's files, see `lavit.sizes.Sizes`.
    revision, local_files_only, token, cache_dir, force_download: as in the hub's client.
    device: cpu, cuda, cuda:1, mps, ...
    dtype: fp32, bf16, fp16 or a torch.dtype; see `DynamicVisualTokenizer.in_precision`.
    batch_invariant: compute every image alone on a GPU, too, as a CPU always does. Its codes then do not depend on the
        batch size, the other images or its place among them, in any dtype. It is slower. An attribute of the same name
        changes it later.

    Raises `ConfigError` on a device that does not exist, before anything is read, and `CheckpointError` on files that
    are missing or do not fit.
    """
    device, dtype = check_device(device), dtype_named(dtype)
    if config is not None and name_or_path is None:
        raise ConfigError("config= is for LaVIT's released files; name their folder or repository, too")
    source = BUNDLED if name_or_path is None else _resolve_name(name_or_path)
    origin = Origin(source, revision, local_files_only, token, cache_dir, force_download)
    if config is not None or is_release(source):
        tokenizer: DynamicVisualTokenizer = load_release(origin, config=config, device=device, dtype=dtype)
    else:
        folder, origin = origin.resolve()
        lavit = _kind(read_header(folder)) == LavitTokenizer.kind
        tokenizer_class = LavitTokenizer if lavit else DynamicVisualTokenizer
        tokenizer = tokenizer_class.from_origin(origin, device=device, dtype=dtype)
    tokenizer.batch_invariant = batch_invariant
    return tokenizer


def list_models() -> dict[str, str]:
    """Returns the names of the bundled tokenizers, each with a line about it.

    >>> dyntok.list_models()
    {'flex': 'any shape, up to 256 patches of 8 pixels, 16384 codes', 'tiny': '128 x 128 pixels, 8192 codes'}
    """
    return {name: _description(PRETRAINED / name) for name in _bundled_names()}


def example_image() -> Image.Image:
    """Returns the photograph that comes with the package: 256 x 256 pixels, in the public domain."""
    with Image.open(EXAMPLE_IMAGE) as image:
        return image.convert("RGB")


def _bundled_names() -> list[str]:
    return sorted(path.parent.name for path in PRETRAINED.glob(f"*/{CONFIG_NAME}"))


def _description(folder: Path) -> str:
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["config"]
    image, codes = config["image"], config["codebook"]["size"]
    shape = f"{image['img_size']} x {image['img_size']} pixels"
    if image.get("max_patches") is not None:
        shape = f"any shape, up to {image['max_patches']} patches of {image['patch_size']} pixels"
    return f"{shape}, {codes} codes"


def _resolve_name(source: str | os.PathLike) -> str | os.PathLike:
    """Returns the folder of a bundled tokenizer, or else the source as it is.

    Raises `CheckpointError` on a plain name that is neither bundled nor a folder: the names of the hub contain a slash.
    """
    names = _bundled_names()
    if source in names:
        return PRETRAINED / source
    if not isinstance(source, str) or "/" in source or os.sep in source or os.path.exists(os.path.expanduser(source)):
        return source
    similar = difflib.get_close_matches(source, names, 1)
    hint = f" Did you mean {similar[0]!r}?" if similar else ""
    raise CheckpointError(
        f"there is no tokenizer {source!r}: no folder of that name exists here, and the bundled tokenizers are "
        f"{', '.join(names)}.{hint} Give one of these, the path of a folder, "
        "or a repository on the Hugging Face hub such as 'org/name'."
    )


def _kind(header: Mapping[str, Any]) -> object:
    """Returns the kind of tokenizer that config.json describes.

    Earlier versions did not write the kind, only the sections of LaVIT's tokenizer.
    """
    config = header.get("config")
    if "kind" in header or not isinstance(config, dict):
        return header.get("kind")
    decoder = config.get("decoder")
    conditioned = isinstance(decoder, dict) and decoder.get("conditions") is not None
    lavit = conditioned or any(config.get(name) is not None for name in _LAVIT_SECTIONS)
    return LavitTokenizer.kind if lavit else DynamicVisualTokenizer.kind
