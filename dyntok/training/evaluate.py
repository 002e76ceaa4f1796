"""Measures a tokenizer on photographs: quality of the reconstructions, lengths, use of the codebook.

Every picture is measured as the tokenizer sees it, its own crop, and as a user gets it, in 8 bits. Not here: the
formulas (`metrics.py`), the classifier (`classifier.py`), nearest neighbors (`probe.py`), the table (`report.py`).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyntok.errors import ConfigError, DataError
from dyntok.image import DEFAULT_MAX_PIXELS
from dyntok.model.codebook import perplexity
from dyntok.policy import KeepPolicy
from dyntok.refine import check_rounds
from dyntok.tokenizer import Decoding, DynamicVisualTokenizer, Fit, Size
from dyntok.training import metrics
from dyntok.training.classifier import Classifier
from dyntok.training.encoded_batches import EncodedBatch, Failure, SampleEncoder, Selection, to_visible
from dyntok.training.probe import LabeledVectors, probe
from dyntok.training.report import ClassifierResult, EvaluationReport, TokenCounts
from dyntok.training.sources import ImageSample, spread

_PROBE_LIMIT = 2000  # probe samples, spread evenly over those given


def evaluate(
    tokenizer: DynamicVisualTokenizer,
    samples: Sequence[ImageSample],
    *,
    policy: KeepPolicy | Mapping[str, Any] | None = None,
    positions: bool = True,
    selection: Selection = "learned",
    teacher: nn.Module | None = None,
    probe_samples: Sequence[ImageSample] | None = None,
    probe_prefix: str = "",
    fit: Fit | None = None,
    max_patches: int | None = None,
    size: Size | None = None,
    decoding: Decoding | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    refine: int = 0,
    batch_size: int = 16,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationReport:
    """Measures a tokenizer on `samples` (see `find_samples`). Their order does not matter.

    policy: how many tokens to keep, as in `encode`, such as {"budget": 96}. A `sample` generator draws for each image
        from its own seed and the image's key.
    positions: whether to decode with positions, or from the codes alone.
    selection: which patches to keep. "random" and "even" keep the same number per image as `policy`, but others.
    fit, max_patches, size, decoding, max_pixels: how pictures are prepared, as in `encode`.
    refine: rounds that try other codes, as in `encode`.
    teacher: a timm network with its classifier (see `load_classifier`) that compares originals and reconstructions.
    probe_samples: labeled images, none of `samples`, to search for nearest neighbors. Without them the search is among
        the evaluated images. There is no probe without labels, with one class only, or with ten images or fewer.
    probe_prefix: only samples whose key starts with this take part in the probe.
    limit: use at most this number of samples, spread evenly over those given.
    progress: called after each batch with the number of images done and the total.

    Images that can't be read are left out and listed in the report. Raises `DataError` if none is left or if an image
    is both evaluated and a probe sample, `ConfigError` on invalid options.
    """
    policy, refine = _policy(policy), check_rounds(refine, margins=False)
    _check_options(tokenizer, selection, teacher, {"batch_size": batch_size, "limit": limit})
    chosen = spread(samples, limit)
    labeled = LabeledVectors(probe_prefix)
    neighbors = None if probe_samples is None else LabeledVectors(probe_prefix)
    probed = [] if neighbors is None else _choose_probe_samples(probe_samples, neighbors, chosen)
    image = tokenizer.image_config(fit=fit, max_patches=max_patches, size=size, decoding=decoding)
    total = len(chosen) + len(probed)
    encoder = SampleEncoder(tokenizer, policy, selection, batch_size, total, image, progress, max_pixels, refine)
    # the classes are those of all samples, so that a limit does not make the task easier
    classifier = Classifier(teacher, [sample.label for sample in samples]) if teacher is not None else None
    tally = _Tally(torch.zeros(len(tokenizer.codebook.embedding), dtype=torch.long, device="cpu"))
    failed: list[Failure] = []
    probe_failed: list[Failure] = []
    for batch in encoder.batches(chosen, failed):
        tally.add(batch)
        labeled.add(batch.samples, batch.images, batch.vectors, batch.encoding.lengths.tolist())
        _compare(tokenizer, batch, positions, classifier, tally)
    if not tally.lengths:
        reason = f"; first: {failed[0][0]}: {failed[0][1]}" if failed else ""
        raise DataError(f"none of {len(chosen)} images could be read{reason}")
    for batch in encoder.batches(probed, probe_failed):
        neighbors.add(batch.samples, batch.images, batch.vectors, batch.encoding.lengths.tolist())

    num_codes, tokens = len(tally.code_counts), tally.token_counts()
    return EvaluationReport(
        images=len(tally.lengths),
        failed=tuple(failed),
        policy=_describe(policy),
        selection=selection,
        positions=positions,
        refine=refine,
        tokens=tokens,
        bits_per_pixel=metrics.bits_per_pixel(tokens.mean, num_codes, tally.pixels / len(tally.lengths)),
        codebook_size=num_codes,
        usage=float((tally.code_counts > 0).double().mean()),
        perplexity=perplexity(tally.code_counts),
        jpeg_correlation=metrics.rank_correlation(tally.lengths, tally.jpeg_bytes),
        psnr=_mean(tally.psnr),
        ssim=_mean(tally.ssim),
        feature_cosine=_mean(tally.feature_cosine),
        teacher=_classifier_result(classifier, tally) if classifier else None,
        probe=probe(labeled, neighbors, len(probe_failed)),
    )


@dataclass
class _Tally:
    """One entry per image in each list, if the figure applies to it."""

    code_counts: Tensor  # [K]
    pixels: int = 0  # of all images
    lengths: list[int] = field(default_factory=list)
    jpeg_bytes: list[int] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    feature_cosine: list[float] = field(default_factory=list)
    teacher_cosine: list[float] = field(default_factory=list)
    correct_originals: list[bool] = field(default_factory=list)
    correct_reconstructions: list[bool] = field(default_factory=list)

    def add(self, batch: EncodedBatch) -> None:
        self.pixels += len(batch.pixels) * batch.pixels.shape[2] * batch.pixels.shape[3]
        self.lengths += batch.encoding.lengths.tolist()
        self.code_counts += torch.bincount(batch.encoding.packed_codes, minlength=len(self.code_counts))
        self.jpeg_bytes += map(metrics.jpeg_bytes, batch.images)

    def token_counts(self) -> TokenCounts:
        lengths = torch.tensor(self.lengths, dtype=torch.float64)
        return TokenCounts(
            float(lengths.mean()), float(lengths.std(correction=0)), min(self.lengths), max(self.lengths)
        )


def _check_options(
    tokenizer: DynamicVisualTokenizer, selection: str, teacher: nn.Module | None, counts: Mapping[str, int | None]
) -> None:
    if selection not in ("learned", "random", "even"):
        raise ConfigError(f"selection is {selection!r}, expected 'learned', 'random' or 'even'")
    if teacher is not None and tokenizer.pixel_head is None:
        raise ConfigError("a teacher compares pictures, and this tokenizer has no pixel head; leave the teacher out")
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}, expected at least 1")


def _choose_probe_samples(
    samples: Sequence[ImageSample], neighbors: LabeledVectors, evaluated: Sequence[ImageSample]
) -> list[ImageSample]:
    accepted = [sample for sample in samples if neighbors.accepts(sample)]
    if not accepted:
        raise DataError(
            f"none of {len(samples)} probe samples has a label and a key that starts with {neighbors.prefix!r}"
        )
    both = {(sample.path, sample.offset) for sample in accepted} & {(one.path, one.offset) for one in evaluated}
    if both:
        raise DataError(f"{len(both)} images are both evaluated and probe samples; give the probe other images")
    return spread(accepted, _PROBE_LIMIT)


def _compare(
    tokenizer: DynamicVisualTokenizer,
    batch: EncodedBatch,
    positions: bool,
    classifier: Classifier | None,
    tally: _Tally,
) -> None:
    codes = batch.encoding if positions else dataclasses.replace(batch.encoding, packed_positions=None)
    decoder, config = tokenizer.decoder, tokenizer.config.decoder
    restores = decoder is not None and (config.head == "mlp" or tokenizer.pixel_head is None)
    if restores and decoder.out_dim == tokenizer.backbone.embed_dim:
        with tokenizer.inference():
            target = tokenizer.backbone(batch.pixels.to(tokenizer.device, tokenizer.dtype))
        tally.feature_cosine += metrics.patch_cosine(tokenizer.decode_to_features(codes), target).tolist()
    if tokenizer.pixel_head is None:
        return
    decoded = to_visible(tokenizer.decode_to_pixels(codes).cpu(), tokenizer.config.image)
    tally.psnr += metrics.psnr(decoded, batch.originals).tolist()
    if min(decoded.shape[2:]) >= metrics.SSIM_WINDOW:
        tally.ssim += metrics.ssim(decoded, batch.originals)
    if classifier is None:
        return
    (features, guesses), (decoded_features, decoded_guesses) = classifier(batch.originals), classifier(decoded)
    tally.teacher_cosine += F.cosine_similarity(features.float(), decoded_features.float(), dim=-1).tolist()
    for i, sample in enumerate(batch.samples):
        if sample.label in classifier.classes:
            tally.correct_originals.append(guesses[i] == sample.label)
            tally.correct_reconstructions.append(decoded_guesses[i] == sample.label)


def _classifier_result(classifier: Classifier, tally: _Tally) -> ClassifierResult:
    return ClassifierResult(
        name=classifier.name,
        cosine=_mean(tally.teacher_cosine),
        images=len(tally.correct_originals),
        classes=len(classifier.classes),
        accuracy_originals=_mean(tally.correct_originals),
        accuracy_reconstructions=_mean(tally.correct_reconstructions),
    )


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
        given["sample"] = f"seed {policy.seed}"
    learned = [] if set(given) - {"max_tokens"} else ["learned"]
    return ", ".join(learned + [f"{name} {value}" for name, value in given.items()])
