"""A tokenizer of pictures as `AutoConfig` and `AutoModel` of transformers know it, without remote code.

>>> import dyntok
>>> tok.save_pretrained("checkpoint/")  # or tok.push_to_hub("org/name")
>>> images = AutoImageProcessor.from_pretrained("checkpoint/")
>>> model = AutoModel.from_pretrained("checkpoint/")
>>> tokens = model.get_image_tokens(images(photos, return_tensors="pt")["pixel_values"])

Only for a program that has transformers: `dyntok/registration.py` imports this when transformers loads those classes.
"""

import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from PIL import Image
from torch import Tensor, nn

from dyntok.checkpoint.format import FORMAT
from dyntok.errors import ConfigError, MissingDependencyError
from dyntok.policy import KeepOptions
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.vocab import VisualVocab

try:
    from transformers.configuration_utils import PreTrainedConfig
except ModuleNotFoundError as error:
    raise MissingDependencyError.of("transformers", "transformers") from error


class DyntokConfig(PreTrainedConfig):
    """The `config.json` of a tokenizer, as transformers reads it."""

    model_type = FORMAT


class DyntokModel(nn.Module):
    """A tokenizer of pictures, with the names that users of Chameleon and Emu3 know; `tokenizer` is dyntok's own."""

    config_class = DyntokConfig

    def __init__(self, tokenizer: DynamicVisualTokenizer, config: Any = None) -> None:
        super().__init__()
        self.tokenizer, self.config = tokenizer, config

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, *, config: Any = None, **options: Any) -> "DyntokModel":
        """Returns the tokenizer of a folder or a hub repository; options: those of `DynamicVisualTokenizer`."""
        hub = ("revision", "local_files_only", "token", "cache_dir", "force_download")
        known = (*hub, "device", "dtype", "batch_invariant")
        ignored = ("trust_remote_code", "adapter_kwargs", "_from_auto", "_commit_hash", "code_revision")
        given = {name: value for name, value in options.items() if name not in ignored and value is not None}
        if other := sorted(set(given) - set(known)):
            raise ConfigError(f"{', '.join(other)}: no options of a tokenizer of pictures, expected {', '.join(known)}")
        return cls(DynamicVisualTokenizer.from_pretrained(name, **given), config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns features of all patches as the decoder restores them, [B, N, D]."""
        return self.tokenizer.decode_to_features(self.tokenizer.encode_tensor(pixel_values))

    def get_image_tokens(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        vocab: VisualVocab | None = None,
        *,
        policy: KeepOptions | None = None,
    ) -> list[Tensor]:
        """Returns the tokens of each picture, int64 [T] with a length of its own: codes, or ids where vocab is given.

        pixel_values: [B, 3, H, W], or a list of [3, H, W] where pictures have shapes of their own.
        policy: `budget`, `threshold`, `max_tokens` or `places` of `encode`, as a dict. Ids have start and end, and the
            places that the layout of the vocabulary needs.
        """
        if not isinstance(pixel_values, Tensor):
            rows = (self.get_image_tokens(pixels[None], vocab, policy=policy) for pixels in pixel_values)
            return [tokens for row in rows for tokens in row]
        keep: KeepOptions = {**(policy or {})}
        if vocab is not None and vocab.layout in ("map", "lattice"):
            keep["places"] = vocab.layout
        encoding = self.tokenizer.encode_tensor(pixel_values, **keep)
        return list(encoding.codes) if vocab is None else vocab.to_ids(encoding)

    def decode_image_tokens(
        self, image_tokens: Sequence[Tensor], vocab: VisualVocab | None = None
    ) -> list[Image.Image]:
        """Returns the pictures of such tokens.

        Ids say the places of their codes. Codes alone do not: they are read as a lattice on the tokenizer's own grid,
        which is right for square pictures with `policy={"places": "lattice"}`.
        """
        return self.tokenizer.decode(list(image_tokens) if vocab is None else vocab.to_encoding(image_tokens))


def register_config(module: ModuleType) -> None:
    """Make the configuration known to the module that holds `AutoConfig`."""
    module.AutoConfig.register(FORMAT, DyntokConfig, exist_ok=True)


def register_model(module: ModuleType) -> None:
    """Make the tokenizer known to the module that holds `AutoModel`."""
    module.AutoModel.register(DyntokConfig, DyntokModel, exist_ok=True)
