"""The run behind `dyntok eval`: photographs through a tokenizer and back, and what became of them.

Every picture is judged as the tokenizer sees it, its own crop, and as a user gets it, in 8 bits. Not here: the formulas (`metrics.py`),
the network that judges (`judge.py`), nearest neighbours (`probe.py`), the table (`report.py`).
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyntok.chunks import batched
from dyntok.config import ImageConfig
from dyntok.encoding import Encoding
from dyntok.errors import ConfigError, DataError, ImageError
from dyntok.image import to_image, to_pixels
from dyntok.model.codebook import perplexity
from dyntok.policy import KeepPolicy
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.training import metrics
from dyntok.training.classifier import Judge
from dyntok.training.data import Sample
from dyntok.training.masks import even_mask, random_mask, seed_of
from dyntok.training.probe import LabelledVectors, probe
from dyntok.training.report import Judgement, Report, Tokens


def evaluate(
    tokenizer: DynamicVisualTokenizer,
    samples: Sequence[Sample],
    *,
    policy: KeepPolicy | Mapping[str, Any] | None = None,
    positions: bool = True,
    selection: Literal["learned", "random", "even"] = "learned",
    teacher: nn.Module | None = None,
    probe_samples: Sequence[Sample] | None = None,
    probe_prefix: str = "",
    probe_limit: int = 2000,
    batch_size: int = 16,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Measure a tokenizer on `samples` (see `find_samples`). The same samples give the same report; order does not matter.

    policy: how many tokens, as in `encode` (`{"budget": 96}`, say); a `sample` generator draws for each image from its seed and the key.
    positions: decode with them, or from the codes alone.
    selection: which patches. "random" and "even" take as many per image as `policy` does, but other ones (`masks.py`).
    teacher: a timm network with its classifier (`load_judge`) that looks at originals and reconstructions.
    probe_samples: labelled images, none of those evaluated, among which the nearest neighbours are looked for; without them the evaluated
        images are each other's. The probe is left out where labels are missing, have but one class, or are not more than ten images.
    probe_prefix: only samples whose key begins so take part in the probe.
    limit, probe_limit: at most so many samples, spread evenly over those given.
    progress: called after each batch with the number of images done and the number of all.

    An image that can't be read is left out and listed in the report. Raises `DataError` where none is left, or an image is both evaluated
    and a probe sample; `ConfigError` on options that do not fit.
    """
    policy = _policy(policy)
    if selection not in ("learned", "random", "even"):
        raise ConfigError(f"selection is {selection!r}, expected 'learned', 'random' or 'even'")
    if teacher is not None and tokenizer.pixel_head is None:
        raise ConfigError(
            "a teacher looks at reconstructed pictures, and this tokenizer has no pixel head; leave the teacher out"
        )
    for name, value in {"batch_size": batch_size, "limit": limit, "probe_limit": probe_limit}.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}, expected at least 1")

    chosen = _spread(samples, limit)
    labelled = LabelledVectors(probe_prefix)
    neighbours = None if probe_samples is None else LabelledVectors(probe_prefix)
    probed = _probe_samples(probe_samples, neighbours, chosen, probe_limit)
    coder = _Coder(tokenizer, policy, selection, batch_size, progress, len(chosen) + len(probed))
    # the classes are those of all samples, so that a limit does not make the task easier
    judge = Judge(teacher, [sample.label for sample in samples]) if teacher is not None else None
    tally = _Tally(torch.zeros(len(tokenizer.codebook.embedding), dtype=torch.long))
    failed: list[tuple[str, str]] = []
    probe_failed: list[tuple[str, str]] = []
    for batch in coder.batches(chosen, failed):
        tally.lengths += batch.encoding.lengths.tolist()
        tally.code_counts += torch.bincount(batch.encoding.packed_codes, minlength=len(tally.code_counts))
        tally.jpeg_bytes += map(metrics.jpeg_bytes, batch.images)
        labelled.add(batch.samples, batch.images, batch.vectors, batch.encoding.lengths.tolist())
        _compare(tokenizer, batch, positions, judge, tally)
    if not tally.lengths:
        reason = f"; first: {failed[0][0]}: {failed[0][1]}" if failed else ""
        raise DataError(f"none of {len(chosen)} images could be read{reason}")
    for batch in coder.batches(probed, probe_failed):
        neighbours.add(batch.samples, batch.images, batch.vectors, batch.encoding.lengths.tolist())

    lengths = torch.tensor(tally.lengths, dtype=torch.float64)
    side, num_codes = tokenizer.config.image.img_size, len(tally.code_counts)
    return Report(
        images=len(lengths),
        failed=tuple(failed),
        policy=_describe(policy),
        selection=selection,
        positions=positions,
        tokens=Tokens(float(lengths.mean()), float(lengths.std(correction=0)), min(tally.lengths), max(tally.lengths)),
        bits_per_pixel=metrics.bits_per_pixel(float(lengths.mean()), num_codes, side * side),
        codebook_size=num_codes,
        usage=float((tally.code_counts > 0).double().mean()),
        perplexity=perplexity(tally.code_counts),
        jpeg_correlation=metrics.rank_correlation(tally.lengths, tally.jpeg_bytes),
        psnr=_mean(tally.psnr),
        ssim=_mean(tally.ssim),
        feature_cosine=_mean(tally.feature_cosine),
        teacher=_judgement(judge, tally) if judge else None,
        probe=probe(labelled, neighbours, len(probe_failed)),
    )


