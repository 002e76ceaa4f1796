"""The quality of the bundled tokenizer. The limits are half a decibel below what was measured."""

import os
from pathlib import Path

import pytest
from PIL import Image

import dyntok
from dyntok.loading import BUNDLED
from dyntok.training.evaluate import evaluate
from dyntok.training.sources import find_samples

FLOORS = {32: 16.9, 64: 19.7, 128: 21.9, 256: 22.7}  # dB by budget
FLOORS_OF_LATTICES = {32: 17.3, 64: 19.3, 128: 21.4, 256: 22.7}  # from the codes alone
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
    placed = {n: evaluate(bundled, samples, policy={"budget": n}, fit="crop").psnr for n in FLOORS}
    alone = {
        n: evaluate(bundled, samples, policy={"budget": n, "places": "lattice"}, positions=False, fit="crop").psnr
        for n in FLOORS_OF_LATTICES
    }
    assert [n for n, floor in FLOORS.items() if placed[n] < floor] == []
    assert [n for n, floor in FLOORS_OF_LATTICES.items() if alone[n] < floor] == []
    for values in (placed, alone):
        assert list(values.values()) == sorted(values.values())


@pytest.mark.skipif("DYNTOK_DATA" not in os.environ, reason="DYNTOK_DATA is not set: needs its photographs")
def test_the_learned_choice_is_worth_it(bundled):
    """On photographs that it was not trained on."""
    data = Path(os.environ["DYNTOK_DATA"])
    unseen = find_samples([data / "photos", data / "captioned"], "validation")
    learned, even, random = (
        evaluate(bundled, unseen, selection=choice, limit=100) for choice in ("learned", "even", "random")
    )
    assert learned.images == 100 and learned.psnr > 20.2
    assert learned.tokens.mean <= 98 and learned.tokens.std >= 12
    assert learned.psnr > max(even.psnr, random.psnr) + 0.2
