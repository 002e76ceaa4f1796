"""The semantics probe: do pooled code vectors tell what a picture shows? Nearest neighbours guess labels from them and from 16 x 16 pixels.

Not here: encoding the pictures (`evaluate.py`).
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dyntok.errors import MissingDependencyError
from dyntok.training.data import Sample
from dyntok.training.report import Probe

try:
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import StandardScaler
except ImportError as error:
    raise MissingDependencyError.of("scikit-learn", "train") from error

NEIGHBOURS = 10
THUMBNAIL = 16  # pixels a side
_BOOTSTRAP_DRAWS = 20_000


class LabelledVectors:
    """Code vectors and pixels of the labelled images whose key begins with `prefix`."""

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.labels: list[str] = []
        self.codes: list[Tensor] = []  # [2C] each
        self.pixels: list[Tensor] = []  # [768] each

    def __len__(self) -> int:
        return len(self.labels)

    def takes(self, sample: Sample) -> bool:
        return sample.label is not None and sample.key.startswith(self.prefix)

    def add(
        self, samples: Sequence[Sample], images: Sequence[Image.Image], vectors: Tensor, lengths: Sequence[int]
    ) -> None:
        """B samples, their images, and the rows [T, C] of all their codes, `lengths` of them for each."""
        for sample, image, pooled in zip(samples, images, pooled_vectors(vectors, lengths), strict=True):
            if self.takes(sample):
                self.labels.append(sample.label)
                self.codes.append(pooled)
                self.pixels.append(thumbnail_vector(image))


def pooled_vectors(vectors: Tensor, lengths: Sequence[int]) -> Tensor:
    """Mean and standard deviation of each image's code vectors: [T, C] -> [B, 2C].

    The mean alone would lose texture: a component that tells an edge is positive as often as negative in one picture.
    """
    parts = vectors.float().split(list(lengths))
    return torch.stack([torch.cat([part.mean(0), part.std(0, correction=0)]) for part in parts])


def thumbnail_vector(image: Image.Image) -> Tensor:
    """The pixels of an image of 16 x 16, float [768] in 0..255."""
    small = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small, dtype=np.float32).reshape(-1))


def probe(test: LabelledVectors, train: LabelledVectors | None = None, train_failures: int = 0) -> Probe | None:
    """Guess the labels of `test` from neighbours in `train`, or without it from each other.

    Images of labels that `train` lacks are left out. None where too little is there: no image, one class, or no more than 10 neighbours.
    """
    others = test if train is None else train
    classes = set(others.labels)
    places = [i for i, label in enumerate(test.labels) if label in classes]
    if not places or len(classes) < 2 or len(others) <= NEIGHBOURS:
        return None
    labels = [test.labels[i] for i in places]
    right = []
    for vectors, points in ((test.codes, others.codes), (test.pixels, others.pixels)):
        known = None if train is None else (torch.stack(points), others.labels)
        right.append(neighbours_agree(torch.stack([vectors[i] for i in places]), labels, known))
    codes, pixels = (float(hits.mean()) for hits in right)
    low, high = difference_interval(*right)
    train_images = 0 if train is None else len(train)
    return Probe(
        len(places), train_images, train_failures, len(classes), NEIGHBOURS, codes, pixels, codes - pixels, low, high
    )


def neighbours_agree(
    vectors: Tensor, labels: Sequence[str], known: tuple[Tensor, Sequence[str]] | None = None
) -> np.ndarray:
    """For each of the vectors [n, D], whether its 10 nearest neighbours vote for its label: bool [n].

    known: vectors [m, D] and labels among which the neighbours are; without it they are the other vectors (leave one out). Every dimension
    is first brought to mean 0 and deviation 1 over these; neighbours are found by cosine, nearer ones weigh more.
    """
    points, names = (vectors, labels) if known is None else known
    scaler = StandardScaler().fit(points.numpy())
    classifier = KNeighborsClassifier(NEIGHBOURS, metric="cosine", weights="distance")
    classifier.fit(scaler.transform(points.numpy()), names)
    guesses = classifier.predict(
        None if known is None else scaler.transform(vectors.numpy())
    )  # None: nobody is his own neighbour
    return guesses == np.asarray(labels)


def difference_interval(right: np.ndarray, rival: np.ndarray) -> tuple[float, float]:
    """95 % interval of the difference of two accuracies measured on the same images (paired percentile bootstrap). Both bool [n]."""
    gain = right.astype(int) - rival.astype(int)
    shares = [np.mean(gain == value) for value in (1, -1, 0)]
    # resampling images with replacement draws how many of each gain there are: all draws at once
    draws = np.random.default_rng(0).multinomial(len(gain), shares, size=_BOOTSTRAP_DRAWS)
    low, high = np.percentile((draws[:, 0] - draws[:, 1]) / len(gain), [2.5, 97.5])
    return float(low), float(high)
