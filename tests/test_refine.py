"""`encode(refine=)`: codes that the decoder paints closer to the picture."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import dyntok
from dyntok import ConfigError, DynamicVisualTokenizer, ImageError
from dyntok.batch import BatchOptions, TokenizeColumn, tokenize
from dyntok.chunks import Chunk, limited
from dyntok.cli.main import main
from dyntok.errors import BatchError
from dyntok.image import to_pixels
from dyntok.refine import Pictures, nearest_codes, refine_codes
from dyntok.target import visible_psnr
from dyntok.training.evaluate import evaluate
from dyntok.training.sources import find_samples

SMALL = {"max_patches": 96, "budget": 40}


@pytest.fixture(scope="module")
def flex():
    return dyntok.load()


def quality(tokenizer, picture, encoding, **shape):
    config = tokenizer.image_config(**shape)
    return float(visible_psnr(tokenizer.decode_to_pixels(encoding), to_pixels(picture, config)[None], config))


# The search itself, with a linear decoder of patches of 8 pixels


def linear(cells, grid=(7, 7), images=1):
    """Pictures of random targets, painted by one random matrix for each patch; the pixels of a patch know one token."""
    rows, columns = grid
    matrices = torch.randn(rows * columns, 16, 3 * 64) / 8
    image = torch.arange(images).repeat_interleave(len(cells) // images)
    place = cells[:, 0] * columns + cells[:, 1]

    def paint(vectors):
        patches = torch.zeros(images, rows * columns, 3 * 64).index_put((image, place), patches_of(vectors))
        return F.fold(patches.transpose(1, 2), (rows * 8, columns * 8), kernel_size=8, stride=8)

    def patches_of(vectors):
        return torch.einsum("tc,tcp->tp", vectors, matrices[place])

    nothing = torch.zeros(images, rows * columns, 1)  # no features: what counts is the pixels
    return Pictures(
        torch.rand(images, 3, rows * 8, columns * 8), nothing, paint, lambda painted: nothing, image, cells, grid
    )


def refined(*arguments):
    codes, error = refine_codes(*arguments)
    assert error.isfinite().all()
    return codes


@pytest.fixture
def codebook():
    return F.normalize(torch.randn(64, 16), dim=-1)


def test_features_are_a_part_of_the_error(codebook):
    cells = torch.tensor([[0, 0], [3, 3]])
    pictures, vectors = linear(cells), torch.randn(2, 16)
    wanted = torch.randn(1, 49, 5)
    both = dataclasses.replace(pictures, wanted=wanted, features=lambda painted: wanted + painted.mean())
    plain, mean = pictures.errors(vectors), pictures.paint(vectors).mean()
    torch.testing.assert_close(both.errors(vectors), plain + 0.1 * mean.square() / wanted.var())


def test_independent_tokens_get_the_best_of_the_near_codes(codebook):
    """Painting a patch alone, a code is best where its own error is smallest; 15 rounds try all near ones."""
    cells = torch.tensor([[row, column] for row in (0, 3, 6) for column in (0, 3, 6)])
    pictures, vectors = linear(cells), torch.randn(9, 16)
    near = nearest_codes(vectors, codebook, 16)
    codes = (F.normalize(vectors, dim=-1) @ codebook.T).argmax(1)
    errors = torch.stack([pictures.errors(codebook[near[:, k]])[0, cells[:, 0], cells[:, 1]] for k in range(16)], 1)
    best = near.gather(1, errors.argmin(1, keepdim=True))[:, 0]
    assert not torch.equal(best, codes)
    assert torch.equal(refined(codes, vectors, codebook, pictures, 15), best)


def test_the_first_round_tries_promising_codes(codebook, monkeypatch):
    """One round gains most of what 15 gain. Without the gradient, it tries the codes next to the first ones."""
    cells = torch.tensor([[row, column] for row in (0, 3, 6) for column in (0, 3, 6)] * 8)
    pictures, vectors = linear(cells, images=8), torch.randn(72, 16)
    codes = (F.normalize(vectors, dim=-1) @ codebook.T).argmax(1)

    def gain(rounds):
        found = refined(codes, vectors, codebook, pictures, rounds)
        return float((pictures.errors(codebook[codes]) - pictures.errors(codebook[found])).sum())

    with_gradient, most = gain(1), gain(15)
    monkeypatch.setattr(Pictures, "gradient", lambda self, vectors: torch.zeros_like(vectors))
    assert 0.6 * most < with_gradient < most and gain(1) < 0.7 * with_gradient


def test_the_sensitivity_is_the_mean_of_the_true_one():
    cells = torch.tensor([[0, 0], [2, 3], [6, 6]])
    pictures = linear(cells)
    jacobian = torch.autograd.functional.jacobian(pictures.paint, torch.randn(3, 16)).flatten(0, 3)  # [pixels, 3, 16]
    true = torch.einsum("ptc,ptd->cd", jacobian, jacobian) / 3 / (3 * 64)
    found = pictures.sensitivity(torch.randn(3, 16))[0]
    assert found.shape == (16, 16) and torch.allclose(found, found.T, atol=1e-5)
    # of one draw of signs; the mean over the channels is near, single entries are not
    assert found.diagonal().mean() == pytest.approx(float(true.diagonal().mean()), rel=0.35)


def test_coupled_tokens_are_never_farther_than_before(codebook):
    """Neighbors share pixels here, so that changes that are good one by one may be bad together."""
    cells = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    pictures, vectors = linear(cells), torch.randn(49, 16)
    blur = dataclasses.replace(pictures, paint=lambda v: F.avg_pool2d(pictures.paint(v), 31, 1, 15) * 40)
    codes = (F.normalize(vectors, dim=-1) @ codebook.T).argmax(1)
    before = blur.errors(codebook[codes]).sum()
    last = before
    for rounds in (1, 2, 4):
        found, told = refine_codes(codes, vectors, codebook, blur, rounds)
        error = blur.errors(codebook[found]).sum()
        assert told.tolist() == pytest.approx([float(error)])
        assert error <= last
        last = error
    assert last < before


def test_a_codebook_with_few_codes(codebook):
    pictures, vectors = linear(torch.tensor([[0, 0]])), torch.randn(1, 16)
    for size in (1, 2, 5):
        codes = (F.normalize(vectors, dim=-1) @ codebook[:size].T).argmax(1)
        errors = [float(pictures.errors(codebook[[k]]).sum()) for k in range(size)]
        assert refined(codes, vectors, codebook[:size], pictures, 15).tolist() == [int(np.argmin(errors))]


# Through `encode`


@pytest.mark.parametrize("places", ["map", "lattice", "free"])
def test_pictures_are_closer_with_as_many_codes_at_the_same_places(flex, photos, places):
    gains = []
    for picture in photos[:3]:
        plain, refined = (flex.encode(picture, refine=rounds, places=places, **SMALL) for rounds in (0, 1))
        assert torch.equal(plain.packed_positions, refined.packed_positions)
        before, after = (quality(flex, picture, e, max_patches=96) for e in (plain, refined))
        assert after > before
        gains.append(after - before)
    assert np.mean(gains) > 0.25  # dB


def test_more_rounds_are_closer(flex, photos):
    reached = [quality(flex, photos[0], flex.encode(photos[0], refine=n, **SMALL), max_patches=96) for n in (1, 2, 4)]
    assert reached == sorted(reached) and reached[2] > reached[0] + 0.05


def test_the_codes_of_a_picture_depend_on_that_picture_alone(flex, photos):
    together = flex.encode(photos[:4], refine=1, **SMALL)
    for i, picture in enumerate(photos[:4]):
        assert torch.equal(together.codes[i], flex.encode(picture, refine=1, **SMALL).codes[0])


def test_the_program_keeps_its_random_state_and_gradients(flex, photos):
    before = torch.get_rng_state()
    encoding = flex.encode(photos[0], refine=1, **SMALL)
    assert torch.equal(before, torch.get_rng_state()) and not encoding.packed_codes.is_inference()
    assert all(parameter.grad is None for parameter in flex.parameters())


def test_with_a_given_quality(flex, photos):
    plain, refined = (flex.encode(photos[0], psnr=16.0, max_patches=96, refine=rounds) for rounds in (0, 1))
    assert torch.equal(plain.packed_positions, refined.packed_positions)
    assert quality(flex, photos[0], refined, max_patches=96) > quality(flex, photos[0], plain, max_patches=96) >= 16.0


def test_no_rounds_are_the_nearest_codes(flex, photos):
    assert torch.equal(flex.encode(photos[0], refine=0).packed_codes, flex.encode(photos[0]).packed_codes)


@pytest.mark.parametrize("wrong", [-1, 16, 1.0, True, "1", None])
def test_other_numbers_of_rounds_are_refused(flex, photos, wrong):
    with pytest.raises(ConfigError, match=r"refine is .*, expected a number of rounds from 0 to 15"):
        flex.encode(photos[0], refine=wrong)
    with pytest.raises(ConfigError, match="refine is"):
        BatchOptions(refine=wrong)


def test_what_can_not_be_refined(flex, small_config, photos):
    with pytest.raises(ConfigError, match="refine and margins were both given"):
        flex.encode(photos[0], refine=1, margins=True)
    with pytest.raises(ConfigError, match="refine and margins were both given"):
        BatchOptions(refine=1, margins=True)
    blind = dataclasses.replace(small_config, decoder=dataclasses.replace(small_config.decoder, pixels=False))
    with pytest.raises(ConfigError, match="refine is 1, but this tokenizer has no pixel head"):
        DynamicVisualTokenizer(blind).encode(photos[0], refine=1)


@pytest.mark.parametrize("part", ["projection", "pixel_head"])
def test_numbers_that_are_not_finite_are_an_error_of_the_image(part, tokenizer, photos):
    with torch.no_grad():
        next(getattr(tokenizer, part).parameters()).fill_(torch.nan)
    with pytest.raises(ImageError, match="NaN or infinite"):
        tokenizer.encode(photos[0], refine=1)


def test_a_picture_that_is_not_finite_does_not_change_the_others(codebook):
    cells = torch.tensor([[row, column] for row in (0, 3, 6) for column in (0, 3, 6)] * 2)
    pictures, vectors = linear(cells, images=2), torch.randn(18, 16)
    codes = (F.normalize(vectors, dim=-1) @ codebook.T).argmax(1)
    wanted = refined(codes, vectors, codebook, pictures, 2)
    broken = torch.ones(2, 1, 1, 1).index_fill_(0, torch.tensor(1), torch.nan)
    found, error = refine_codes(
        codes, vectors, codebook, dataclasses.replace(pictures, paint=lambda v: pictures.paint(v) * broken), 2
    )
    assert torch.equal(found[:9], wanted[:9]) and error.isfinite().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype, tokenizer, photos):
    other = tokenizer.to(dtype) if dtype == torch.float64 else tokenizer.in_precision(dtype)
    plain, refined = (other.encode(photos[0], refine=rounds) for rounds in (0, 2))
    assert plain.num_tokens == refined.num_tokens
    assert quality(other, photos[0], refined) > quality(other, photos[0], plain)


def test_a_decoder_that_knows_ranks_alone(small_config, photos):
    decoder = dataclasses.replace(small_config.decoder, placement="rank", conv=False)
    tokenizer = DynamicVisualTokenizer(dataclasses.replace(small_config, decoder=decoder)).eval()
    plain, refined = (tokenizer.encode(photos[0], budget=20, refine=rounds) for rounds in (0, 2))
    plain, refined = (dataclasses.replace(each, packed_positions=None) for each in (plain, refined))
    assert quality(tokenizer, photos[0], refined) > quality(tokenizer, photos[0], plain)


def test_a_mask_of_ones_own(tokenizer, photos):
    pixels = to_pixels(photos[0], tokenizer.config.image)[None]
    mask = torch.zeros(1, 64, dtype=torch.bool).index_fill_(1, torch.arange(0, 64, 3), True)
    plain, refined = (tokenizer.encode_tensor(pixels, keep_mask=mask, refine=rounds) for rounds in (0, 2))
    assert torch.equal(plain.packed_positions, refined.packed_positions)
    assert quality(tokenizer, photos[0], refined) > quality(tokenizer, photos[0], plain)


def test_memory_is_limited_by_patches():
    chunk = Chunk(range(5, 9), torch.zeros(4, 3, 16, 8))
    assert [(list(part.input_indices), len(part.pixels)) for part in limited(chunk, 300)] == [([5, 6], 2), ([7, 8], 2)]
    assert [list(part.input_indices) for part in limited(chunk, 100)] == [[5], [6], [7], [8]]


def test_weights_that_can_not_be_differentiated_are_named(small_config, photos):
    with torch.inference_mode():
        tokenizer = DynamicVisualTokenizer(small_config).eval()
    with pytest.raises(ConfigError, match=r"refine needs derivatives, and these weights were made in torch\.inference"):
        tokenizer.encode(photos[0], refine=1)


# The other doors


@pytest.fixture
def folder(tmp_path, photos):
    source = tmp_path / "photos"
    source.mkdir()
    for number, photo in enumerate(photos[:3]):
        Image.fromarray(photo).save(source / f"{number}.png")
    return source


def test_the_command_encode(flex, folder, tmp_path, photos):
    out = tmp_path / "codes.json"
    shape = ["--max-patches", "96", "--budget", "40"]
    assert main(["encode", str(folder / "0.png"), "-o", str(out), "--refine", "1", *shape]) == 0
    assert json.loads(out.read_text())["codes"] == [flex.encode(photos[0], refine=1, **SMALL).codes[0].tolist()]


def test_batch_writes_refined_codes_and_does_not_mix_them(flex, folder, tmp_path, photos):
    options = BatchOptions(refine=1, **SMALL)
    tokenize([folder], tmp_path / "out", options=options)
    wanted = {f"{i}": flex.encode(photo, refine=1, **SMALL).codes[0].tolist() for i, photo in enumerate(photos[:3])}
    found = next(iter(dyntok.batch.read(tmp_path / "out")))
    codes = [row.tolist() for row in found.encoding.codes]
    assert {Path(key).stem: row for key, row in zip(found.keys, codes, strict=True)} == wanted
    with pytest.raises(BatchError, match="refine"):
        tokenize([folder], tmp_path / "out", options=dataclasses.replace(options, refine=2))


def test_a_column_of_a_table(flex, photos):
    found = TokenizeColumn(refine=1, **SMALL)({"image": [Image.fromarray(photo) for photo in photos[:2]]})
    for codes, photo in zip(found["codes"], photos, strict=False):
        assert codes.tolist() == flex.encode(photo, refine=1, **SMALL).codes[0].tolist()


def test_the_evaluation(flex, folder):
    samples = find_samples([folder])
    plain, refined = (evaluate(flex, samples, policy={"budget": 40}, max_patches=96, refine=n) for n in (0, 1))
    assert refined.psnr > plain.psnr + 0.2 and refined.tokens == plain.tokens
    even = [evaluate(flex, samples, policy={"budget": 40}, max_patches=96, selection="even", refine=n) for n in (0, 1)]
    assert even[1].psnr > even[0].psnr + 0.2
