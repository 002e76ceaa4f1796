"""The quality of the bundled tokenizer. The limits are half a decibel below what was measured."""

import os
from pathlib import Path

import pytest
from PIL import Image

import dyntok
from dyntok.loading import BUNDLED
from dyntok.training.evaluate import evaluate
from dyntok.training.sources import find_samples

FLOORS = {32: 16.3, 64: 18.6, 128: 20.7, 256: 22.0}  # dB by budget
FLOORS_WITHOUT_POSITIONS = {32: 13.6, 64: 14.2, 128: 14.3, 256: 18.1}
pytestmark = pytest.mark.skipif(
    not (BUNDLED / "model.safetensors").exists(), reason="the bundled tokenizer is not trained yet"
)


@pytest.fixture(scope="module")
def bundled():
    return dyntok.load()


@pytest.fixture(scope="module")
def samples(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for i, photo in enumerate(photos):
        Image.fromarray(photo).save(folder / f"{i}.png")
    return find_samples([folder])


def test_pictures_survive_and_better_with_more_tokens(bundled, samples):
    placed, bare = (
        {n: evaluate(bundled, samples, policy={"budget": n}, positions=positions).psnr for n in FLOORS}
        for positions in (True, False)
    )
    assert [n for n, floor in FLOORS.items() if placed[n] < floor] == []
    assert [n for n, floor in FLOORS_WITHOUT_POSITIONS.items() if bare[n] < floor] == []
    assert list(placed.values()) == sorted(placed.values())
    assert [n for n in FLOORS if placed[n] <= bare[n]] == []


@pytest.mark.skipif("DYNTOK_DATA" not in os.environ, reason="DYNTOK_DATA is not set: needs its photographs")
def test_the_learned_choice_is_worth_it(bundled):
    """On photographs that it was not trained on."""
    data = Path(os.environ["DYNTOK_DATA"])
    unseen = find_samples([data / "photos", data / "captioned"], "validation")
    learned, even, random = (
        evaluate(bundled, unseen, selection=choice, limit=100) for choice in ("learned", "even", "random")
    )
    assert learned.images == 100 and learned.psnr > 19.6
    assert learned.tokens.mean <= 96 and learned.tokens.std >= 12
    assert learned.psnr > max(even.psnr, random.psnr) + 0.5
