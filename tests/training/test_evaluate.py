"""Evaluation on photographs: the report against the same figures worked out with the tokenizer alone."""

import io
import math
import os
import sys
import tarfile

import numpy as np
import pytest
import skimage.data
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from dyntok import DynamicVisualTokenizer, KeepPolicy, TokenizerConfig
from dyntok.errors import CheckpointError, ConfigError, DataError
from dyntok.image import to_pixels
from dyntok.model.codebook import perplexity
from dyntok.training.classifier import Classifier, load_classifier
from dyntok.training.evaluate import evaluate
from dyntok.training.recipe import Teacher
from dyntok.training.report import TokenCounts
from dyntok.training.sources import find_samples

TENCH, SPRINGER, CHURCH = "n01440764", "n02102040", "n03028079"  # ImageNet classes 0, 217, 497
PHOTOGRAPHS = {
    "astronaut": TENCH,
    "coffee": SPRINGER,
    "chelsea": CHURCH,
    "rocket": TENCH,
    "camera": SPRINGER,
    "colorwheel": "buildings",
}
VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, class_token=False, global_pool="avg")


def small_tokenizer(img_size=32, backbone=VIT, **decoder):
    config = {
        "image": {"img_size": img_size},
        "backbone": {"name": "vit_tiny_patch16_224", "kwargs": backbone},
        "merger": {"depth": 1, "num_heads": 2, "mlp_ratio": 2.0},
        "codebook": {"size": 64, "dim": 8, "projection": "linear"},
        "decoder": {"depth": 1, "num_heads": 2, "mlp_ratio": 2.0, **decoder},
    }
    torch.manual_seed(0)
    tokenizer = DynamicVisualTokenizer(TokenizerConfig.from_dict(config)).eval()
    with torch.no_grad():
        tokenizer.selector.head.bias.zero_()  # else an untrained selector keeps every patch
        tokenizer.selector.head.weight.mul_(20)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer(placement="grid", conv=True, head="none", pixels=True)


@pytest.fixture(scope="module")
def feature_tokenizer():
    return small_tokenizer()


def jpeg(name, box=None):
    image = Image.fromarray(getattr(skimage.data, name)()).convert("RGB").resize((96, 80), box=box)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Six photographs in a webdataset tar, keys pic-0 to pic-5, with labels."""
    files = {}
    for i, (name, label) in enumerate(PHOTOGRAPHS.items()):
        files[f"pic-{i}.jpg"] = jpeg(name)
        files[f"pic-{i}.cls.txt"] = label.encode()
    return find_samples([write_tar(tmp_path_factory.mktemp("data") / "pics.tar", files)])


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """24 crops of two photographs, the photograph's name as label, in a folder of folders."""
    root = tmp_path_factory.mktemp("many")
    for name in ("coffee", "rocket"):
        (root / name).mkdir()
        for i in range(12):
            (root / name / f"{i:02}.jpg").write_bytes(jpeg(name, (10 * i, 5 * i, 10 * i + 260, 5 * i + 220)))
    return find_samples([root])


# The whole run


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


# Another network's judgement


class FakeTeacher(nn.Module):
    """Knows the class of a picture that is not noise: the logits follow from the mean of its raw pixels."""

    num_classes = 1000
    pretrained_cfg = {
        "architecture": "fake",
        "input_size": (3, 48, 48),
        "mean": (0.5, 0.25, 0.5),
        "std": (0.5, 0.25, 0.1),
    }

    def __init__(self, classes=(0, 217, 497)):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.classes = classes
        self.inputs = []

    def forward_features(self, pixels):
        self.inputs.append(pixels)
        return pixels

    def forward_head(self, features, pre_logits=False):
        if pre_logits:
            return features.mean((2, 3))
        logits = torch.zeros(len(features), 1000)
        logits[:, 3] = 100  # a class that is not among the labels, and must not count
        mean = torch.tensor(self.pretrained_cfg["mean"]).view(3, 1, 1)
        std = torch.tensor(self.pretrained_cfg["std"]).view(3, 1, 1)
        level = (features * std + mean).mean((1, 2, 3))
        for row, value in zip(logits, level.tolist(), strict=True):
            row[self.classes[min(int(value * 3), 2)]] = 10
        return logits


def test_judge_scales_normalises_and_chooses_among_the_classes_that_occur():
    teacher = FakeTeacher()
    classifier = Classifier(teacher, [CHURCH, TENCH, None, SPRINGER, "buildings", TENCH])
    assert classifier.classes == [TENCH, SPRINGER, CHURCH] and classifier.name == "fake"
    images = torch.stack([torch.full((3, 32, 32), value) for value in (0.1, 0.5, 0.9)])
    pooled, guesses = classifier(images)
    assert teacher.inputs[0].shape == (3, 3, 48, 48)
    assert pooled[0].tolist() == pytest.approx([-0.8, -0.6, -4.0], abs=1e-5)  # (0.1 - mean) / std
    assert guesses == [TENCH, SPRINGER, CHURCH]


@pytest.mark.parametrize(
    "labels", [[], [TENCH, TENCH], ["cat", "dog", None]], ids=["none", "one class", "other labels"]
)
def test_judge_does_not_guess_without_two_imagenet_classes(labels):
    classifier = Classifier(FakeTeacher(), labels)
    assert classifier.classes == [] and classifier(torch.rand(1, 3, 32, 32))[1] is None


