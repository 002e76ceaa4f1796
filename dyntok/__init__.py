"""dyntok: a dynamic discrete visual tokenizer. An image becomes a short sequence of integers, and back.

>>> import dyntok
>>> tok = dyntok.load()
>>> enc = tok.encode(["cat.jpg"])
>>> enc.codes[0], enc.positions[0], enc.lengths
>>> images = tok.decode(enc)

Names are imported on first use, so that `import dyntok` and `dyntok --help` stay fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dyntok.registration import register_with_transformers

if TYPE_CHECKING:
    from dyntok.config import TokenizerConfig as TokenizerConfig
    from dyntok.encoding import Encoding as Encoding
    from dyntok.errors import CheckpointError as CheckpointError
    from dyntok.errors import CodeError as CodeError
    from dyntok.errors import ConfigError as ConfigError
    from dyntok.errors import DyntokError as DyntokError
    from dyntok.errors import FingerprintError as FingerprintError
    from dyntok.errors import ImageError as ImageError
    from dyntok.features import Features as Features
    from dyntok.loading import example_image as example_image
    from dyntok.loading import list_models as list_models
    from dyntok.loading import load as load
    from dyntok.policy import KeepPolicy as KeepPolicy
    from dyntok.tokenizer import DynamicVisualTokenizer as DynamicVisualTokenizer
    from dyntok.vocab import VisualVocab as VisualVocab

__version__ = "0.1.0"

_HOMES = {
    "TokenizerConfig": "config",
    "Encoding": "encoding",
    "CheckpointError": "errors",
    "CodeError": "errors",
    "ConfigError": "errors",
    "DyntokError": "errors",
    "FingerprintError": "errors",
    "ImageError": "errors",
    "Features": "features",
    "example_image": "loading",
    "list_models": "loading",
    "load": "loading",
    "KeepPolicy": "policy",
    "DynamicVisualTokenizer": "tokenizer",
    "VisualVocab": "vocab",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dyntok' has no attribute {name!r}")
    value = getattr(import_module(f"dyntok.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
