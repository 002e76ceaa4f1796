"""A classifier that looks at originals and reconstructions: are its features and its guesses the same?

The network is any timm model with its classifier. Not here: the teacher of a training run (`teacher.py`).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from dyntok.training.recipe import Teacher
from dyntok.training.teacher import create_network


def load_classifier(teacher: Teacher) -> nn.Module:
    """Returns the timm network with its classifier; `teacher.layers` and `sizes` are ignored.

    Weights that expect another normalization than timm's need it in kwargs, such as
    {"pretrained_cfg_overlay": {"mean": [...], "std": [...]}}.

    Raises `ConfigError` if timm has no such network or its classifier would be random, `CheckpointError` if the weights
    do not fit.
    """
    return create_network(teacher, with_classifier=True)


class Classifier:
    """Pooled features and guesses of a timm network, with its own input size, mean and deviation.

    labels: of all images. The ImageNet wnids among them (n01440764, ...) become `classes`, between which the network
    chooses. There are no classes and no guesses with fewer than two wnids, or without an ImageNet classifier.
    """

    def __init__(self, network: Any, labels: Sequence[str | None]) -> None:
        self.network = network.eval()  # of timm, which has no types
        config = network.pretrained_cfg
        self.name = str(config.get("architecture") or type(network).__name__)
        self.size = tuple(config["input_size"][-2:])
        self.mean, self.std = (torch.tensor(config[name], device="cpu").view(3, 1, 1) for name in ("mean", "std"))
        subset = infer_imagenet_subset(network) if getattr(network, "num_classes", 0) else None
        wnids = {wnid: index for index, wnid in enumerate(ImageNetInfo(subset).label_names())} if subset else {}
        found = sorted({label for label in labels if label in wnids})
        self.classes = found if len(found) > 1 else []
        self._indices = [wnids[wnid] for wnid in self.classes]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, list[str] | None]:
        """Classifies images: [B, 3, H, W] in [0, 1] -> pooled features [B, D], and each image's likeliest class.

        Classes are None where none are known. Images are scaled to the network's input size with the antialiased
        bicubic filter.
        """
        device = next(self.network.parameters()).device
        pixels = F.interpolate(images, size=self.size, mode="bicubic", antialias=True).clamp(0, 1)
        features = self.network.forward_features(((pixels - self.mean) / self.std).to(device))
        pooled = self.network.forward_head(features, pre_logits=True).cpu()
        if not self.classes:
            return pooled, None
        logits = self.network.forward_head(features).cpu()
        return pooled, [self.classes[i] for i in logits[:, self._indices].argmax(1).tolist()]
