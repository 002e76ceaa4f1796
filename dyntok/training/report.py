"""The results of an evaluation, as a table for people and as plain values for machines.

Not here: measuring (`evaluate.py`).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TokenCounts:
    """Tokens per image. std is that of the evaluated images, without correction."""

    mean: float
    std: float
    min: int
    max: int


@dataclass(frozen=True)
class ClassifierResult:
    """A classifier's view of originals and reconstructions.

    cosine: between its pooled features of the two, mean over images.
    Accuracies (0 to 1): top-1 among the `classes` ImageNet classes that occur as labels, on the `images` that have
    such a label; None if there are none.
    """

    name: str
    cosine: float
    images: int
    classes: int
    accuracy_originals: float | None
    accuracy_reconstructions: float | None


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies (0 to 1) of labels guessed from nearest neighbors, by pooled code vectors and by 16 x 16 pixels.

    `difference` is codes minus pixels, and `low` to `high` its 95 % interval.
    train_images: 0 if each image's neighbors are the other evaluated ones (leave one out).
    train_failures: the number of probe samples that could not be read.
    """

    images: int
    train_images: int
    train_failures: int
    classes: int
    neighbors: int
    codes: float
    pixels: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class EvaluationReport:
    """One evaluation. Means are over images; a figure that does not apply is None.

    failed: key and reason of each image that could not be read.
    refine: rounds in which other codes were tried.
    bits_per_pixel: of the codes alone.
    usage: share of the codebook that occurs.
    jpeg_correlation: Spearman's rank correlation of lengths with JPEG sizes.
    psnr: in dB.
    feature_cosine: between decoded patch features and the backbone's.
    """

    images: int
    failed: tuple[tuple[str, str], ...]
    policy: str
    selection: str
    positions: bool
    refine: int
    tokens: TokenCounts
    bits_per_pixel: float
    codebook_size: int
    usage: float
    perplexity: float
    jpeg_correlation: float | None
    psnr: float | None = None
    ssim: float | None = None
    feature_cosine: float | None = None
    teacher: ClassifierResult | None = None
    probe: ProbeResult | None = None

    @property
    def failures(self) -> int:
        return len(self.failed)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types. Parts are nested; `failures` is the length of `failed`."""
        values = dataclasses.asdict(self)
        values["failed"] = [list(pair) for pair in self.failed]
        return {"images": values.pop("images"), "failures": self.failures, **values}

    def table(self) -> str:
        """Returns one aligned line per figure, with units."""
        tokens, placed = self.tokens, "with" if self.positions else "without"
        rounds = f", refined {self.refine}x" if self.refine else ""
        lines = [
            ("images", f"{self.images}" + (f" ({self.failures} more could not be read)" if self.failed else "")),
            ("selection", f"{self.selection} (lengths: {self.policy}){rounds}, decoded {placed} positions"),
            ("tokens per image", f"{tokens.mean:.1f} mean, {tokens.std:.1f} std, {tokens.min} to {tokens.max}"),
            ("bits per pixel", f"{self.bits_per_pixel:.4f} (codes alone)"),
            (
                "codebook usage",
                f"{_percent(self.usage)} of {self.codebook_size} codes, perplexity {self.perplexity:.0f}",
            ),
            (
                "length against JPEG size",
                _or_none(self.jpeg_correlation, "{:.3f} rank correlation", "all of one length or size"),
            ),
        ]
        lines += [("PSNR", f"{self.psnr:.2f} dB")] if self.psnr is not None else []
        lines += [("SSIM", f"{self.ssim:.4f}")] if self.ssim is not None else []
        lines += [("feature cosine", f"{self.feature_cosine:.4f}")] if self.feature_cosine is not None else []
        lines += self._teacher_lines(self.teacher) if self.teacher else []
        lines += self._probe_lines(self.probe) if self.probe else []
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)

    def _teacher_lines(self, teacher: ClassifierResult) -> list[tuple[str, str]]:
        lines = [("teacher", teacher.name), ("  feature cosine", f"{teacher.cosine:.4f}")]
        if teacher.accuracy_originals is not None:
            lines += [
                (
                    "  accuracy, originals",
                    f"{_percent(teacher.accuracy_originals)} of {teacher.images} images, {teacher.classes} classes",
                ),
                ("  accuracy, reconstructions", _percent(teacher.accuracy_reconstructions)),
            ]
        return lines

    def _probe_lines(self, probe: ProbeResult) -> list[tuple[str, str]]:
        against = f"{probe.train_images} others" if probe.train_images else "each other"
        difference = (
            f"{100 * probe.difference:+.1f} points, 95 % interval {100 * probe.low:+.1f} to {100 * probe.high:+.1f}"
        )
        return [
            (
                f"{probe.neighbors} nearest neighbors",
                f"{probe.images} images among {against}, {probe.classes} classes",
            ),
            ("  pooled code vectors", _percent(probe.codes)),
            ("  16 x 16 pixels", _percent(probe.pixels)),
            ("  difference", difference),
        ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _or_none(value: float | None, form: str, reason: str) -> str:
    return form.format(value) if value is not None else f"none ({reason})"
