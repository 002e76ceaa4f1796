"""Evaluations with a teacher: what another network sees in originals and reconstructions."""

import io
import os

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from support.evaluation import (
    CHURCH,
    SPRINGER,
    TENCH,
    VIT,
    labelled_photographs,
    pixel_tokenizer,
    small_tokenizer,
    write_tar,
)
from torch import nn

from dyntok import DynamicVisualTokenizer, TokenizerConfig
from dyntok.errors import CheckpointError, ConfigError
from dyntok.image import to_pixels
from dyntok.training.classifier import Classifier, load_classifier
from dyntok.training.evaluate import evaluate
from dyntok.training.recipe import Teacher
from dyntok.training.sources import find_samples
from dyntok.training.teacher import TeacherFeatures


@pytest.fixture(scope="module")
def tokenizer():
    return pixel_tokenizer()


@pytest.fixture(scope="module")
def feature_tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return labelled_photographs(tmp_path_factory.mktemp("data"))


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


def test_teacher_errors_are_helpful(feature_tokenizer, photographs, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no pixel head"):
        evaluate(feature_tokenizer, photographs, teacher=FakeTeacher())
    with pytest.raises(ConfigError, match="timm can't create the teacher 'no_such_net'"):
        load_classifier(Teacher("no_such_net", "x.safetensors"))
    create = timm.create_model  # without fetching weights
    monkeypatch.setattr(timm, "create_model", lambda *args, pretrained, **options: create(*args, **options))
    random = Teacher("test_efficientnet", kwargs={"num_classes": 10})
    for load in (load_classifier, lambda teacher: TeacherFeatures(teacher, (0.5,) * 3, (0.5,) * 3)):
        with pytest.raises(ConfigError, match="have a classifier of 1000 classes, but num_classes is 10"):
            load(random)
    assert load_classifier(Teacher("test_efficientnet", kwargs={"num_classes": 0})).num_classes == 0
    with pytest.raises(CheckpointError, match="x.safetensors"):
        load_classifier(Teacher("test_efficientnet", str(tmp_path / "x.safetensors")))


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
