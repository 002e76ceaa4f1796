"""Another network's view of reconstructions: are its features, and what it recognises, the same as on the originals?

The network is any timm model with its classifier. Not here: the teacher in training (`objective.py`).
"""

from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from dyntok.errors import CheckpointError, ConfigError
from dyntok.model.backbone import load_timm_weights
from dyntok.training.recipe import Teacher


def load_judge(teacher: Teacher) -> nn.Module:
    """The timm network with its classifier; `teacher.layers` does not matter.

    Weights that want another normalisation than timm's own say so: kwargs={"pretrained_cfg_overlay": {"mean": [...], "std": [...]}}.
    Raises `ConfigError` where timm has no such network, `CheckpointError` where the weights do not fit.
    """
    try:
        network = timm.create_model(teacher.name, pretrained=teacher.weights == "hub", **teacher.kwargs)
    except OSError as error:  # of the hub's client
        raise CheckpointError(f"can't fetch the teacher {teacher.name}: {error}; give a file of its weights") from error
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise ConfigError(f"timm can't make the teacher {teacher.name!r} with {teacher.kwargs}: {error}") from error
    if teacher.weights != "hub":
        load_timm_weights(network, teacher.weights)
    return network.eval()


class Judge:
    """Pooled features and guesses of a timm network, with its own input size, mean and deviation (`pretrained_cfg`). The network is put
    into evaluation mode.

    labels: of the images to come. Those that are ImageNet wnids (n01440764, ...) make `classes`, among which the network chooses; with
    fewer than two of them, or a network without an ImageNet classifier, there are no classes and no guesses.
    """

    def __init__(self, network: nn.Module, labels: Sequence[str | None]) -> None:
        self.network = network.eval()
        config = network.pretrained_cfg
        self.name = str(config.get("architecture") or type(network).__name__)
        self.size = tuple(config["input_size"][-2:])
        self.mean, self.std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
        subset = infer_imagenet_subset(network) if getattr(network, "num_classes", 0) else None
        wnids = {wnid: index for index, wnid in enumerate(ImageNetInfo(subset).label_names())} if subset else {}
        self.classes = sorted({label for label in labels if label in wnids})
        self.classes = self.classes if len(self.classes) > 1 else []
        self._indices = [wnids[wnid] for wnid in self.classes]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, list[str] | None]:
        """[B, 3, H, W] in [0, 1] -> pooled features [B, D], and the likeliest of `classes` for each image (None without classes).

        Images are scaled to the network's input size with the antialiased bicubic filter.
        """
        device = next(self.network.parameters()).device
        pixels = F.interpolate(images, size=self.size, mode="bicubic", antialias=True).clamp(0, 1)
        features = self.network.forward_features(((pixels - self.mean) / self.std).to(device))
        pooled = self.network.forward_head(features, pre_logits=True).cpu()
        if not self.classes:
            return pooled, None
        logits = self.network.forward_head(features).cpu()
        return pooled, [self.classes[i] for i in logits[:, self._indices].argmax(1).tolist()]
