"""Evaluation on photographs: the report against the same figures worked out with the tokenizer alone."""

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support.evaluation import (
    VIT,
    jpeg,
    labelled_crops,
    labelled_photographs,
    pixel_tokenizer,
    small_tokenizer,
    write_tar,
)
from torch import nn

from dyntok import KeepPolicy
from dyntok.errors import ConfigError, DataError
from dyntok.image import to_pixels
from dyntok.model.codebook import perplexity
from dyntok.training.evaluate import evaluate
from dyntok.training.report import TokenCounts
from dyntok.training.sources import find_samples


@pytest.fixture(scope="module")
def tokenizer():
    return pixel_tokenizer()


@pytest.fixture(scope="module")
def feature_tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return labelled_photographs(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return labelled_crops(tmp_path_factory.mktemp("many"))


def test_report_agrees_with_the_tokenizer_used_by_hand(tokenizer, photographs):
    report = evaluate(tokenizer, photographs, batch_size=4)
    images = [sample.read() for sample in photographs]
    encoding = tokenizer.encode(images)
    lengths = encoding.lengths.double()
    assert (report.images, report.failures, report.selection, report.policy) == (6, 0, "learned", "learned")
    assert report.tokens == TokenCounts(
        float(lengths.mean()), float(lengths.std(correction=0)), int(lengths.min()), int(lengths.max())
    )
    assert report.tokens.std > 0
    assert report.bits_per_pixel == pytest.approx(float(lengths.mean()) * 6 / 32**2)
    counts = torch.bincount(encoding.packed_codes, minlength=64)
    assert report.usage == encoding.packed_codes.unique().numel() / 64
    assert report.perplexity == pytest.approx(perplexity(counts))

    crops = [(to_pixels(data, tokenizer.config.image) + 1) / 2 for data in images]
    again = [torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in tokenizer.decode(encoding)]
    expected = [-10 * math.log10(float((a - b).square().mean())) for a, b in zip(crops, again, strict=True)]
    assert report.psnr == pytest.approx(np.mean(expected), abs=1e-3)
    assert -1 < report.ssim < 1
    assert -1 <= report.jpeg_correlation <= 1
    assert report.feature_cosine is None and report.teacher is None and report.probe is None


@pytest.mark.parametrize("selection", ["learned", "random", "even"])
def test_pictures_that_keep_their_shape(small_config, photos, selection, tmp_path):
    from support.any_grid import any_grid_tokenizer

    for i, photo in enumerate(photos):
        Image.fromarray(photo).save(tmp_path / f"{i}.png")
    photographs = find_samples([tmp_path])
    tokenizer = any_grid_tokenizer(small_config)
    report = evaluate(tokenizer, photographs, batch_size=4, selection=selection)
    encoding = tokenizer.encode([sample.read() for sample in photographs])
    assert len(encoding.grids.unique(dim=0)) > 1
    assert report.images == 6 and report.tokens.mean == float(encoding.lengths.double().mean())
    pixels = 64 * float(encoding.grids.prod(1).double().mean())
    assert report.bits_per_pixel == pytest.approx(report.tokens.mean * 8 / pixels)
    if selection == "learned":
        alone = [evaluate(tokenizer, [sample]).psnr for sample in photographs]
        assert report.psnr == pytest.approx(sum(alone) / 6, abs=1e-3)


def test_batch_size_and_order_do_not_matter(tokenizer, photographs):
    one, other = (
        evaluate(
            tokenizer,
            samples,
            batch_size=size,
            selection="random",
            policy=KeepPolicy(sample=torch.Generator().manual_seed(3)),
        )
        for samples, size in ((photographs, 1), (photographs[::-1], 4))
    )
    assert one.policy == "sample seed 3"
    assert (one.tokens, one.usage, one.jpeg_correlation) == (other.tokens, other.usage, other.jpeg_correlation)
    assert one.psnr == pytest.approx(other.psnr, abs=1e-4)


def test_another_seed_draws_another_choice(tokenizer, photographs):
    def tokens(seed):
        return evaluate(tokenizer, photographs, policy={"sample": torch.Generator().manual_seed(seed)}).tokens

    assert tokens(3) == tokens(3) != tokens(4)


def test_without_positions_the_codes_are_the_same_and_the_picture_another(tokenizer, photographs):
    placed, bare = (evaluate(tokenizer, photographs, policy={"budget": 5}, positions=flag) for flag in (True, False))
    assert (placed.tokens, placed.usage) == (bare.tokens, bare.usage) == (TokenCounts(5, 0, 5, 5), bare.usage)
    assert placed.psnr != bare.psnr
    assert placed.jpeg_correlation is None  # all of one length
    by_hand = tokenizer.decode(
        [codes.tolist() for codes in tokenizer.encode([s.read() for s in photographs], budget=5).codes]
    )
    crops = [(to_pixels(sample.read(), tokenizer.config.image) + 1) / 2 for sample in photographs]
    errors = [
        (torch.from_numpy(np.array(a)).permute(2, 0, 1) / 255 - b).square().mean()
        for a, b in zip(by_hand, crops, strict=True)
    ]
    assert bare.psnr == pytest.approx(np.mean([-10 * math.log10(float(error)) for error in errors]), abs=1e-3)


def test_rival_selections_take_the_same_lengths_and_other_patches(tokenizer, photographs):
    reports = {name: evaluate(tokenizer, photographs, selection=name) for name in ("learned", "random", "even")}
    assert reports["learned"].tokens == reports["random"].tokens == reports["even"].tokens
    assert len({report.psnr for report in reports.values()}) == 3


def test_features_are_compared_where_there_are_no_pixels(feature_tokenizer, photographs):
    feature_tokenizer.train()
    feature_tokenizer.decoder.eval()
    modes = [part.training for part in feature_tokenizer.modules()]
    report = evaluate(feature_tokenizer, photographs)
    assert [part.training for part in feature_tokenizer.modules()] == modes
    feature_tokenizer.eval()
    assert report.psnr is None and report.ssim is None
    pixels = torch.stack([to_pixels(sample.read(), feature_tokenizer.config.image) for sample in photographs])
    with torch.no_grad():
        target = feature_tokenizer.backbone(pixels)
    decoded = feature_tokenizer.decode_to_features(feature_tokenizer.encode_tensor(pixels))
    expected = nn.functional.cosine_similarity(decoded, target, dim=-1).mean()
    assert report.feature_cosine == pytest.approx(float(expected), abs=1e-5)
    assert "feature cosine" in report.table() and "PSNR" not in report.table()


def test_pictures_smaller_than_the_window_of_ssim_have_none(photographs):
    for size, measured in ((8, False), (12, True)):
        backbone = {**VIT, "img_size": size, "patch_size": 4}
        report = evaluate(small_tokenizer(size, backbone, placement="grid", head="none", pixels=True), photographs)
        assert report.psnr > 0 and (report.ssim is not None) == ("SSIM" in report.table()) == measured


def test_bad_images_are_counted_and_the_others_kept(tokenizer, tmp_path):
    files = {"a.jpg": jpeg("coffee"), "b.jpg": b"no image", "c.jpg": jpeg("rocket"), "d.jpg": jpeg("rocket")[:300]}
    samples = find_samples([write_tar(tmp_path / "mixed.tar", files)])
    samples.append(type(samples[0])("gone", str(tmp_path / "gone.jpg")))
    report = evaluate(tokenizer, samples, batch_size=2)
    assert report.images == 2 and report.failures == 3
    assert [key for key, _ in report.failed] == ["b", "d", "gone"]
    assert "2 (3 more could not be read)" in report.table()


def test_nothing_usable_is_an_error(tokenizer, tmp_path):
    samples = find_samples([write_tar(tmp_path / "bad.tar", {"a.jpg": b"no image"})])
    with pytest.raises(DataError, match="none of 1 images could be read; first: a: "):
        evaluate(tokenizer, samples)
    with pytest.raises(DataError, match="none of 0"):
        evaluate(tokenizer, [])


def test_limit_spreads_over_all_samples_and_progress_tells_how_far(tokenizer, many):
    steps = []
    report = evaluate(
        tokenizer,
        many,
        limit=6,
        batch_size=4,
        probe_samples=None,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert report.images == 6 and steps == [(4, 6), (6, 6)]
    every_fourth = evaluate(tokenizer, many[::4])
    assert (report.tokens, report.psnr) == (every_fourth.tokens, pytest.approx(every_fourth.psnr, abs=1e-4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "best"}, "selection is 'best'"),
        ({"policy": {"budgets": 3}}, "policy has budgets, expected some of budget"),
        ({"policy": {"budget": 3, "threshold": 0.5}}, "both given"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"limit": 0}, "limit is 0"),
    ],
    ids=["selection", "unknown", "contradiction", "batch", "limit"],
)
def test_options_that_do_not_fit_are_refused(tokenizer, photographs, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(tokenizer, photographs, **options)


# The semantics probe


def test_the_run_probes_labelled_photographs(tokenizer, many):
    alone = evaluate(tokenizer, many).probe
    assert (alone.images, alone.train_images, alone.classes) == (24, 0, 2)
    apart = evaluate(tokenizer, many[1::2], probe_samples=many[::2]).probe
    assert (apart.images, apart.train_images, apart.classes) == (12, 12, 2)
    # two photographs, slightly shifted crops: their pixels tell them apart without fail
    assert alone.pixels == apart.pixels == 1 and apart.codes > 0.5


def test_the_probe_obeys_its_prefix_and_limit(tokenizer, many, monkeypatch):
    assert evaluate(tokenizer, many[1::2], probe_samples=many[::2], probe_prefix="coffee/").probe is None  # one class
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["dyntok.training.evaluate"], "_PROBE_LIMIT", 11)
        few = evaluate(tokenizer, many[::2], probe_samples=many[1::2]).probe
    assert few.train_images == 11
    with pytest.raises(DataError, match="none of 12 probe samples"):
        evaluate(tokenizer, many[::2], probe_samples=many[1::2], probe_prefix="imagenette-")


def test_evaluated_images_must_not_teach_the_probe(tokenizer, many):
    with pytest.raises(DataError, match="3 images are both evaluated and probe samples"):
        evaluate(tokenizer, many[:5], probe_samples=many[2:])
