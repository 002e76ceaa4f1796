"""Pictures in every form to pixels and back: what must come out. What must be refused: test_image_refused.py."""

import io
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from support.formats import encoded

from dyntok.config import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ImageConfig
from dyntok.errors import ImageError
from dyntok.image import ACCEPTED_FORMATS, describe, load_image, to_image, to_pixels

PHOTO = data.astronaut()[20:180, 120:360].copy()  # [160, 240, 3], uneven sides so that a wrong turn shows
GREY = data.camera()[100:160, 200:290].copy()  # [60, 90]


def array(image):
    return np.asarray(image)


def photo_sources(folder):
    path = folder / "photo.png"
    path.write_bytes(encoded(PHOTO, "PNG"))
    tensor = torch.from_numpy(PHOTO).permute(2, 0, 1)
    return {
        "str": str(path),
        "Path": path,
        "bytes": path.read_bytes(),
        "lazy PIL": Image.open(path),
        "PIL": Image.fromarray(PHOTO),
        "ndarray": PHOTO,
        "ndarray view": np.concatenate([PHOTO, PHOTO], axis=1)[:, ::-1][:, ::-1][:, : PHOTO.shape[1]],
        "ndarray RGBA": np.dstack([PHOTO, np.full(PHOTO.shape[:2], 255, np.uint8)]),
        "uint8 tensor": tensor,
        "float tensor": tensor.float() / 255,
        "double tensor with gradient": (tensor.double() / 255).requires_grad_(),
    }


# What comes out


def test_every_kind_of_source_gives_the_same_pixels(tmp_path):
    config = ImageConfig(img_size=64)
    expected = to_pixels(PHOTO, config)
    for kind, source in photo_sources(tmp_path).items():
        assert np.array_equal(array(load_image(source)), PHOTO), kind
        assert torch.equal(to_pixels(source, config), expected), kind


@pytest.mark.parametrize("format", ACCEPTED_FORMATS)
def test_every_accepted_format_is_read(format):
    exact, close = {"lossless": True}, {"quality": 98}
    options = {"WEBP": exact, "JPEG XL": exact, "JPEG": close, "AVIF": close, "HEIC": close}.get(format, {})
    got = array(load_image(encoded(PHOTO, format, **options))).astype(float)
    assert got.shape == PHOTO.shape
    assert np.abs(got - PHOTO).mean() < {"JPEG": 2.5, "AVIF": 2.5, "HEIC": 2.5, "GIF": 12}.get(format, 1e-9)


