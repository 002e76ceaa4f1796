"""`encode(refine=)`: codes that the decoder paints closer to the picture."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import dyntok
from dyntok import ConfigError, DynamicVisualTokenizer, ImageError
from dyntok.batch import BatchOptions, TokenizeColumn, tokenize
from dyntok.batch.shapes import check_shapes
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
    """Pictures of random targets, painted by one random matrix for each patch; a patch depends on one token."""
    rows, columns = grid
    matrices = torch.randn(rows * columns, 16, 3 * 64) / 8
    image = torch.arange(images).repeat_interleave(len(cells) // images)
    place = cells[:, 0] * columns + cells[:, 1]

    def paint(vectors):
        patches = torch.zeros(images, rows * columns, 3 * 64).index_put((image, place), patches_of(vectors))
        return F.fold(patches.transpose(1, 2), (rows * 8, columns * 8), kernel_size=8, stride=8)

    def patches_of(vectors):
        return torch.einsum("tc,tcp->tp", vectors, matrices[place])

    nothing = torch.zeros(images, rows * columns, 1)  # no features: pixels alone count
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


def test_features_are_a_part_of_the_error():
    """They count per patch, relative to the variance of the picture's own features."""
    cells = torch.tensor([[0, 0], [0, 0]])
    pictures, vectors = linear(cells, images=2), torch.randn(2, 16)
    wanted = torch.randn(2, 49, 5) * torch.tensor([1.0, 3.0])[:, None, None]
    wrong = torch.zeros(2, 49, 5)
    wrong[0, 8], wrong[1, 9] = 0.5, 2.0  # rows 1, columns 1 and 2
    both = dataclasses.replace(pictures, original_features=wanted, features=lambda painted: wanted + wrong)
    pixels, features = both.errors(vectors)
    expected = torch.zeros(2, 7, 7)
    expected[0, 1, 1], expected[1, 1, 2] = 0.1 * 0.25 / wanted[0].var(), 0.1 * 4 / wanted[1].var()
    assert torch.equal(pixels, pictures.errors(vectors)[0])
    torch.testing.assert_close(features, expected)


def test_independent_tokens_get_the_best_of_the_near_codes(codebook):
    """Painting a patch alone, a code is best where its own error is smallest; 15 rounds try all near ones."""
    cells = torch.tensor([[row, column] for row in (0, 3, 6) for column in (0, 3, 6)])
    pictures, vectors = linear(cells), torch.randn(9, 16)
    near = nearest_codes(vectors, codebook, 16)
    codes = (F.normalize(vectors, dim=-1) @ codebook.T).argmax(1)
    errors = [pictures.errors(codebook[near[:, k]]).sum(0)[0, cells[:, 0], cells[:, 1]] for k in range(16)]
    errors = torch.stack(errors, 1)
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


def test_coupled_tokens_get_closer(codebook):
    """Neighbors share pixels here."""
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


def test_a_round_that_makes_things_worse_is_taken_back(codebook):
    """Here every change helps its own patch, and adds as much to a far one and more, which no trial looks at."""
    cells = torch.tensor([[0, 0]])
    pictures, vectors = linear(cells), torch.randn(1, 16)
    codes = (F.normalize(vectors, dim=-1) @ codebook.T).argmax(1)
    first = pictures.paint(codebook[codes])

    def paint(v):
        painted = pictures.paint(v)
        moved = (painted - first).abs().sum()
        far = torch.zeros_like(painted).index_fill_(3, torch.tensor([55]), 1.0)
        return painted + far * moved

    harmful = dataclasses.replace(pictures, paint=paint)
    assert not torch.equal(refined(codes, vectors, codebook, pictures, 1), codes)
    found, error = refine_codes(codes, vectors, codebook, harmful, 3)
    assert torch.equal(found, codes)
    torch.testing.assert_close(error, pictures.errors(codebook[codes]).sum((0, 2, 3)))


def test_features_are_not_bought_with_pixels(codebook):
    """The features ask for another code here, and are worth more than the pixels that get worse."""
    cells = torch.tensor([[3, 3]])
    pictures, vectors = linear(cells), F.normalize(torch.randn(1, 16), dim=-1)
    near = nearest_codes(vectors, codebook, 16)
    codes = (vectors @ codebook.T).argmax(1)
    best = pictures.paint(codebook[codes]).detach()
    exact = dataclasses.replace(pictures, originals=best)  # no other code can be as close in pixels
    wanted = pictures.paint(codebook[near[near != codes][:1]]).detach()

    def features(painted):
        return F.avg_pool2d(painted, 8).flatten(2).transpose(1, 2) * 1e3

    tempted = dataclasses.replace(exact, original_features=features(wanted), features=features)
    assert torch.equal(refined(codes, vectors, codebook, tempted, 15), codes)
    both = dataclasses.replace(tempted, originals=wanted)
    assert not torch.equal(refined(codes, vectors, codebook, both, 15), codes)
    torn = dataclasses.replace(tempted, originals=wanted, original_features=features(best))  # and the other way round
    assert torch.equal(refined(codes, vectors, codebook, torn, 15), codes)


def test_the_near_codes_are_the_nearest_ones():
    codebook = torch.randn(60, 4) * torch.rand(60, 1)  # of any norm
    vectors = 3 * torch.randn(8, 4)
    distance = torch.cdist(F.normalize(vectors, dim=-1), codebook)
    found = nearest_codes(vectors, codebook, 5)
    assert torch.equal(found.sort(1).values, distance.topk(5, largest=False).indices.sort(1).values)


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


