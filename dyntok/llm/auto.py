"""Tokenizers of pictures for the `Auto` classes of transformers, without remote code.

>>> import dyntok.llm.auto
>>> dyntok.llm.auto.add_transformers_files("checkpoint/")  # once
>>> images = AutoImageProcessor.from_pretrained("checkpoint/")
>>> model = AutoModel.from_pretrained("checkpoint/")
>>> tokens = model.get_image_tokens(images(photos, return_tensors="pt")["pixel_values"])
>>> processor = AutoProcessor.from_pretrained("model/")  # of VisualProcessor.save_pretrained

Importing this module imports transformers and registers the classes. Not for LaVIT's tokenizer, which `dyntok.load`
loads.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dyntok.config import ImageConfig
from dyntok.errors import ConfigError, MissingDependencyError
from dyntok.image import ImageSource, is_single, to_pixels
from dyntok.llm.processor import VisualProcessor
from dyntok.policy import KeepOptions
from dyntok.structure import build
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.vocab import VisualVocab

try:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, BatchFeature, PreTrainedConfig
    from transformers.image_processing_utils import BaseImageProcessor
except ModuleNotFoundError as error:
    raise MissingDependencyError.of("transformers", "transformers") from error

MODEL_TYPE = "dyntok"


class DyntokConfig(PreTrainedConfig):
    """The `config.json` of a tokenizer, as transformers reads it."""

    model_type = MODEL_TYPE


class DyntokImageProcessor(BaseImageProcessor):
    """Pictures of any kind to normalized pixels, as the tokenizer wants them."""

    model_input_names = ["pixel_values"]

    def __init__(self, image: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.image = dict(image or {})
        self._config = build(ImageConfig, self.image)

    def __call__(
        self, images: ImageSource | Sequence[ImageSource], return_tensors: str | None = "pt", **options: Any
    ) -> BatchFeature:
        """Returns `pixel_values`, float [B, 3, H, W]; a list of such pictures unless return_tensors is "pt".

        Raises `ImageError` on bad pictures, `ConfigError` on other options: the checkpoint decides on size and values.
        """
        if options or return_tensors not in (None, "pt", "np"):
            raise ConfigError(
                f"{', '.join(options) or f'return_tensors={return_tensors!r}'} is not possible; "
                "expected pictures and return_tensors='pt', 'np' or None"
            )
        sources: Any = [images] if is_single(images) else images
        pixels = [to_pixels(source, self._config) for source in sources]
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    preprocess = __call__

    def to_dict(self) -> dict[str, Any]:
        """Returns what `preprocessor_config.json` holds."""
        return {"image_processor_type": type(self).__name__, "image": self.image}


class DyntokModel(nn.Module):
    """A tokenizer of pictures, with the names that users of Chameleon and Emu3 know; `tokenizer` is dyntok's own."""

    config_class = DyntokConfig

    def __init__(self, tokenizer: DynamicVisualTokenizer, config: Any = None) -> None:
        super().__init__()
        self.tokenizer, self.config = tokenizer, config

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, *, config: Any = None, **options: Any) -> "DyntokModel":
        """Returns the tokenizer of a folder or a hub repository; options: those of `DynamicVisualTokenizer`."""
        known = ("revision", "local_files_only", "token", "cache_dir", "force_download", "device", "dtype")
        ignored = ("trust_remote_code", "adapter_kwargs", "_from_auto", "_commit_hash", "code_revision")
        given = {name: value for name, value in options.items() if name not in ignored and value is not None}
        if other := sorted(set(given) - set(known)):
            raise ConfigError(f"{', '.join(other)}: no options of a tokenizer of pictures, expected {', '.join(known)}")
        return cls(DynamicVisualTokenizer.from_pretrained(name, **given), config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns features of all patches as the decoder restores them, [B, N, D]."""
        return self.tokenizer.decode_to_features(self.tokenizer.encode_tensor(pixel_values))

    @torch.inference_mode()
    def get_image_tokens(
        self, pixel_values: Tensor, vocab: VisualVocab | None = None, *, policy: KeepOptions | None = None
    ) -> list[Tensor]:
        """Returns the tokens of each picture, int64 [T] with a length of its own: codes, or ids where vocab is given.

        policy: `budget`, `threshold`, `max_tokens` or `places` of `encode`, as a dict. Ids have start and end.
        """
        encoding = self.tokenizer.encode_tensor(pixel_values, **(policy or {}))
        return list(encoding.codes) if vocab is None else vocab.to_ids(encoding)

    @torch.inference_mode()
    def decode_image_tokens(
        self, image_tokens: Sequence[Tensor], vocab: VisualVocab | None = None
    ) -> list[Image.Image]:
        """Returns the pictures of such tokens."""
        return self.tokenizer.decode(list(image_tokens) if vocab is None else vocab.to_encoding(image_tokens))


def add_transformers_files(folder: str | os.PathLike) -> None:
    """Lets the `Auto` classes find a checkpoint that `save_pretrained` wrote.

    Adds `model_type` to its `config.json`, and writes `preprocessor_config.json`. Codes and fingerprint stay the same.

    Raises `CheckpointError` where the folder holds no tokenizer.
    """
    path = Path(folder) / "config.json"
    image = DynamicVisualTokenizer.from_pretrained(folder).config.image
    header = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({"model_type": MODEL_TYPE, **header}, indent=2) + "\n", encoding="utf-8")
    processor = DyntokImageProcessor(asdict(image))
    text = json.dumps(processor.to_dict(), indent=2) + "\n"
    (Path(folder) / "preprocessor_config.json").write_text(text, encoding="utf-8")


AutoConfig.register(MODEL_TYPE, DyntokConfig, exist_ok=True)
AutoModel.register(DyntokConfig, DyntokModel, exist_ok=True)
AutoImageProcessor.register(DyntokConfig, image_processor_classes={"pil": DyntokImageProcessor}, exist_ok=True)
AutoProcessor.register(DyntokConfig, VisualProcessor, exist_ok=True)
