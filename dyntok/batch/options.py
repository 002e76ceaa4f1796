"""What a run is asked to do: `BatchOptions` decides what is written and is compared when a run resumes.

`EngineOptions` decides only how.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dyntok.errors import ConfigError
from dyntok.ids import Layout
from dyntok.image import DEFAULT_MAX_PIXELS
from dyntok.policy import KeepPolicy
from dyntok.refine import check_rounds
from dyntok.structure import names_of
from dyntok.tokenizer import pair
from dyntok.vocab import VisualVocab

KINDS = ("auto", "folder", "tar", "zip", "parquet", "list")
FORMATS = ("parquet", "webdataset", "megatron")
DTYPES = ("fp32", "bf16", "fp16")
FITS = ("keep", "crop", "squash", "pad")
DECODINGS = ("full", "scaled")
OWN_COLUMNS = {"key", "codes", "positions", "grid", "width", "height", "crop_box", "margins", "fingerprint"}


@dataclass(frozen=True)
class BatchOptions:
    """Raises `ConfigError` on values that do not fit."""

    kind: Literal["auto", "folder", "tar", "zip", "parquet", "list"] = "auto"  # of the input
    format: Literal["parquet", "webdataset", "megatron"] = "parquet"  # of the output
    shard_size: int = 8192  # images in an output shard, at most
    keep_columns: tuple[str, ...] = ()  # extra columns to keep: columns of a table, or extensions such as "txt"
    image_column: str | None = None  # of Parquet; None: the only one that can hold images
    key_column: str | None = None  # of Parquet; None: "key" or "__key__", else file name and row number
    interleaved: bool = False  # several images per row
    budget: int | float | None = None
    threshold: float | None = None
    max_tokens: int | None = None
    psnr: float | None = None  # of the reconstruction, in dB, as in `KeepPolicy`; slower, because it decodes
    places: Literal["free", "map", "lattice"] | None = None  # which keep masks are allowed, as in `KeepPolicy`
    fit: Literal["keep", "crop", "squash", "pad"] | None = None  # how a picture meets its grid, as in `encode`
    max_patches: int | None = None  # of a picture, 64 to 4,096, as in `encode`
    size: int | tuple[int, int] | None = None  # (height, width) in pixels, in place of max_patches
    decoding: Literal["full", "scaled"] | None = None  # of JPEG files, as in `encode`
    max_pixels: int = DEFAULT_MAX_PIXELS  # of an image; larger ones are refused
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    batch_invariant: bool = False  # on a GPU the codes of an image do not depend on its batch; see `dyntok.load`
    refine: int = 0  # rounds that try other codes for a closer picture, as in `encode`; slower, because they decode
    margins: bool = False  # parquet: a column that says how close decisions were; see `Encoding.margins`
    vocab_size: int | None = None  # megatron: entries of the LLM's vocabulary; image start, end and codes follow them
    eod: int | None = None  # megatron: an id of the LLM's vocabulary that ends every document
    layout: Layout | None = None  # megatron: how ids say the places of codes; None: as the tokenizer's masks need it
    text_tokenizer: str | None = None  # megatron: the LLM's tokenizer.json, with which kept columns are written as text

    def __post_init__(self) -> None:
        choices_of = {"kind": KINDS, "format": FORMATS, "dtype": DTYPES}
        choices_of |= {"fit": (None, *FITS), "decoding": (None, *DECODINGS)}
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(map(str, choices))}")
        for name in ("shard_size", "max_pixels"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected an integer of 1 or more")
        object.__setattr__(self, "keep_columns", names_of("keep_columns", self.keep_columns))
        if self.size is not None:
            object.__setattr__(self, "size", pair(tuple(self.size) if isinstance(self.size, list) else self.size))
        taken = sorted(OWN_COLUMNS & set(self.keep_columns))
        if taken or len(set(self.keep_columns)) < len(self.keep_columns):
            raise ConfigError(
                f"keep_columns is {', '.join(self.keep_columns)}; "
                f"expected different names, and none that the output has itself {taken}"
            )
        KeepPolicy(self.budget, self.threshold, max_tokens=self.max_tokens, psnr=self.psnr, places=self.places)
        object.__setattr__(self, "refine", check_rounds(self.refine, margins=self.margins))
        if self.margins and self.format != "parquet":
            raise ConfigError(f"margins are a column of parquet, and format is {self.format!r}; leave margins out")
        if (self.format == "megatron") != (self.vocab_size is not None):
            raise ConfigError(
                "vocab_size belongs to the format megatron, which needs it: how many entries the LLM's vocabulary has"
            )
        if self.eod is not None and not (type(self.eod) is int and 0 <= self.eod < (self.vocab_size or 0)):
            raise ConfigError(
                f"eod is {self.eod!r}, expected an id of the LLM's vocabulary, 0 to vocab_size - 1, "
                "with format megatron"
            )
        if self.format == "megatron":
            VisualVocab.after(self.vocab_size, 1)
            if bool(self.keep_columns) != (self.text_tokenizer is not None):
                raise ConfigError(
                    "megatron files hold ids alone: give keep_columns with the texts and text_tokenizer that encodes "
                    "them, or neither of the two"
                )
        elif (self.layout, self.text_tokenizer) != (None, None):
            raise ConfigError("layout and text_tokenizer belong to the format megatron; leave them out")
        if self.layout not in (None, *get_args(Layout)):
            raise ConfigError(f"layout is {self.layout!r}, expected one of {', '.join(get_args(Layout))}")
        impossible = {"map": ("free",), "lattice": ("free", "map")}.get(self.layout or "", ())
        if self.places in impossible:
            raise ConfigError(
                f"layout {self.layout!r} can't write every mask of places {self.places!r}; leave places out"
            )
        if self.interleaved and self.format == "webdataset":
            raise ConfigError("interleaved rows are written as parquet or megatron, not as webdataset")

    @property
    def policy(self) -> KeepPolicy:
        """Which patches of a picture are kept."""
        places = self.places or (self.layout if self.layout in ("map", "lattice") else None)
        return KeepPolicy(self.budget, self.threshold, max_tokens=self.max_tokens, psnr=self.psnr, places=places)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types only."""
        size = list(self.size) if isinstance(self.size, tuple) else None
        return {**dataclasses.asdict(self), "keep_columns": list(self.keep_columns), "size": size}