def test_the_features_of_pictures_get_closer_than_by_pixels_alone(flex, photos, monkeypatch):
    def error(encodings):
        """The mean error of the features, relative to their variance."""
        found = []
        for picture, encoding in zip(photos, encodings, strict=False):
            config = flex.image_config(max_patches=96)
            pixels = to_pixels(picture, config)[None]
            with torch.no_grad():
                wanted = flex.backbone(pixels)
                painted = flex.backbone(flex.decode_to_pixels(encoding))
            found.append(float((painted - wanted).square().mean() / wanted.var()))
        return np.mean(found)

    shipped = error(flex.encode(photos[:4], refine=1, **SMALL))
    monkeypatch.setattr("dyntok.refine._FEATURES", 0.0)
    assert shipped < 0.97 * error(flex.encode(photos[:4], refine=1, **SMALL))


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


@pytest.mark.skipif("DYNTOK_DATA" not in os.environ, reason="needs photographs (DYNTOK_DATA)")
def test_no_picture_loses_quality(flex):
    """In this one a round gained features at the expense of pixels, and fell below the quality asked for."""
    archive = Path(os.environ["DYNTOK_DATA"]) / "photos"
    (sample,) = [s for s in find_samples([archive], "all") if s.key == "imagenette-006054"]
    photo = sample.read()
    plain, refined = (flex.encode(photo, psnr=18.0, max_patches=64, refine=rounds) for rounds in (0, 1))
    assert quality(flex, photo, refined, max_patches=64) >= quality(flex, photo, plain, max_patches=64) >= 18.0


def test_no_rounds_are_the_nearest_codes(flex, photos):
    assert torch.equal(flex.encode(photos[0], refine=0).packed_codes, flex.encode(photos[0]).packed_codes)


@pytest.mark.parametrize("wrong", [-1, 16, 1.0, True, "1", None])
def test_other_numbers_of_rounds_are_refused(flex, photos, wrong):
    with pytest.raises(ConfigError, match=r"refine is .*, expected an int from 0 to 15: the number of rounds"):
        flex.encode(photos[0], refine=wrong)
    with pytest.raises(ConfigError, match="refine is"):
        BatchOptions(refine=wrong)


def test_an_int_of_numpy(flex, photos):
    found, wanted = (flex.encode(photos[0], refine=rounds, **SMALL) for rounds in (np.int64(1), 1))
    assert torch.equal(found.packed_codes, wanted.packed_codes)
    assert type(BatchOptions(refine=np.int64(2)).refine) is int  # a run writes it as JSON


def test_what_can_not_be_refined(flex, small_config, photos):
    with pytest.raises(ConfigError, match="refine and margins were both given"):
        flex.encode(photos[0], refine=1, margins=True)
    with pytest.raises(ConfigError, match="refine and margins were both given"):
        BatchOptions(refine=1, margins=True)
    blind = dataclasses.replace(small_config, decoder=dataclasses.replace(small_config.decoder, pixels=False))
    with pytest.raises(ConfigError, match="refine is 1, but this tokenizer has no pixel head"):
        DynamicVisualTokenizer(blind).encode(photos[0], refine=1)
    with pytest.raises(ConfigError, match="refine is 1, but this tokenizer has no pixel head"):
        check_shapes(DynamicVisualTokenizer(blind), BatchOptions(refine=1))


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


def test_pictures_are_refined_a_few_at_a_time(flex, photos, monkeypatch):
    at_once, errors = [], Pictures.errors
    monkeypatch.setattr(type(flex), "_at_once", lambda self, images: images)  # as on a GPU
    monkeypatch.setattr("dyntok.tokenizer._DECODED_PATCHES", 200)
    monkeypatch.setattr(Pictures, "errors", lambda self, v: at_once.append(len(self.originals)) or errors(self, v))
    flex.encode(photos[:3], refine=1, fit="crop", **SMALL)
    assert set(at_once) == {1, 2}


def test_memory_is_limited_by_patches():
    chunk = Chunk(range(5, 9), torch.zeros(4, 3, 16, 8))
    assert [(list(part.input_indices), len(part.pixels)) for part in limited(chunk, 300)] == [([5, 6], 2), ([7, 8], 2)]
    assert [list(part.input_indices) for part in limited(chunk, 100)] == [[5], [6], [7], [8]]


@pytest.mark.parametrize("part", ["backbone", "decoder", "pixel_head"])
def test_weights_that_can_not_be_differentiated_are_named(part, tokenizer, photos):
    module = getattr(tokenizer, part)
    with torch.inference_mode():
        weights = {name: value.clone() for name, value in module.state_dict().items()}
        module.load_state_dict(weights, assign=True)
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


def test_the_commands_demo_show_and_eval(flex, folder, tmp_path, capsys):
    shape = ["--max-patches", "96", "--budget", "40"]
    out = str(tmp_path / "demo.png")
    assert main(["demo", "-o", out, "--json", "--refine", "1", *shape]) == 0
    wanted = flex.encode(dyntok.example_image(), refine=1, **SMALL)
    assert json.loads(capsys.readouterr().out)["codes"] == [wanted.codes[0].tolist()]
    sheets, reports = [], []
    for rounds in ("0", "1"):
        assert main(["show", str(folder / "0.png"), "-o", out, "--refine", rounds, *shape]) == 0
        sheets.append(Path(out).read_bytes())
        capsys.readouterr()
        assert main(["eval", str(folder), "--json", "--refine", rounds, *shape]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert sheets[0] != sheets[1]
    assert [report["refine"] for report in reports] == [0, 1] and reports[1]["psnr"] > reports[0]["psnr"] + 0.1
    assert main(["eval", str(folder), "--refine", "1", *shape]) == 0
    assert "refined 1x" in capsys.readouterr().out


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
    drawn = [evaluate(flex, samples, policy={"sample": 3}, max_patches=96, refine=n) for n in (0, 1)]
    assert drawn[1].psnr > drawn[0].psnr + 0.1 and drawn[1].tokens == drawn[0].tokens