STORED = {  # how a camera that was held so stores the picture
    1: PHOTO,
    2: PHOTO[:, ::-1],
    3: PHOTO[::-1, ::-1],
    4: PHOTO[::-1],
    5: PHOTO.swapaxes(0, 1),
    6: np.rot90(PHOTO, 1),
    7: PHOTO[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90(PHOTO, -1),
}


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "HEIC"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied_once(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "HEIC": {"quality": 98}}.get(format, {})
    content = encoded(np.ascontiguousarray(STORED[orientation]), format, exif=exif.tobytes(), **options)
    upright = load_image(content)
    for image in (upright, load_image(upright), load_image(Image.open(io.BytesIO(content)))):
        assert image.size == (240, 160)
        assert np.abs(array(image).astype(float) - PHOTO).mean() < (2.5 if format == "HEIC" else 1e-9)


def test_orientation_applies_to_converted_modes_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(np.rot90(GREY, 1).astype(np.uint16) * 257, "PNG", exif=exif)
    assert np.array_equal(array(load_image(content))[:, :, 0], GREY)


@pytest.mark.parametrize("mode", ["L", "P", "YCbCr", "HSV", "CMYK", "RGBA", "RGBX", "PA"])
def test_modes_keep_the_picture(mode):
    picture = Image.fromarray(PHOTO)
    converted = (
        picture.quantize(256).convert("PA")
        if mode == "PA"
        else picture.quantize(256)
        if mode == "P"
        else picture.convert(mode)
    )
    got = array(load_image(converted)).astype(float)
    expected = array(picture.convert("L").convert("RGB")) if mode == "L" else PHOTO
    assert np.abs(got - expected).mean() < (6 if mode in ("P", "PA") else 3)


def test_one_bit_is_black_and_white():
    assert np.array_equal(array(load_image(Image.fromarray(GREY > 100)))[:, :, 1], (GREY > 100) * 255)


def test_grey_arrays():
    assert np.array_equal(array(load_image(GREY)), np.dstack([GREY] * 3))
    assert np.array_equal(array(load_image(GREY[:, :, None])), np.dstack([GREY] * 3))


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_files_are_not_inverted(format):
    got = array(load_image(encoded(Image.fromarray(PHOTO).convert("CMYK"), format)))
    assert np.abs(got.astype(float) - PHOTO).mean() < 6


def sixteen_bits():
    """Every 8-bit value as 16 bits, exact and a little off."""
    exact = np.arange(256).reshape(16, 16) * 257
    return np.clip(np.concatenate([exact, exact + 100, exact - 100]), 0, 65535).astype(np.uint16)


@pytest.mark.parametrize("kind", ["png", "tiff", "tiff big-endian", "I;16", "I;16B", "I", "F"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    values = sixteen_bits()
    big = Image.frombytes("I;16B", values.shape[::-1], values.astype(">u2").tobytes())
    source = {
        "png": lambda: encoded(values, "PNG"),
        "tiff": lambda: encoded(values, "TIFF"),
        "tiff big-endian": lambda: encoded(big, "TIFF"),
        "I;16": lambda: Image.fromarray(values),
        "I;16B": lambda: big,
        "I": lambda: Image.fromarray(values.astype(np.int32)),
        "F": lambda: Image.fromarray(values.astype(np.float32)),
    }[kind]()
    assert np.array_equal(
        array(load_image(source))[:, :, 2], np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (3, 1))
    )


def test_sixteen_bit_tiff_where_white_is_zero():
    content = encoded(sixteen_bits(), "TIFF")
    entry = struct.pack("<HHII", 262, 3, 1, 1)
    assert content.count(entry) == 1
    got = load_image(content.replace(entry, struct.pack("<HHII", 262, 3, 1, 0)))
    assert np.array_equal(array(got)[:16, :, 0], 255 - np.arange(256).reshape(16, 16))


@pytest.mark.parametrize("mode, white", [("F", 1), ("F", 255), ("I", 255)])
def test_i_and_f_take_the_first_white_that_holds_every_value(mode, white):
    values = (GREY / 255 * white).astype(np.float32 if mode == "F" else np.int32)
    values[0, 0] = white
    assert np.abs(array(load_image(Image.fromarray(values)))[:, :, 0].astype(int) - GREY)[1:].max() <= 1


@pytest.mark.parametrize("value", [-0.5, 70000.0, float("nan"), float("inf")])
def test_i_and_f_refuse_other_ranges(value):
    values = np.zeros((4, 5), np.float32)
    values[1, 2] = value
    with pytest.raises(ImageError, match="expected 0 to one of 1, 255, 65535"):
        load_image(Image.fromarray(values))


ALPHA = np.zeros((40, 60), np.uint8)
ALPHA[:, 20:40] = 128
ALPHA[:, 40:] = 255


def on_white(colour):
    weight = ALPHA[:, :, None] / 255
    return colour * weight + 255 * (1 - weight)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGBa"])
@pytest.mark.parametrize("format", [None, "PNG", "TIFF"])
def test_alpha_is_composited_on_white(mode, format):
    rgba = Image.fromarray(np.dstack([np.full((40, 60, 3), (200, 40, 90), np.uint8), ALPHA]))
    colour = array(rgba.convert("L").convert("RGB")) if mode == "LA" else np.array([200, 40, 90])
    if mode == "P":
        picture = Image.fromarray((ALPHA // 127).astype(np.uint8), "L").convert("P")
        picture.putpalette([200, 40, 90] * 3)
        picture.info["transparency"] = bytes([0, 128, 255])
    else:
        picture = rgba.convert(mode)
    in_file = format and mode != "RGBa" and (mode, format) != ("P", "TIFF")  # those do not exist
    got = array(load_image(encoded(picture, format) if in_file else picture))
    assert np.abs(got - on_white(colour)).max() <= 2


@pytest.mark.parametrize(
    "pixels, key",
    [((GREY > 90).astype(np.uint8) * 77, 77), (np.full((4, 6, 3), 9, np.uint8), (9, 9, 9)), (sixteen_bits(), 257 * 7)],
)
def test_transparent_colour_key_is_white(pixels, key):
    got = array(load_image(encoded(pixels, "PNG", transparency=key)))
    clear = (pixels == key).all(axis=2) if pixels.ndim == 3 else pixels == key
    assert clear.any()
    assert (got[clear] == 255).all()
    assert (got[~clear] != 255).any() or clear.all()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_animations_give_their_first_frame(format):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    first, *others = [Image.new("RGB", (32, 24), colour) for colour in colours]
    content = encoded(first, format, save_all=True, append_images=others)
    for source in (content, Image.open(io.BytesIO(content))):
        assert np.abs(array(load_image(source)).astype(int) - (255, 0, 0)).max() < 8


def test_the_result_is_a_new_image_and_the_source_stays():
    source = Image.fromarray(PHOTO)
    load_image(source).paste((0, 0, 0), (0, 0, 50, 50))
    assert np.array_equal(array(source), PHOTO)


# Warnings and threads


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif", [b"II*\0\x08\0\0\0\x05\0\x12\x01", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0", b"nonsense here"]
)
def test_damaged_exif_neither_stops_nor_warns(exif, format):
    content = encoded(PHOTO, format, exif=b"Exif\0\0" + exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = load_image(content)
        with pytest.raises(UserWarning):
            warnings.warn("of somebody else", stacklevel=1)
    assert np.array_equal(array(got), array(load_image(encoded(PHOTO, format))))


def test_threads_give_the_same_as_one_after_another():
    config = ImageConfig(img_size=32)
    contents = [
        encoded(np.roll(PHOTO, shift, axis=1), format) for shift in range(6) for format in ("JPEG", "WEBP", "GIF")
    ]
    expected = [to_pixels(content, config) for content in contents]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda content: to_pixels(content, config), contents))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# Pixels and back


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_pixels_are_normalised(resize):
    config = ImageConfig(img_size=160, resize=resize, mean=OPENAI_CLIP_MEAN, std=OPENAI_CLIP_STD)
    pixels = to_pixels(PHOTO, config)
    assert pixels.shape == (3, 160, 160) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    resized = {
        "crop": PHOTO[:, 40:200],
        "squash": array(Image.fromarray(PHOTO).resize((160, 160), Image.Resampling.BICUBIC)),
    }[resize]
    expected = (resized / 255 - OPENAI_CLIP_MEAN) / OPENAI_CLIP_STD
    assert np.abs(pixels.permute(1, 2, 0).numpy() - expected).max() < 1e-5


def test_crop_is_a_resize_and_a_central_cut():
    picture = Image.fromarray(PHOTO)
    cut = array(picture.resize((96, 64), Image.Resampling.BICUBIC))[:, 16:80].astype(float)
    got = array(to_image(to_pixels(PHOTO, ImageConfig(img_size=64)), ImageConfig(img_size=64)))
    assert np.abs(got - cut).max() <= 1


def test_crop_of_an_odd_margin_does_not_blur():
    config = ImageConfig(img_size=128)
    picture = PHOTO[:128, :131]
    assert np.array_equal(array(to_image(to_pixels(picture, config), config)), picture[:, 1:129])


@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("shape", [(1, 100_000), (100_000, 1), (300, 2), (1, 1)])
def test_slivers_need_no_large_picture_on_the_way(shape, resize, monkeypatch):
    sizes, plain_resize = [], Image.Image.resize

    def watched_resize(image, size, *args, **kwargs):
        # Pillow goes over the width first, keeping the rows it needs
        height = image.height if kwargs.get("box") is None else kwargs["box"][3] - kwargs["box"][1]
        sizes.append(size[0] * height if size[0] != image.width else 0)
        return plain_resize(image, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched_resize)
    grey = np.full(shape, 120, np.uint8)
    pixels = to_pixels(grey, ImageConfig(img_size=64, resize=resize))
    assert torch.allclose(pixels, torch.tensor(120 / 127.5 - 1), atol=1e-6)
    assert max(sizes) <= 64 * 300


@pytest.mark.parametrize("mean, std", [((0.5,) * 3, (0.5,) * 3), (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)])
def test_to_image_undoes_to_pixels(mean, std):
    config = ImageConfig(img_size=160, mean=mean, std=std)
    square = PHOTO[:, 40:200]
    assert np.array_equal(array(to_image(to_pixels(square, config), config)), square)


def test_to_image_clamps_and_rounds():
    config = ImageConfig(img_size=2)
    levels = torch.tensor([-9.0, 0.6, 100.4, 100.6, 254.6, 999.0]) / 127.5 - 1
    pixels = levels.expand(3, 2, 6).to(torch.float64).requires_grad_()
    assert array(to_image(pixels, config))[1, :, 2].tolist() == [0, 1, 100, 101, 255, 255]


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(1, 3, 4, 4),
        torch.zeros(4, 4, 3),
        torch.zeros(3, 4, 4).byte(),
        torch.zeros(3, 0, 4),
        torch.full((3, 4, 4), torch.nan),
    ],
)
def test_to_image_refuses_what_is_no_image(pixels):
    with pytest.raises(ImageError, match="<tensor .*expected"):
        to_image(pixels, ImageConfig())


def test_describe():
    assert describe(b"x" * 1234) == "<bytes, 1,234 bytes>"
    assert describe(Path("a") / "b.png") == str(Path("a") / "b.png")
    assert describe(np.zeros((3, 4), np.uint8)) == "<ndarray uint8 (3, 4)>"
    assert describe(torch.zeros(3, 4, 5)) == "<tensor float32 (3, 4, 5)>"
    assert describe(Image.new("L", (7, 5))) == "<PIL L 7x5>"
    assert describe({}) == "<dict>"
    assert describe("line\nfeed\udc80 é.png") == "line\\nfeed\\udc80 é.png"
    long = describe("/photos/" + "x" * 5000 + "/last.png")
    assert len(long) == 120 and long.endswith("/last.png") and long.startswith("...")


def test_describe_names_the_file_of_a_pil_image(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(PHOTO, "PNG"))
    with Image.open(path) as lazy:
        assert describe(lazy).startswith("<PIL RGB 240x160 ") and "photo.png" in describe(lazy)
