"""A small program of a user: `make lint` checks that a type checker sees the right types in it. It is never run."""

from PIL import Image
from torch import Tensor
from typing_extensions import assert_type

import dyntok

tok = dyntok.load()
assert_type(tok, dyntok.DynamicVisualTokenizer)

enc = tok.encode(["cat.jpg", b"...", Image.new("RGB", (8, 8))], budget=64)
assert_type(enc, dyntok.Encoding)
assert_type(enc.codes, list[Tensor])
assert_type(enc.codes[0], Tensor)
assert_type(enc.lengths, Tensor)
assert_type(enc.source_index, Tensor)
assert_type(enc.positions, list[Tensor] | None)
assert_type(enc.padded(), tuple[Tensor, Tensor])
assert_type(enc[0], dyntok.Encoding)

assert_type(tok.decode(enc), list[Image.Image])
assert_type(tok.decode([[17, 4021, 9]]), list[Image.Image])
assert_type(tok.features("cat.jpg").split(), list[Tensor])

vocab = dyntok.VisualVocab.after(32000, size=8192)
assert_type(vocab.to_ids(enc.codes[0]), Tensor)
assert_type(vocab.to_ids(enc), list[Tensor])
