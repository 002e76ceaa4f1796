"""NaN and infinite numbers never become codes: an error for each image, which names the dtypes to use."""

import dataclasses

import numpy as np
import pytest
import torch

import dyntok
from dyntok import ImageError
from dyntok.chunks import Chunk, Rows, join_images, without_failures
from dyntok.encoding import unchecked
from dyntok.image import to_pixels


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """The bundled tokenizer with a larger MLP in its backbone: its numbers fit float32, but not float16."""
    tokenizer = dyntok.load()
    with torch.no_grad():
        for block in tokenizer.backbone.model.blocks:
            block.mlp.fc2.weight.mul_(30_000)
    folder = tmp_path_factory.mktemp("overflowing")
    tokenizer.save_pretrained(folder)
    return folder


def stack(tokenizer, photos):
    return torch.stack([to_pixels(photo, tokenizer.image_config(fit="crop")) for photo in photos])


def test_an_overflow_in_half_precision_is_an_error_that_names_the_dtypes(overflowing, photos):
    tokenizer = dyntok.load(overflowing, dtype="fp16")
    message = r"^input 0: the network computed NaN or infinite values in float16, .*bf16 or fp32.*torch\.bfloat16"
    for encode in (tokenizer.encode, tokenizer.features, lambda images: tokenizer(images)):
        with pytest.raises(ImageError, match=message):
            encode(photos[:2])
    for encode in (tokenizer.encode_tensor, tokenizer.features_tensor):
        with pytest.raises(ImageError, match=message):
            encode(stack(tokenizer, photos[:2]))
    for dtype in ("bf16", "fp32"):
        assert len(dyntok.load(overflowing, dtype=dtype).encode(photos[:2])) == 2


def test_skipped_images_are_failures(overflowing, photos):
    tokenizer = dyntok.load(overflowing, dtype="fp16")
    pixels = stack(tokenizer, photos[:2])
    for encoding in (
        tokenizer.encode([photos[0], b"no image", photos[1]], errors="skip"),
        tokenizer.encode_tensor(pixels, errors="skip"),
    ):
        assert len(encoding) == 0 and [index for index, _ in encoding.failures] == list(range(len(encoding.failures)))
        assert len(encoding.failures) >= 2 and "NaN or infinite" in str(encoding.failures[0][1])


@pytest.mark.parametrize("part", ["backbone.model.norm", "selector.head", "merger.blocks.0.mlp.2", "projection"])
def test_every_stage_is_watched(tokenizer, photos, part):
    """Weights may break after loading, as in training; the error then advises to look at them."""
    module = (
        tokenizer.backbone.model.blocks[0].mlp.fc2 if part.startswith("backbone") else tokenizer.get_submodule(part)
    )
    with torch.no_grad():
        module.weight.view(-1)[0] = torch.nan
    with pytest.raises(ImageError, match="values in float32, expected finite ones; check the weights and the pixels"):
        tokenizer.encode(photos[0])


def test_a_codebook_that_is_not_finite_gives_no_codes(tokenizer, photos):
    tokenizer.codebook.embedding[3, 0] = torch.nan
    with pytest.raises(ImageError, match="^input 0: the network computed NaN or infinite values"):
        tokenizer.encode(photos[0])


@pytest.mark.parametrize(
    "decode, part, factor",
    [("decode", "decoder", 60), ("decode_to_pixels", "pixel_head", 1e5), ("decode_to_features", "decoder", 60)],
)
def test_decoded_numbers_that_are_not_finite_are_errors(decode, part, factor, photos):
    tokenizer = dyntok.load("tiny", dtype="fp16")
    encoding = tokenizer.encode(photos[0])
    with torch.no_grad():
        for weight in getattr(tokenizer, part).parameters():
            weight.mul_(factor)
    with pytest.raises(ImageError, match="NaN or infinite values in float16, .*bf16 or fp32"):
        getattr(tokenizer, decode)(encoding)


def test_only_the_images_concerned_are_left_out(tokenizer, photos):
    """The selector gives NaN for one image; its neighbors keep their codes."""
    expected = tokenizer.encode(photos)
    calls = []

    def spoil(module, inputs, log_probs):
        calls.append(None)
        return log_probs * torch.nan if len(calls) == 3 else log_probs

    hook = tokenizer.selector.register_forward_hook(spoil)
    encoding = tokenizer.encode(photos, errors="skip")
    hook.remove()
    rest = [i for i in range(len(photos)) if i != 2]
    assert encoding.source_index.tolist() == rest and [index for index, _ in encoding.failures] == [2]
    assert encoding == dataclasses.replace(expected[rest])


def test_images_of_one_chunk_are_told_apart():
    finite = torch.tensor([True, False, True])
    rows, failures = Rows([4, 5, 7], torch.arange(6), torch.tensor([0, 2, 1, 0, 1, 2]), [2, 1, 3], finite, (1, 3)), []
    (left,) = without_failures([rows], torch.float16, failures)
    assert left.values.tolist() == [0, 1, 3, 4, 5] and left.input_indices == [4, 7]
    assert left.positions.tolist() == [0, 2, 0, 1, 2] and left.lengths == [2, 3]
    assert [index for index, _ in failures] == [5]


def test_codes_that_a_gpu_could_not_compute_are_told_when_they_are_read(tokenizer):
    """A CPU tells it at once, so the encoding is put together here as `encode` does it for a GPU."""
    tokenizer.selector.register_forward_hook(lambda module, inputs, log_probs: log_probs * spoiled)
    spoiled = torch.tensor([1.0, torch.nan, 1.0]).view(3, 1, 1)
    chunk = Chunk(range(3), torch.randn(3, 3, 64, 64))
    rows = tokenizer._run(chunk, dyntok.KeepPolicy(budget=5), tokenizer.merger, quantize=True)
    index, codes, positions, cu_seqlens, grids = join_images([rows], rows.values[:0])
    assert (codes[5:10] == -1).all() and (codes[:5] >= 0).all() and (codes[10:] >= 0).all()
    encoding = unchecked(
        packed_codes=codes, packed_positions=positions, cu_seqlens=cu_seqlens, grids=grids, margins=None,
        fingerprint=tokenizer.fingerprint, failures=(), source_index=torch.tensor(index), originals=None,
    )  # fmt: skip
    for read in (
        lambda enc: enc.codes, lambda enc: enc.positions, lambda enc: enc.padded(), lambda enc: enc.to_dict(),
        lambda enc: enc.keep_mask(), lambda enc: enc[1].codes, lambda enc: dyntok.Encoding.cat([enc]), tokenizer.decode,
    ):  # fmt: skip
        with pytest.raises(ImageError, match="^input 1: the network computed NaN or infinite values.*in fp32"):
            read(encoding)
    assert len(encoding[[0, 2]].codes) == 2


def test_pixels_and_arrays_that_are_not_finite_are_refused(tokenizer):
    with pytest.raises(ImageError, match="NaN or infinite"):
        tokenizer.encode_tensor(torch.full((1, 3, 64, 64), torch.nan))
    with pytest.raises(ImageError):
        tokenizer.encode(np.full((64, 64, 3), np.nan, np.float32))