@dataclass(frozen=True)
class EngineOptions:
    """How the work is done. Only `time_limit` can change a result. Raises `ConfigError`."""

    name: Literal["local", "ray"] = "local"
    batch_size: int = 32  # images at once, at most
    threads: int | None = (
        None  # of each model process on a CPU; None: all cores, shared among several; 1 in Ray's actors
    )
    time_limit: float = 60.0  # seconds to decode an image, which then is an error; needs decoding processes
    workers: int | None = (
        None  # local: decoding processes; 0: the model's process decodes; None: by the number of cores
    )
    devices: tuple[str, ...] = ()  # local: one model process for each; empty: all GPUs, or the CPU
    address: str | None = None  # ray: of a cluster; None: one of its own on this machine
    actors: int | None = None  # ray: copies of the tokenizer; None: one for each GPU, or for every second core

    def __post_init__(self) -> None:
        if self.name not in ("local", "ray"):
            raise ConfigError(f"engine is {self.name!r}, expected 'local' or 'ray'")
        for name, low in (("workers", 0), ("batch_size", 1), ("threads", 1), ("actors", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < low):
                raise ConfigError(f"{name} is {value!r}, expected an integer of {low} or more")
        if type(self.time_limit) not in (int, float) or not 0 < self.time_limit < float("inf"):
            raise ConfigError(f"time_limit is {self.time_limit!r}, expected a number of seconds above 0")
        object.__setattr__(self, "devices", names_of("devices", self.devices))
        others = {"local": ("address", "actors"), "ray": ("workers", "devices")}[self.name]
        if useless := [name for name in others if getattr(self, name) not in (None, ())]:
            raise ConfigError(
                f"{' and '.join(useless)} given, but the engine {self.name!r} does not use them; leave them out"
            )
