"""What a run is about: its input, output, tokenizer and options, opened and checked before anything is written."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import dyntok
from dyntok.addresses import StorageOptions, locate, redact
from dyntok.batch.inputs.open import open_input
from dyntok.batch.inputs.samples import Input
from dyntok.batch.manifest import Manifest, describe_run, refuse_foreign
from dyntok.batch.options import BatchOptions, EngineOptions
from dyntok.batch.shapes import check_shapes
from dyntok.batch.storage import Output
from dyntok.device import device_kind
from dyntok.errors import ConfigError
from dyntok.loading import load
from dyntok.precision import dtype_name
from dyntok.structure import require_path, require_type
from dyntok.tokenizer import DynamicVisualTokenizer


@dataclass(frozen=True)
class Task:
    """An input, an output and a tokenizer, opened; nothing is written yet."""

    source: Input
    output: Output
    tokenizer: DynamicVisualTokenizer
    options: BatchOptions
    description: dict[str, Any]

    def manifest(self, *, create: bool = True) -> Manifest:
        """Opens the manifest of the output."""
        return Manifest(self.output, self.description, create=create)


def prepare(
    inputs: str | os.PathLike | Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    model: str | os.PathLike | DynamicVisualTokenizer | None = None,
    options: BatchOptions | None = None,
    engine: EngineOptions,
    storage: StorageOptions | None = None,
) -> Task:
    """Opens everything that a run needs; arguments and errors are those of `tokenize`.

    engine: with its devices filled in, as `with_devices` does.
    """
    options, storage = options or BatchOptions(), storage or {}
    require_type("options", options, BatchOptions, "BatchOptions")
    given = [inputs] if isinstance(inputs, str | os.PathLike) else inputs
    require_type("inputs", given, Iterable, "a path, or a list of paths")
    for path in (given := list(given)):
        require_path("an input", path)
    sources = [os.fspath(path) for path in given]
    target = Output(output, storage)
    for name in sources:
        fs, root = locate(name, storage)
        if type(fs) is type(target.fs) and f"{target.root}/".startswith(f"{root.rstrip('/')}/"):
            raise ConfigError(
                f"the output {redact(target.address)} lies inside the input {redact(name)}; name another folder"
            )
    refuse_foreign(target)
    source = open_input(sources, options, storage)
    if isinstance(model, DynamicVisualTokenizer):
        tokenizer = model
    else:
        tokenizer = load(model, dtype=options.dtype, batch_invariant=options.batch_invariant)
    check_shapes(tokenizer, options)
    description = describe_run(sources, source.kind, tokenizer.fingerprint, options, dyntok.__version__)
    description["options"] |= _arithmetic(tokenizer, options)
    description["device"] = _device_kinds(engine, tokenizer)
    return Task(source, target, tokenizer, options, description)


def _arithmetic(tokenizer: DynamicVisualTokenizer, options: BatchOptions) -> dict[str, Any]:
    """Returns the options that are properties of the tokenizer, which a program may have given.

    Raises `ConfigError` where the options ask for others than it has.
    """
    own = {"dtype": dtype_name(tokenizer.dtype), "batch_invariant": tokenizer.batch_invariant}
    for name, value in own.items():
        if getattr(options, name) not in (getattr(BatchOptions, name), value):
            raise ConfigError(
                f"{name} is {getattr(options, name)!r} in the options, but the given tokenizer has {value!r}; "
                f"leave it out, or load the tokenizer with it: dyntok.load(..., {name}={getattr(options, name)!r})"
            )
    return own


def _device_kinds(engine: EngineOptions, tokenizer: DynamicVisualTokenizer) -> str:
    """Returns the kinds of the devices that will encode, such as "cpu"."""
    if engine.name == "ray":
        from dyntok.batch.engines.ray import kinds_in_cluster  # imports Ray, which only this engine needs

        kinds = kinds_in_cluster(engine.address)
    else:
        kinds = {device_kind(device) for device in engine.devices or (str(tokenizer.device),)}
    return " and ".join(sorted(kinds))
