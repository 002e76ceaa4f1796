"""Writes the page's folder: our own files, the tokenizer as ONNX, its configuration, and onnxruntime-web's files."""

import json
import shutil
import tarfile
from pathlib import Path

from dyntok.errors import CheckpointError, ConfigError
from dyntok.page.graphs import write_graphs
from dyntok.tokenizer import DynamicVisualTokenizer

SITE = Path(__file__).parent / "site"
DEFAULT_RUNTIME = Path("node_modules") / "onnxruntime-web"

_CPU_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
_GPU_FILES = (
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
_MAX_FILE = 100_000_000  # bytes; the largest file of the runtime has 28 million


def write_page(
    tokenizer: DynamicVisualTokenizer,
    folder: str | Path,
    *,
    runtime: str | Path = DEFAULT_RUNTIME,
    webgpu: bool = False,
) -> Path:
    """Write the page and return its folder. Files of an earlier page are replaced, other files stay.

    runtime: the npm package onnxruntime-web: its .tgz file, its folder, or its folder `dist`
    webgpu: also copy the runtime's build for GPUs (27 MB), which the page then prefers

    Raises `ConfigError` where the runtime is missing or the tokenizer makes no pictures, `MissingDependencyError`
    without the extra `export`, and `CheckpointError` where the folder can't be written.
    """
    folder, wanted = Path(folder), _CPU_FILES + (_GPU_FILES if webgpu else ())
    files = _runtime_files(Path(runtime), wanted)
    try:
        for name in ("model", "runtime"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / "runtime" / name).write_bytes(content)
        shutil.copytree(SITE, folder, dirs_exist_ok=True)
        (folder / "page.json").write_text(json.dumps(facts(tokenizer, webgpu), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"can't write the page to {folder}: {error}; give another folder") from error
    write_graphs(tokenizer, folder / "model")
    return folder


def facts(tokenizer: DynamicVisualTokenizer, webgpu: bool) -> dict[str, object]:
    """Returns all that the page has to know about the tokenizer, as plain JSON types."""
    image, selector = tokenizer.config.image, tokenizer.config.selector
    return {
        "name": Path(tokenizer.name).name if Path(tokenizer.name).is_dir() else tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "codes": tokenizer.vocab_size,
        "grid": list(tokenizer.grid),
        "anyGrid": tokenizer.any_grid,
        "patch": tokenizer.backbone.patch_size,
        "maxPatches": image.max_patches,
        "resize": image.resize,
        "size": None if image.size is None else list(image.size),
        "color": image.color,
        "mean": list(image.mean),
        "std": list(image.std),
        "places": selector.places,
        "dithered": selector.dither > 0,
        "webgpu": webgpu,
    }


def _runtime_files(source: Path, wanted: tuple[str, ...]) -> dict[str, bytes]:
    """Returns the wanted files of onnxruntime-web by name."""
    try:
        if source.is_file():
            with tarfile.open(source) as archive:
                members = {Path(member.name).name: member for member in archive if "/dist/" in f"/{member.name}"}
                found = {name: _member(archive, members[name]) for name in wanted if name in members}
        else:
            place = source / "dist" if (source / "dist").is_dir() else source
            found = {name: (place / name).read_bytes() for name in wanted if (place / name).is_file()}
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ConfigError(f"can't read the runtime {source}: {error}; `npm pack onnxruntime-web` gives it") from error
    if missing := [name for name in wanted if name not in found]:
        raise ConfigError(
            f"the runtime {source} lacks {', '.join(missing)}; run `npm pack onnxruntime-web` and give the .tgz file "
            "that it writes (--runtime), or run `npm install onnxruntime-web` in this folder"
        )
    return found


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    if file is None or member.size > _MAX_FILE:
        raise ConfigError(f"{member.name} of the runtime is no file of at most {_MAX_FILE:,} bytes")
    return file.read()
