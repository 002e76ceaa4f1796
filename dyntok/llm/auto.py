"""Tokenizers of pictures for the `Auto` classes of transformers, without remote code.

>>> import dyntok.llm.auto
>>> tok.save_pretrained("checkpoint/")
>>> dyntok.llm.auto.add_transformers_files("checkpoint/")  # once
>>> images = AutoImageProcessor.from_pretrained("checkpoint/")
>>> model = AutoModel.from_pretrained("checkpoint/")
>>> tokens = model.get_image_tokens(images(photos, return_tensors="pt")["pixel_values"])
>>> processor = AutoProcessor.from_pretrained("model/")  # of VisualProcessor.save_pretrained

`import dyntok` registers the classes, before transformers or after it (`dyntok/registration.py`). Not for LaVIT's
tokenizer, which `dyntok.load` loads.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

from dyntok.llm.auto_model import MODEL_TYPE
from dyntok.llm.auto_model import DyntokConfig as DyntokConfig
from dyntok.llm.auto_model import DyntokModel as DyntokModel
from dyntok.llm.auto_processors import DyntokImageProcessor as DyntokImageProcessor
from dyntok.tokenizer import DynamicVisualTokenizer


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
