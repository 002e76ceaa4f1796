"""Pictures that threads decode ahead, and 8-bit values that are normalized on the device."""

import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import dyntok
from dyntok import chunks
from dyntok.ahead import in_order
from dyntok.config import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ImageConfig
from dyntok.image import normalize, to_array, to_pixels


@pytest.fixture
def files(photos):
    """PNG files in memory."""
    streams = []
    for photo in photos:
        streams.append(io.BytesIO())
        Image.fromarray(photo).save(streams[-1], "PNG", compress_level=1)
    return [stream.getvalue() for stream in streams]


@pytest.mark.parametrize("config", [ImageConfig(64), ImageConfig(64, mean=OPENAI_CLIP_MEAN, std=OPENAI_CLIP_STD)])
def test_normalizing_on_the_device_gives_the_same_bits(config, photos):
    colors = np.arange(3 * 2**16, dtype=np.uint8).reshape(256, 256, 3)
    for source in (photos[0], colors):
        array = to_array(source, config)[0]
        got = normalize(torch.from_numpy(array)[None].permute(0, 3, 1, 2), config)[0]
        assert got.is_contiguous() and torch.equal(got, to_pixels(source, config))


def test_8_bit_pixels_have_the_codes_of_the_picture(tokenizer, photos):
    pixels = torch.stack([torch.from_numpy(to_array(photo, tokenizer.config.image)[0]) for photo in photos])
    encoding = tokenizer.encode(photos)
    assert tokenizer.encode_tensor(pixels.permute(0, 3, 1, 2)) == encoding
    normalized = torch.stack([to_pixels(photo, tokenizer.config.image) for photo in photos])
    assert tokenizer.encode_tensor(normalized) == encoding
    with pytest.raises(dyntok.ImageError, match="pixels are torch.int32"):
        tokenizer.encode_tensor(pixels.permute(0, 3, 1, 2).int())


def test_threads_change_nothing(tokenizer, files, photos):
    def sources():
        return [*files, photos[0], b"broken", io.BytesIO(files[1]), *files]

    alone, ahead = (tokenizer.encode(sources(), errors="skip", workers=n) for n in (0, 3))
    assert alone == ahead and alone.source_index.tolist() == ahead.source_index.tolist()
    assert (
        alone.originals == ahead.originals and str(alone.failures) == str(ahead.failures) and len(alone.failures) == 1
    )
    with pytest.raises(dyntok.ImageError, match=f"input {len(files) + 1}: "):
        tokenizer.encode(sources(), workers=2)
    assert torch.equal(tokenizer.features(files, workers=2).tokens, tokenizer.features(files).tokens)
    with pytest.raises(dyntok.ConfigError, match="workers is -1, expected an int of 0 or more"):
        tokenizer.encode(files, workers=-1)


def test_files_are_decoded_by_threads_that_end(tokenizer, files, monkeypatch):
    seen = []
    decode = chunks.to_array
    monkeypatch.setattr(
        chunks, "to_array", lambda *args, **options: seen.append(threading.current_thread()) or decode(*args, **options)
    )
    tokenizer.encode(files * 2, workers=2)
    assert threading.main_thread() not in seen and 1 <= len(set(seen)) <= 2
    for thread in set(seen):
        thread.join(10)
    assert not any(thread.is_alive() for thread in seen)


def test_inputs_that_their_owner_may_change_are_read_at_once():
    taken, page = [], np.zeros(1)

    def pages():
        for number in range(8):
            page[:] = number
            taken.append(number)
            yield page

    results = in_order(pages(), lambda index, given: float(given[0]), workers=2, ahead=3)
    first = next(results)
    assert taken == [0, 1, 2, 3]  # no more than that wait
    assert [first(), *(result() for result in results)] == list(range(8))