def grey_samples(folder, levels):
    """Flat pictures: {key: (grey level, label)}"""
    files = {}
    for key, (level, label) in levels.items():
        buffer = io.BytesIO()
        Image.new("RGB", (40, 40), (level,) * 3).save(buffer, "PNG")
        files[f"{key}.png"], files[f"{key}.cls.txt"] = buffer.getvalue(), label.encode()
    return find_samples([write_tar(folder / "grey.tar", files)])


def test_accuracy_on_originals_and_reconstructions(tokenizer, tmp_path):
    # dark is tench, middle springer, bright church: e is labelled wrongly, f has no wnid
    levels = {
        "a": (10, TENCH),
        "b": (128, SPRINGER),
        "c": (250, CHURCH),
        "d": (20, TENCH),
        "e": (30, CHURCH),
        "f": (20, "buildings"),
    }
    samples = grey_samples(tmp_path, levels)
    report = evaluate(tokenizer, samples, teacher=FakeTeacher())
    assert report.teacher.classes == 3 and report.teacher.images == 5
    assert report.teacher.accuracy_originals == 4 / 5
    reconstructions = [
        np.asarray(image).mean() / 255 for image in tokenizer.decode(tokenizer.encode([s.read() for s in samples]))
    ]
    guesses = [(TENCH, SPRINGER, CHURCH)[min(int(level * 3), 2)] for level in reconstructions]
    hits = [
        guess == sample.label for guess, sample in zip(guesses, samples, strict=True) if sample.label != "buildings"
    ]
    assert report.teacher.accuracy_reconstructions == np.mean(hits)
    assert "80.0 % of 5 images, 3 classes" in report.table()


def test_a_limit_leaves_the_classes_as_they_are(tokenizer, tmp_path):
    samples = grey_samples(tmp_path, {"a": (10, TENCH), "b": (128, SPRINGER), "c": (250, CHURCH)})
    report = evaluate(tokenizer, samples, teacher=FakeTeacher(), limit=1)
    assert (report.teacher.images, report.teacher.classes, report.teacher.accuracy_originals) == (1, 3, 1)


def test_a_timm_network_judges(tokenizer, photographs, tmp_path):
    torch.manual_seed(1)
    kwargs = {"pretrained_cfg_overlay": {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3}}
    original = timm.create_model("test_efficientnet", **kwargs)
    save_file(original.state_dict(), tmp_path / "weights.safetensors")
    teacher = load_classifier(Teacher("test_efficientnet", str(tmp_path / "weights.safetensors"), kwargs))
    assert not teacher.training
    report = evaluate(tokenizer, photographs, teacher=teacher)
    judged = report.teacher
    assert (judged.name, judged.images, judged.classes) == ("test_efficientnet", 5, 3)
    assert 0 <= judged.accuracy_originals <= 1 and 0 <= judged.accuracy_reconstructions <= 1

    # the cosine by another way: the network's own forward, without its classifier
    original.reset_classifier(0)
    originals = torch.stack([to_pixels(sample.read(), tokenizer.config.image) for sample in photographs])
    painted = tokenizer.decode_to_pixels(tokenizer.encode_tensor(originals)).clamp(-1, 1)
    scaled = [
        nn.functional.interpolate(x, size=64, mode="bicubic", antialias=True).clamp(-1, 1) for x in (originals, painted)
    ]
    with torch.no_grad():
        seen = [original.eval()(x) for x in scaled]
    assert judged.cosine == pytest.approx(float(nn.functional.cosine_similarity(*seen).mean()), abs=1e-3)


def test_a_network_without_classifier_compares_features_only(tokenizer, photographs):
    report = evaluate(tokenizer, photographs, teacher=timm.create_model("test_efficientnet", num_classes=0), limit=2)
    assert report.teacher.accuracy_originals is None and report.teacher.classes == 0
    assert "accuracy" not in report.table()


def test_teacher_errors_are_helpful(feature_tokenizer, photographs, tmp_path):
    with pytest.raises(ConfigError, match="no pixel head"):
        evaluate(feature_tokenizer, photographs, teacher=FakeTeacher())
    with pytest.raises(ConfigError, match="timm can't create the teacher 'no_such_net'"):
        load_classifier(Teacher("no_such_net", "x.safetensors"))
    with pytest.raises(CheckpointError, match="x.safetensors"):
        load_classifier(Teacher("test_efficientnet", str(tmp_path / "x.safetensors")))


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


@pytest.mark.skipif(
    "DYNTOK_DATA" not in os.environ, reason="DYNTOK_DATA is not set: needs the photographs and the teacher's weights"
)
def test_the_real_teacher_recognises_the_originals(tokenizer):
    data = os.environ["DYNTOK_DATA"]
    overlay = {"mean": [0.5] * 3, "std": [0.5] * 3}  # these weights want RGB in [-1, 1]
    weights = os.path.join(data, "teacher", "mobilenetv2_100_imagenet.safetensors")
    teacher = load_classifier(
        Teacher("mobilenetv2_100", weights, {"pad_type": "same", "pretrained_cfg_overlay": overlay})
    )
    samples = [
        s
        for s in find_samples([os.path.join(data, "photos", "photos-000.tar")], "train")
        if s.key.startswith("imagenette-")
    ]
    backbone = {"name": "vit_tiny_patch16_224", "kwargs": {**VIT, "img_size": 128, "patch_size": 32}}
    config = TokenizerConfig.from_dict({**tokenizer.config.to_dict(), "image": {"img_size": 128}, "backbone": backbone})
    torch.manual_seed(0)
    report = evaluate(DynamicVisualTokenizer(config).eval(), samples, teacher=teacher, limit=40)
    assert report.teacher.images == 40 and report.teacher.classes == 10
    assert report.teacher.accuracy_originals > 0.8 > report.teacher.accuracy_reconstructions
