"""The semantics probe: do pooled code vectors tell what a picture shows?

Nearest neighbors guess each picture's label from its code vectors, and from 16 x 16 pixels for comparison.

Not here: encoding the pictures (`evaluate.py`).
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dyntok.errors import MissingDependencyError
from dyntok.training.report import ProbeResult
from dyntok.training.sources import ImageSample

try:
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import StandardScaler
except ImportError as error:
    raise MissingDependencyError.of("scikit-learn", "train") from error

NEIGHBORS = 10
THUMBNAIL = 16  # pixels a side
_BOOTSTRAP_DRAWS = 20_000


class LabeledVectors:
    """Code vectors and pixels of the labeled images whose key starts with `prefix`."""

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.labels: list[str] = []
        self.codes: list[Tensor] = []  # [2C] each
        self.pixels: list[Tensor] = []  # [768] each

    def __len__(self) -> int:
        return len(self.labels)

    def accepts(self, sample: ImageSample) -> bool:
        return sample.label is not None and sample.key.startswith(self.prefix)

    def add(
        self, samples: Sequence[ImageSample], images: Sequence[Image.Image], vectors: Tensor, lengths: Sequence[int]
    ) -> None:
        """Adds samples, their images, and the vectors [T, C] of all their codes, `lengths` of them per image."""
        for sample, image, pooled in zip(samples, images, pooled_vectors(vectors, lengths), strict=True):
            if self.accepts(sample):
                self.labels.append(sample.label)
                self.codes.append(pooled)
                self.pixels.append(thumbnail_vector(image))


def pooled_vectors(vectors: Tensor, lengths: Sequence[int]) -> Tensor:
    """Returns mean and standard deviation of each image's code vectors: [T, C] -> [B, 2C].

    The mean alone loses texture: a component that responds to edges is positive as often as negative within a picture.
    """
    parts = vectors.float().split(list(lengths))
    return torch.stack([torch.cat([part.mean(0), part.std(0, correction=0)]) for part in parts])


def thumbnail_vector(image: Image.Image) -> Tensor:
    """Returns the pixels of the image scaled to 16 x 16, float [768] in 0..255."""
    small = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small, dtype=np.float32).reshape(-1))


def probe(test: LabeledVectors, train: LabeledVectors | None = None, train_failures: int = 0) -> ProbeResult | None:
    """Guesses the labels of `test` from neighbors in `train`, or from each other without `train`.

    Images whose label does not occur in `train` are left out. Returns None if no image is left, or if there is only one
    class, or at most 10 neighbors.
    """
    others = test if train is None else train
    classes = set(others.labels)
    indices = [i for i, label in enumerate(test.labels) if label in classes]
    if not indices or len(classes) < 2 or len(others) <= NEIGHBORS:
        return None
    labels = [test.labels[i] for i in indices]
    correct = []
    for vectors, points in ((test.codes, others.codes), (test.pixels, others.pixels)):
        known = None if train is None else (torch.stack(points), others.labels)
        correct.append(neighbors_agree(torch.stack([vectors[i] for i in indices]), labels, known))
    codes, pixels = (float(hits.mean()) for hits in correct)
    low, high = difference_interval(*correct)
    train_images = 0 if train is None else len(train)
    return ProbeResult(
        len(indices), train_images, train_failures, len(classes), NEIGHBORS, codes, pixels, codes - pixels, low, high
    )


def neighbors_agree(
    vectors: Tensor, labels: Sequence[str], known: tuple[Tensor, Sequence[str]] | None = None
) -> np.ndarray:
    """Returns whether the 10 nearest neighbors of each vector [n, D] vote for its label: bool [n].

    known: vectors [m, D] and labels to search. Without it, the other vectors are searched (leave one out).

    Every dimension is first scaled to mean 0 and deviation 1 over the searched vectors. The distance is the cosine, and
    nearer neighbors weigh more.
    """
    points, names = (vectors, labels) if known is None else known
    scaler = StandardScaler().fit(points.numpy())
    classifier = KNeighborsClassifier(NEIGHBORS, metric="cosine", weights="distance")
    classifier.fit(scaler.transform(points.numpy()), names)
    # None: leave one out, so that no vector is its own neighbor
    guesses = classifier.predict(None if known is None else scaler.transform(vectors.numpy()))
    return guesses == np.asarray(labels)


def difference_interval(correct: np.ndarray, rival: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % interval of the difference of two accuracies on the same images. Both bool [n].

    It is a paired percentile bootstrap.
    """
    gain = correct.astype(int) - rival.astype(int)
    shares = [np.mean(gain == value) for value in (1, -1, 0)]
    # resampling images with replacement draws the number of each gain: all draws at once
    draws = np.random.default_rng(0).multinomial(len(gain), shares, size=_BOOTSTRAP_DRAWS)
    low, high = np.percentile((draws[:, 0] - draws[:, 1]) / len(gain), [2.5, 97.5])
    return float(low), float(high)