@dataclass
class _Batch:
    """Images that could be read, and their codes, on the CPU."""

    samples: list[Sample]
    pixels: Tensor  # [B, 3, S, S], normalized
    originals: Tensor  # [B, 3, S, S] in [0, 1]
    images: list  # PIL images of the same
    encoding: Encoding
    vectors: Tensor  # [T, C]


@dataclass
class _Tally:
    """One entry per image, where a figure applies to it."""

    code_counts: Tensor  # [K]
    lengths: list[int] = field(default_factory=list)
    jpeg_bytes: list[int] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    feature_cosine: list[float] = field(default_factory=list)
    teacher_cosine: list[float] = field(default_factory=list)
    right_originals: list[bool] = field(default_factory=list)
    right_reconstructions: list[bool] = field(default_factory=list)


class _Coder:
    """Samples to batches of pixels and codes."""

    def __init__(
        self,
        tokenizer: DynamicVisualTokenizer,
        policy: KeepPolicy,
        selection: str,
        batch_size: int,
        progress: Callable | None,
        total: int,
    ) -> None:
        self.tokenizer, self.policy, self.selection = tokenizer, policy, selection
        self.batch_size, self.progress, self.total, self.done = batch_size, progress, total, 0

    def batches(self, samples: Sequence[Sample], failed: list[tuple[str, str]]) -> Iterator[_Batch]:
        image = self.tokenizer.config.image
        for part in batched(samples, self.batch_size):
            readable = list(self._read(part, failed))
            if readable:
                kept, tensors = zip(*readable, strict=True)
                pixels = torch.stack(tensors)
                encoding = self._encode(kept, pixels).to("cpu")
                vectors = self.tokenizer.codebook.lookup(encoding.packed_codes.to(self.tokenizer.device)).cpu()
                images = [to_image(row, image) for row in pixels]
                yield _Batch(list(kept), pixels, _seen(pixels, image), images, encoding, vectors)
            self.done += len(part)
            if self.progress is not None:
                self.progress(self.done, self.total)

    def _read(self, samples: Sequence[Sample], failed: list[tuple[str, str]]) -> Iterator[tuple[Sample, Tensor]]:
        for sample in samples:
            try:
                yield sample, to_pixels(sample.read(), self.tokenizer.config.image)
            except (ImageError, OSError) as error:
                failed.append((sample.key, str(error)))

    def _encode(self, samples: Sequence[Sample], pixels: Tensor) -> Encoding:
        if self.policy.sample is not None:
            encoding = Encoding.cat(
                [self._draw(sample, row[None]) for sample, row in zip(samples, pixels, strict=True)]
            )
        else:
            encoding = self.tokenizer.encode_tensor(pixels, **vars(self.policy))
        if self.selection == "learned":
            return encoding
        grid = self.tokenizer.grid
        pairs = zip(encoding.lengths.tolist(), samples, strict=True)
        masks = [
            even_mask(n, grid) if self.selection == "even" else random_mask(n, grid, sample.key) for n, sample in pairs
        ]
        return self.tokenizer.encode_tensor(pixels, keep_mask=torch.stack(masks))

    def _draw(self, sample: Sample, pixels: Tensor) -> Encoding:
        # by the key: an image's place among the others must not matter here
        seed = seed_of(sample.key, f"sample/{self.policy.sample.initial_seed()}")
        generator = torch.Generator().manual_seed(seed)
        return self.tokenizer.encode_tensor(pixels, sample=generator, max_tokens=self.policy.max_tokens)


