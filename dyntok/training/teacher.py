"""A fixed timm network that guides the training by its features of originals and reconstructions.

Not here: the classifier that evaluates a trained tokenizer (`classifier.py`).
"""

import math
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyntok.errors import CheckpointError, ConfigError
from dyntok.model.backbone import load_timm_weights
from dyntok.training.folding import fold_batch_norms
from dyntok.training.recipe import Teacher

_SHORTEST = 32  # pixels of a scaled side: the stride of most networks
_FEWEST = 4  # images that are compared at least: their mean is the center of the recognition loss


def create_network(teacher: Teacher, *, with_classifier: bool) -> nn.Module:
    """Returns the timm network with its weights, in evaluation mode.

    Raises `ConfigError` if timm can't create it, if it lacks the teacher's layers or if its classifier would be random,
    `CheckpointError` if its weights can't be fetched or do not fit.
    """
    options = teacher.kwargs if with_classifier else {"num_classes": 0, **teacher.kwargs}
    try:
        network = timm.create_model(teacher.name, pretrained=teacher.weights == "hub", **options)
    except OSError as error:  # raised by the hub's client
        raise CheckpointError(
            f"can't fetch the teacher {teacher.name}: {error}; give a file of its weights instead"
        ) from error
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise ConfigError(f"timm can't create the teacher {teacher.name!r} with {teacher.kwargs}: {error}") from error
    count = len(getattr(network, "feature_info", ()))
    if any(not -count <= layer < count for layer in teacher.layers):
        raise ConfigError(f"the teacher {teacher.name!r} has {count} feature maps, but layers are {teacher.layers}")
    if teacher.weights == "hub":
        classes, trained = network.num_classes, network.pretrained_cfg["num_classes"]
        if classes not in (0, trained):
            raise ConfigError(
                f"the weights of the teacher {teacher.name!r} have a classifier of {trained} classes, but num_classes "
                f"is {classes}, so the classifier would be random; remove num_classes from the teacher's options"
            )
    else:
        load_timm_weights(network, teacher.weights)
    return network.eval()


@dataclass(frozen=True)
class View:
    """How one step shows its pictures to the teacher: shifted by at most one pixel, and scaled if `size` is given.

    The shift keeps the teacher's strides from leaving a grid in the reconstructions. A scaled picture keeps its aspect
    ratio and has the area of a square of `size` pixels.
    """

    top: int = 0
    left: int = 0
    size: int | None = None

    def __call__(self, pixels: Tensor) -> Tensor:
        shifted = F.pad(pixels[..., self.top :, self.left :], (0, self.left, 0, self.top), mode="replicate")
        if self.size is None:
            return shifted
        height, width = pixels.shape[-2:]
        factor = self.size / math.sqrt(height * width)
        size = max(_SHORTEST, round(height * factor)), max(_SHORTEST, round(width * factor))
        return F.interpolate(shifted, size=size, mode="bicubic", antialias=True)


class TeacherFeatures(nn.Module):
    """Feature maps of a fixed timm network, from pixels normalized as the tokenizer's (by `mean` and `std`).

    Raises `ConfigError` and `CheckpointError` as `create_network`.
    """

    factor: Tensor
    shift: Tensor

    def __init__(self, teacher: Teacher, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        model: Any = create_network(teacher, with_classifier=False)
        count = len(model.feature_info)
        self.layers = sorted({layer % count for layer in teacher.layers}) or None  # the order in which timm gives them
        self.sizes, self.share = teacher.sizes, teacher.share
        embed = getattr(model, "patch_embed", None)
        self.only_size = getattr(embed, "img_size", None) if getattr(embed, "strict_img_size", False) else None
        config = model.pretrained_cfg
        values = (mean, std, config["mean"], config["std"])
        old_mean, old_std, new_mean, new_std = (torch.tensor(value).view(3, 1, 1) for value in values)
        self.register_buffer("factor", old_std / new_std)
        self.register_buffer("shift", (old_mean - new_mean) / new_std)
        self.model: Any = fold_batch_norms(model).to(memory_format=torch.channels_last).requires_grad_(False)
        with torch.no_grad():
            maps, pooled = self(torch.zeros(1, 3, *(self.only_size or config["input_size"][1:])), View())
        self.channels, self.pooled_dim = [found.shape[1] for found in maps], pooled.shape[1]

    def train(self, mode: bool = True) -> "TeacherFeatures":
        """Keeps the network in evaluation mode."""
        return super().train(False)

    def seen(self, images: int) -> int:
        """Returns how many of a batch's images the teacher sees: its share, but four if there are as many."""
        return max(min(images, _FEWEST), round(images * self.share))

    def draw_view(self) -> View:
        """Draws from the global random generator."""
        top, left = torch.randint(2, (2,)).tolist()
        return View(top, left, self.sizes[int(torch.randint(len(self.sizes), ()))] if self.sizes else None)

    def forward(self, pixels: Tensor, view: View) -> tuple[list[Tensor], Tensor]:
        """Computes feature maps [B, D, h, w], from fine to coarse, and pooled features [B, D], of pixels.

        Raises `ConfigError` where the network takes one size alone and the view has another.
        """
        pixels = view(pixels)
        if self.only_size is not None and tuple(pixels.shape[2:]) != tuple(self.only_size):
            height, width = self.only_size
            raise ConfigError(
                f"the teacher takes pictures of {height} x {width} pixels alone, and got {pixels.shape[2]} x "
                f"{pixels.shape[3]}; set teacher.kwargs: {{dynamic_img_size: true}}"
            )
        pixels = (pixels * self.factor + self.shift).contiguous(memory_format=torch.channels_last)
        last, maps = self.model.forward_intermediates(pixels, indices=self.layers, output_fmt="NCHW")
        return maps, self.model.forward_head(last)
