"""JPEG files that are decoded at a fraction of their size: which one, how the pictures look, and who switches it on."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image
from skimage import data

import dyntok
from dyntok.checkpoint.fingerprint import encoding_sections
from dyntok.cli.main import main
from dyntok.config import PRESETS, ImageConfig, TokenizerConfig
from dyntok.image import load_image, to_array
from dyntok.imaging import decode as decoding

FULL = ImageConfig(img_size=64)
SCALED = dataclasses.replace(FULL, decoding="scaled")


def jpeg(width, height, orientation=1, **options):
    exif = Image.Exif()
    exif[274] = orientation
    stream = io.BytesIO()
    Image.fromarray(data.coffee()).resize((width, height), Image.Resampling.BILINEAR).save(
        stream, "JPEG", quality=92, exif=exif.tobytes(), **options
    )
    return stream.getvalue()


@pytest.fixture
def reductions(monkeypatch):
    """The divisors of the files that are decoded."""
    seen, original = [], decoding._reduce
    monkeypatch.setattr(decoding, "_reduce", lambda *args: seen.append(original(*args)) or seen[-1])
    return seen


@pytest.mark.parametrize(
    "size, divisor", [((1024, 1024), 8), ((1023, 1024), 4), ((600, 513), 4), ((127, 999), 1), ((256, 300), 2)]
)
def test_a_picture_keeps_at_least_twice_the_size_that_it_gets(size, divisor, reductions):
    to_array(jpeg(*size), dataclasses.replace(SCALED, resize="squash"))
    assert reductions == [divisor]


@pytest.mark.parametrize(
    "resize, orientation", [*(("squash", turned) for turned in range(1, 9)), ("crop", 6), ("pad", 7), ("keep", 3)]
)
def test_the_picture_is_nearly_the_same(resize, orientation, reductions):
    file = jpeg(1037, 650, orientation, progressive=orientation % 2 == 0)
    shape = {"max_patches": 64, "patch_size": 8} if resize == "keep" else {}
    full, scaled = (dataclasses.replace(config, resize=resize, **shape) for config in (FULL, SCALED))
    (expected, size), (got, scaled_size) = to_array(file, full), to_array(file, scaled)
    assert size == scaled_size == ((650, 1037) if orientation > 4 else (1037, 650)) and got.shape == expected.shape
    assert reductions[0] > 1 and 0 < np.abs(got.astype(int) - expected).mean() < 1.5


def test_small_and_other_pictures_do_not_change(tmp_path):
    small, large = jpeg(120, 90), Image.open(io.BytesIO(jpeg(1200, 900)))
    large.save(tmp_path / "large.png")
    for source in (small, load_image(large), tmp_path / "large.png", large):
        assert np.array_equal(to_array(source, FULL)[0], to_array(source, SCALED)[0])
    assert large.size == (1200, 900)  # a picture of the caller's is not reduced


def test_a_broken_file_is_refused_as_ever():
    with pytest.raises(dyntok.ImageError, match="truncated|broken"):
        to_array(jpeg(1024, 768)[:-4000], SCALED)


def test_it_is_part_of_the_fingerprint_only_where_it_is_on(small_config):
    with_it = dataclasses.replace(small_config, image=dataclasses.replace(small_config.image, decoding="scaled"))
    assert "decoding" not in "".join(map(encoding_sections, [small_config, *PRESETS.values()]))
    assert '"decoding":"scaled"' in encoding_sections(with_it)
    assert TokenizerConfig.from_dict(json.loads(json.dumps(with_it.to_dict()))) == with_it
    with pytest.raises(dyntok.ConfigError, match="image.decoding is 'full', expected 'scaled' or null"):
        dataclasses.replace(FULL, decoding="full")


def test_it_is_chosen_for_a_call(tokenizer, tmp_path, reductions, checkpoint_folder):
    path = tmp_path / "large.jpg"
    path.write_bytes(jpeg(1024, 768))
    plain, scaled = tokenizer.encode(path), tokenizer.encode(path, decoding="scaled")
    assert reductions == [4] and plain == tokenizer.encode(path, decoding="full") and reductions == [4]
    tokenizer.features(path, decoding="scaled")
    assert reductions == [4, 4] and len(scaled) == 1
    with pytest.raises(dyntok.ConfigError, match="decoding is 'half', expected 'full' or 'scaled'"):
        tokenizer.encode(path, decoding="half")
    written = tmp_path / "codes.json"
    argv = ["encode", str(path), "--model", str(checkpoint_folder), "--decoding", "scaled", "-o", str(written)]
    assert (
        main(argv) == 0
        and dyntok.Encoding.from_dict(
            {key: value for key, value in json.loads(written.read_text()).items() if key != "sources"}
        )
        == scaled
    )