def _probe_samples(
    samples: Sequence[Sample] | None, neighbours: LabelledVectors | None, evaluated: Sequence[Sample], limit: int
) -> list[Sample]:
    if samples is None:
        return []
    taken = [sample for sample in samples if neighbours.takes(sample)]
    if not taken:
        raise DataError(
            f"none of {len(samples)} probe samples has a label and a key that begins with {neighbours.prefix!r}"
        )
    both = {(sample.path, sample.offset) for sample in taken} & {(sample.path, sample.offset) for sample in evaluated}
    if both:
        raise DataError(
            f"{len(both)} images are both evaluated and probe samples; give the probe other ones (the training part)"
        )
    return _spread(taken, limit)


def _compare(
    tokenizer: DynamicVisualTokenizer, batch: _Batch, positions: bool, judge: Judge | None, tally: _Tally
) -> None:
    codes = batch.encoding if positions else dataclasses.replace(batch.encoding, packed_positions=None)
    if (
        tokenizer.config.decoder is not None
        and tokenizer.config.decoder.head == "mlp"
        and tokenizer.config.decoder.out_dim is None
    ):
        with tokenizer.inference():
            target = tokenizer.backbone(batch.pixels.to(tokenizer.device, tokenizer.dtype))
        tally.feature_cosine += metrics.patch_cosine(tokenizer.decode_to_features(codes), target).tolist()
    if tokenizer.pixel_head is None:
        return
    painted = _seen(tokenizer.decode_to_pixels(codes).cpu(), tokenizer.config.image)
    tally.psnr += metrics.psnr(painted, batch.originals).tolist()
    if painted.shape[-1] >= metrics.SSIM_WINDOW:
        tally.ssim += metrics.ssim(painted, batch.originals)
    if judge is None:
        return
    (features, guesses), (features_again, guesses_again) = judge(batch.originals), judge(painted)
    tally.teacher_cosine += F.cosine_similarity(features.float(), features_again.float(), dim=-1).tolist()
    for i, sample in enumerate(batch.samples):
        if sample.label in judge.classes:
            tally.right_originals.append(guesses[i] == sample.label)
            tally.right_reconstructions.append(guesses_again[i] == sample.label)


def _judgement(judge: Judge, tally: _Tally) -> Judgement:
    accuracies = _mean(tally.right_originals), _mean(tally.right_reconstructions)
    return Judgement(
        judge.name, _mean(tally.teacher_cosine), len(tally.right_originals), len(judge.classes), *accuracies
    )


def _seen(pixels: Tensor, config: ImageConfig) -> Tensor:
    """Normalised pixels [B, 3, S, S] as anyone sees them: in [0, 1], 8 bits."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    return (pixels.float() * std + mean).clamp(0, 1).mul(255).round() / 255


def _spread(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    count = min(limit or len(samples), len(samples))
    return [samples[i * len(samples) // count] for i in range(count)]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _policy(policy: KeepPolicy | Mapping[str, Any] | None) -> KeepPolicy:
    if isinstance(policy, KeepPolicy):
        return policy
    options = [option.name for option in dataclasses.fields(KeepPolicy)]
    if unknown := sorted(set(policy or ()) - set(options)):
        raise ConfigError(f"policy has {', '.join(map(str, unknown))}, expected some of {', '.join(options)}")
    return KeepPolicy(**(policy or {}))


def _describe(policy: KeepPolicy) -> str:
    given = {name: value for name, value in vars(policy).items() if value is not None}
    if policy.sample is not None:
        given["sample"] = f"seed {policy.sample.initial_seed()}"
    learned = [] if set(given) - {"max_tokens"} else ["learned"]
    return ", ".join(learned + [f"{name} {value}" for name, value in given.items()])
