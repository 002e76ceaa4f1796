"""Figures of an evaluation, each against a value worked out by hand or by another way."""

import io
import math

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from dyntok.training import metrics, probe
from dyntok.training.probe import LabeledVectors


def test_psnr_by_hand():
    originals = torch.zeros(3, 3, 4, 4)
    images = originals.clone()
    images[0] += 0.1  # MSE 0.01
    images[1, 0, :2] = 1  # 8 of 48 values are wrong by 1: MSE 1/6
    assert metrics.psnr(images, originals).tolist() == pytest.approx([20, 10 * math.log10(6), 100], abs=1e-5)


def test_ssim_is_one_for_the_same_picture_and_near_nothing_for_noise():
    image = torch.from_numpy(skimage.data.astronaut()[:64, 200:264] / 255).permute(2, 0, 1)[None].float()
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert metrics.ssim(image, image) == pytest.approx([1])
    assert metrics.ssim(noise, image)[0] < 0.1
    # of constant images only the luminance term is left: (2ab + c) / (a² + b² + c), c = 0.01²
    a, b = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), 0.25)
    assert metrics.ssim(a, b) == pytest.approx([(0.25 + 1e-4) / (0.3125 + 1e-4)], abs=1e-5)


def test_patch_cosine_by_hand():
    features = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 4.0], [1.0, 1.0]]])
    target = torch.tensor([[[5.0, 0.0], [1.0, 0.0]], [[-3.0, -4.0], [1.0, 1.0]]])
    assert metrics.patch_cosine(features, target).tolist() == pytest.approx([0.5, 0], abs=1e-6)


def test_bits_per_pixel_by_hand():
    assert metrics.bits_per_pixel(96, 8192, 128 * 128) == 96 * 13 / 16384


def test_rank_correlation_by_hand():
    # ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * (1 + 1 + 1 + 1) / (4 * 15)
    assert metrics.rank_correlation([1, 5, 6, 100], [20, 3, 50, 40]) == pytest.approx(0.6)
    assert metrics.rank_correlation([1, 2, 3], [30, 20, 10]) == pytest.approx(-1)
    assert metrics.rank_correlation([4, 4, 4], [1, 2, 3]) is None


def test_jpeg_bytes_follow_content():
    flat, busy = Image.new("RGB", (64, 64), "teal"), Image.fromarray(skimage.data.astronaut()[:64, 200:264])
    buffer = io.BytesIO()
    busy.save(buffer, "JPEG", quality=75)
    assert metrics.jpeg_bytes(busy) == len(buffer.getvalue()) > metrics.jpeg_bytes(flat)


def test_pooled_vectors_by_hand():
    vectors = torch.tensor([[1.0, 0.0], [3.0, 4.0], [5.0, -1.0]])
    assert probe.pooled_vectors(vectors, [2, 1]).tolist() == [[2, 2, 1, 2], [5, -1, 0, 0]]


def test_thumbnail_vector_is_the_mean_of_blocks():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:2, :1] = 200  # half of the first block
    vector = probe.thumbnail_vector(Image.fromarray(image))
    assert vector.shape == (768,) and vector[:4].tolist() == [100, 100, 100, 0]


def labelled(codes, pixels, labels):
    vectors = LabeledVectors()
    vectors.labels, vectors.codes, vectors.pixels = list(labels), list(codes), list(pixels)
    return vectors


def test_probe_tells_clusters_from_noise():
    generator = torch.Generator().manual_seed(0)
    labels = ["a", "b"] * 40
    noise = torch.randn(80, 6, generator=generator)
    clusters = 0.3 * torch.randn(80, 6, generator=generator) + torch.tensor([[5.0] * 6, [-5.0] * 6]).repeat(40, 1)
    train, test = (labelled(clusters[part], noise[part], labels[part]) for part in (slice(40), slice(40, 80)))
    for result in (probe.probe(test, train), probe.probe(test)):
        assert result.codes == 1 and 0.2 < result.pixels < 0.8
        assert result.low > 0.2 and result.low < result.difference < result.high
        assert (result.images, result.classes, result.neighbors) == (40, 2, 10)
    assert probe.probe(test, train).train_images == 40 and probe.probe(test).train_images == 0


def test_nobody_is_his_own_neighbour():
    # labels without any relation to the vectors: a point that votes for itself, at distance 0, would always be right
    vectors = torch.randn(60, 5, generator=torch.Generator().manual_seed(1))
    assert probe.neighbors_agree(vectors, ["a", "b", "c"] * 20).mean() < 0.6


def test_labels_that_the_training_part_lacks_are_left_out():
    vectors = torch.randn(30, 4, generator=torch.Generator().manual_seed(2))
    train = labelled(vectors[:20], vectors[:20], ["a", "b"] * 10)
    assert probe.probe(labelled(vectors[20:], vectors[20:], ["a", "new"] * 5), train).images == 5
    assert probe.probe(labelled(vectors[20:], vectors[20:], ["new"] * 10), train) is None


@pytest.mark.parametrize("labels", [[], ["a"] * 30, ["a", "b"] * 5], ids=["no labels", "one class", "too few"])
def test_no_probe_without_enough_labels(labels):
    vectors = torch.randn(len(labels), 4)
    assert probe.probe(labelled(vectors, vectors, labels)) is None


def test_difference_interval_by_another_way():
    right = np.array([True] * 70 + [False] * 30)
    rival = np.array([True] * 50 + [False] * 40 + [True] * 10)  # better 20 times, worse 10 times
    low, high = probe.difference_interval(right, rival)
    spread = 1.96 * math.sqrt((0.3 - 0.1**2) / 100)  # normal approximation
    assert (low, high) == (pytest.approx(0.1 - spread, abs=0.015), pytest.approx(0.1 + spread, abs=0.015))
    assert probe.difference_interval(right, right) == (0, 0)
