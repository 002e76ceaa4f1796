"""dyntok: an image as a short sequence of integers whose length follows the picture, and back.

>>> import dyntok
>>> tok = dyntok.load()
>>> enc = tok.encode(["cat.jpg"])
>>> enc.codes[0], enc.positions[0], enc.lengths
>>> images = tok.decode(enc)
"""

from dyntok.config import TokenizerConfig as TokenizerConfig
from dyntok.encoding import Encoding as Encoding
from dyntok.errors import CheckpointError as CheckpointError
from dyntok.errors import CodeError as CodeError
from dyntok.errors import ConfigError as ConfigError
from dyntok.errors import DyntokError as DyntokError
from dyntok.errors import FingerprintError as FingerprintError
from dyntok.errors import ImageError as ImageError
from dyntok.features import Features as Features
from dyntok.registry import load as load
from dyntok.selector import KeepPolicy as KeepPolicy
from dyntok.tokenizer import DynamicVisualTokenizer as DynamicVisualTokenizer
from dyntok.vocab import VisualVocab as VisualVocab

__version__ = "0.1.0"
