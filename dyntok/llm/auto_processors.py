"""Pictures to pixels, and with text to ids, as `AutoImageProcessor` and `AutoProcessor` of transformers know it.

Only for a program that has transformers: `dyntok/registration.py` imports this when transformers loads those classes.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from dyntok.config import ImageConfig
from dyntok.errors import ConfigError, MissingDependencyError
from dyntok.image import ImageSource, is_single, to_pixels
from dyntok.llm.auto_model import DyntokConfig
from dyntok.llm.processor import VisualProcessor
from dyntok.structure import build

try:
    from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
except ModuleNotFoundError as error:
    raise MissingDependencyError.of("transformers", "transformers") from error


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
        """Returns `pixel_values`, float [B, 3, H, W]; with return_tensors=None a list of [3, H, W].

        Raises `ImageError` on bad pictures, `ConfigError` on other options (the checkpoint decides on size and values)
        and on pictures of several shapes where no list is asked for.
        """
        if options or return_tensors not in (None, "pt", "np"):
            raise ConfigError(
                f"{', '.join(options) or f'return_tensors={return_tensors!r}'} is not possible; "
                "expected pictures and return_tensors='pt', 'np' or None"
            )
        sources: Any = [images] if is_single(images) else images
        pixels = [to_pixels(source, self._config) for source in sources]
        shapes = sorted({tuple(picture.shape[1:]) for picture in pixels})
        if len(shapes) > 1 and return_tensors is not None:
            raise ConfigError(
                f"the pictures are fitted to {len(shapes)} shapes, such as {shapes[0]} and {shapes[1]}, "
                "which no tensor holds together; give return_tensors=None, and its list to get_image_tokens"
            )
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    preprocess = __call__

    def to_dict(self) -> dict[str, Any]:
        """Returns what `preprocessor_config.json` holds."""
        return {"image_processor_type": type(self).__name__, "image": self.image}


def register_image_processor(module: ModuleType) -> None:
    """Make the image processor known to the module that holds `AutoImageProcessor`."""
    # by position: the argument has this place in every 5.x, and its newer form, image_processor_classes=, in some
    module.AutoImageProcessor.register(DyntokConfig, DyntokImageProcessor, exist_ok=True)


def register_processor(module: ModuleType) -> None:
    """Make the processor of text and pictures known to the module that holds `AutoProcessor`."""
    module.AutoProcessor.register(DyntokConfig, VisualProcessor, exist_ok=True)
