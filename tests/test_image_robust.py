"""Pixels depend on the bytes of the picture alone, not on broken metadata, other libraries or sample containers."""

import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile
from skimage import data
from support.formats import encoded

from dyntok.config import ImageConfig, TokenizerConfig
from dyntok.errors import ImageError, MissingImageError
from dyntok.image import load_image, sniff, to_array

PHOTO = data.astronaut()[20:180, 120:360].copy()  # [160, 240, 3]
GRAY = data.camera()[100:160, 200:290].copy()  # [60, 90]


def chunk(kind, content, crc=None):
    checksum = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def with_chunk(png, extra):
    return png[:33] + extra + png[33:]  # after IHDR


def with_segment(jpeg, marker, content):
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + jpeg[2:]


# Settings of Pillow


@pytest.fixture
def hostile_pillow(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"])
def test_settings_of_pillow_do_not_matter(format, hostile_pillow):
    content = encoded(PHOTO, format)
    lazy = Image.frombytes("RGB", (1, 1), b"abc")  # Pillow still works
    assert load_image(content).size == (240, 160) and lazy.size == (1, 1)
    for share in (0.5, 0.9):
        with pytest.raises(ImageError):
            load_image(content[: int(len(content) * share)])


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_settings_of_pillow_do_not_matter_for_lazy_images(format, monkeypatch):
    content = encoded(PHOTO, format)
    lazy = Image.open(io.BytesIO(content[: len(content) // 2]))
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError):
        load_image(lazy)


def test_no_limit_of_pillow_changes_max_pixels(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match="the limit is 100"):
        load_image(encoded(PHOTO, "PNG"), max_pixels=100)


def test_nothing_global_is_left_behind():
    before = list(warnings.filters)
    load_image(encoded(PHOTO, "JPEG"))
    assert warnings.filters == before
    sklearn = pytest.importorskip("sklearn.ensemble")
    sklearn.RandomForestClassifier(5, n_jobs=1).fit(np.eye(8), np.arange(8) % 2)


# Metadata


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * (2 << 20))),
        chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"x" * (2 << 20))),
        chunk(b"tEXt", b"Comment\0hello", crc=1),
        chunk(b"pHYs", b"\0\0"),
        chunk(b"eXIf", b"nonsense"),
        chunk(b"iCCP", b"name\0\0nonsense"),
        chunk(b"gAMA", b"\0"),
        chunk(b"cHRM", b"\0\0"),
        chunk(b"tRNS", b"\0"),
        chunk(b"acTL", b"\0"),
    ],
    ids=lambda extra: extra[4:8].decode(),
)
def test_broken_png_chunks_do_not_matter(extra):
    content = with_chunk(encoded(PHOTO, "PNG"), extra)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(np.asarray(load_image(content)), PHOTO)


def test_transparency_of_more_colors_than_a_palette_has_is_ignored():
    content = encoded(Image.fromarray(PHOTO).convert("P"), "PNG")
    place = content.index(b"IDAT") - 4
    broken = content[:place] + chunk(b"tRNS", b"\xff" * 300) + content[place:]
    assert np.array_equal(np.asarray(load_image(broken)), np.asarray(load_image(content)))


@pytest.mark.parametrize(
    "marker, content",
    [
        (0xE0, b"JFIF\0\1"),
        (0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff"),
        (0xE2, b"MPF\0II*\0\xff\xff\xff\xff"),
        (0xE2, b"ICC_PROFILE\0\3\1junk"),
        (0xED, b"Photoshop 3.0\x008BIM\4"),
        (0xEE, b"Adobe"),
        (0xFE, b""),
    ],
)
def test_broken_jpeg_segments_do_not_matter(marker, content):
    plain = encoded(PHOTO, "JPEG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = load_image(with_segment(plain, marker, content))
    assert np.array_equal(np.asarray(got), np.asarray(load_image(plain)))


def box(kind, content=b""):
    return struct.pack(">I4s", 8 + len(content), kind) + content


@pytest.mark.parametrize(
    "extra", [box(b"res "), box(b"res ", box(b"resc")), box(b"colr", b"\2\0\0"), box(b"none", b"?"), box(b"uuid")]
)
def test_broken_boxes_of_jpeg_2000_do_not_matter(extra):
    plain = encoded(PHOTO, "JPEG2000")
    start = plain.index(b"jp2h") - 4
    (length,) = struct.unpack_from(">I", plain, start)
    header = struct.pack(">I", length + len(extra)) + plain[start + 4 : start + length] + extra
    content = plain[:start] + header + box(b"xml ", b"<") + plain[start + length :]
    assert np.array_equal(np.asarray(load_image(content)), PHOTO)


def test_the_profile_of_jpeg_2000_is_applied():
    plain = encoded(PHOTO[:, :, ::-1].copy(), "JPEG2000")
    start = plain.index(b"jp2h") - 4
    end = start + struct.unpack_from(">I", plain, start)[0]
    header = plain[start + 8 : end]
    color = header.index(b"colr") - 4
    rest = header[color + struct.unpack_from(">I", header, color)[0] :]
    header = header[:color] + box(b"colr", b"\2\0\0" + swapped_profile()) + rest
    content = plain[:start] + box(b"jp2h", header) + plain[end:]
    assert np.array_equal(np.asarray(load_image(content)), PHOTO[:, :, ::-1])
    assert np.abs(np.asarray(load_image(content, color="srgb")).astype(int) - PHOTO).mean() < 3


@pytest.mark.parametrize("scans, readable", [(400, True), (501, False)])
def test_scans_of_a_jpeg_are_counted(scans, readable):
    content = encoded(GRAY[:16, :16], "JPEG", progressive=True)
    start = content.rindex(b"\xff\xda")
    last = content[start:-2]
    present = content.count(b"\xff\xda")
    many = content[:-2] + last * (scans - present) + b"\xff\xd9"
    if readable:
        assert load_image(many).size == (16, 16)
    else:
        with pytest.raises(ImageError, match="501 scans"):
            load_image(many)


# White


def tiff(values, bits, extra=()):
    """An uncompressed gray TIFF of packed samples, or of 16-bit words."""
    height, width = values.shape
    if bits == 16:
        pixels = values.astype("<u2").tobytes()
    else:
        digits = (values[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1
        pixels = np.packbits(digits.reshape(height, -1).astype(np.uint8), axis=1).tobytes()
    tags = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: 1,
        273: 8,
        277: 1,
        278: height,
        279: len(pixels),
        **dict(extra),
    }
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    pixels += b"\0" * (len(pixels) % 2)
    header = struct.pack("<2sHI", b"II", 42, 8 + len(pixels))
    return header + pixels + struct.pack("<H", len(tags)) + table + struct.pack("<I", 0)


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_white_of_packed_tiffs(bits):
    values = GRAY.astype(np.uint32) * ((1 << bits) - 1) // 255
    got = np.asarray(load_image(tiff(values, bits)))[:, :, 0].astype(int)
    assert np.abs(got - GRAY).max() <= 1


@pytest.mark.parametrize("tag, white", [(341, 1000), (281, 1023)])
def test_white_that_a_tiff_states(tag, white):
    values = GRAY.astype(np.uint32) * white // 255
    got = np.asarray(load_image(tiff(values, 16, [(tag, white)])))[:, :, 0].astype(int)
    assert np.abs(got - GRAY).max() <= 1


def test_white_of_a_png_with_significant_bits():
    values = (GRAY.astype(np.uint32) * 4095 // 255).astype(np.uint16)
    png = with_chunk(encoded(values, "PNG"), chunk(b"sBIT", b"\x0c"))
    assert np.abs(np.asarray(load_image(png))[:, :, 0].astype(int) - GRAY).max() <= 1
    full = with_chunk(encoded(GRAY.astype(np.uint16) * 257, "PNG"), chunk(b"sBIT", b"\x0c"))
    assert np.array_equal(np.asarray(load_image(full))[:, :, 0], GRAY)


def test_white_of_gray_with_alpha():
    values = np.stack([GRAY.astype(np.uint16) * 16, np.full_like(GRAY, 255, np.uint16) * 257], axis=-1).astype(">u2")
    lines = b"".join(b"\0" + line.tobytes() for line in values)
    header = struct.pack(">IIBBBBB", GRAY.shape[1], GRAY.shape[0], 16, 4, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"sBIT", b"\x0c\x10")
    png += chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    assert np.abs(np.asarray(load_image(png))[:, :, 0].astype(int) - GRAY).max() <= 1


DEEP = {
    "png": with_chunk(encoded(GRAY.astype(np.uint16) * 16, "PNG"), chunk(b"sBIT", b"\x0c")),
    "png of 5 bits": with_chunk(encoded(PHOTO // 8, "PNG"), chunk(b"sBIT", b"\5\5\5")),
    "tiff": tiff(GRAY.astype(np.uint32) * 16, 12),
    "tiff of 16 bits": tiff(GRAY.astype(np.uint32) * 4, 16, [(341, 1020)]),
}


@pytest.mark.parametrize("content", DEEP.values(), ids=DEEP.keys())
def test_a_pil_image_that_is_not_decoded_has_the_white_of_its_file(content, tmp_path):
    (tmp_path / "deep").write_bytes(content)
    expected = np.asarray(load_image(content))
    assert expected.max() > 200
    with Image.open(tmp_path / "deep") as image:
        for _ in range(2):
            assert np.array_equal(np.asarray(load_image(image)), expected)
        image.load()
        assert np.asarray(load_image(image)).max() < 40  # as the docstring says


def test_a_lazy_stack_of_pages_may_be_larger_than_a_file(monkeypatch):
    content = encoded(GRAY, "TIFF")
    monkeypatch.setattr("dyntok.image.MAX_FILE_BYTES", len(content) - 1)
    assert np.array_equal(np.asarray(load_image(Image.open(io.BytesIO(content))))[:, :, 0], GRAY)


def test_signed_8_bit_tiffs():
    """As with more bits, negative values are no brightness."""
    below = tiff_of(GRAY.astype(np.int16) - 128, np.int8)
    for source in (below, Image.open(io.BytesIO(below))):
        with pytest.raises(ImageError, match=r"values from -\d+ to \d+, expected 0 to one of 255, 65535; scale them"):
            load_image(source)
    assert np.array_equal(np.asarray(load_image(tiff_of(GRAY // 2, np.int8)))[:, :, 0], GRAY // 2)


def tiff_of(values, dtype, **options):
    stream = io.BytesIO()
    pytest.importorskip("tifffile").imwrite(stream, values.astype(dtype), **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    "dtype, told",
    [
        (np.float32, "3 channels of 32-bit floating point"),
        (np.float16, "3 channels of 16-bit floating point"),
        (np.int8, "3 channels of 8-bit signed integers"),
        (np.uint32, "3 channels of 32-bit unsigned integers"),
    ],
)
@pytest.mark.parametrize("planes", ["contig", "separate"])
def test_tiffs_whose_samples_can_not_be_read_say_what_they_are(dtype, told, planes):
    values = PHOTO if planes == "contig" else np.moveaxis(PHOTO, 2, 0).copy()
    content = tiff_of(values // 2, dtype, photometric="rgb", planarconfig=planes)
    with pytest.raises(ImageError, match=f"^<bytes, [0-9,]+ bytes>: a TIFF with {told}, .* save it as gray or RGB"):
        load_image(content)


@pytest.mark.parametrize("compression, readable", [(None, False), ("zlib", True)])
def test_cmyk_planes_of_16_bits(compression, readable):
    planes = np.concatenate([np.moveaxis(255 - PHOTO, 2, 0), np.zeros((1, *PHOTO.shape[:2]))]).astype(np.uint16)
    options = {"photometric": "separated", "planarconfig": "separate", "compression": compression}
    content = tiff_of(planes * 257, np.uint16, **options)
    if readable:
        assert np.abs(np.asarray(load_image(content)).astype(int) - PHOTO).max() <= 1
        return
    for source in (content, Image.open(io.BytesIO(content))):
        with pytest.raises(ImageError, match="separate planes, .* save it with its channels side by side"):
            load_image(source)


SIDE_BY_SIDE = {"photometric": "rgb", "planarconfig": "contig"}
PLANES = {"photometric": "rgb", "planarconfig": "separate"}
TILES = {"tile": (32, 48), "compression": "zlib", "predictor": True}


@pytest.mark.parametrize("layout", [{}, {"rowsperstrip": 7}, {"tile": (32, 48)}, TILES, {"byteorder": ">"}])
def test_layouts_of_deep_tiffs(layout):
    """12 bits in 16, in strips and tiles, with alpha, and with channels in separate planes."""
    tifffile = pytest.importorskip("tifffile")

    def written(values, white, **options):
        stream = io.BytesIO()
        extra = [(341, "H", values.shape[-1], (white,) * values.shape[-1], True)]
        values = np.moveaxis(values, 2, 0).copy() if options["planarconfig"] == "separate" else values
        tifffile.imwrite(stream, values.astype(np.uint16), extratags=extra, **layout, **options)
        return stream.getvalue()

    deep = PHOTO.astype(np.uint16) * 16
    half = np.full((*PHOTO.shape[:2], 1), 2040)
    gray = np.stack([GRAY, np.full_like(GRAY, 255)], axis=-1).astype(np.uint16) * 257
    alpha, over_white = {"extrasamples": ["unassalpha"]}, PHOTO / 2 + 127.5
    for content, expected in [
        (written(deep, 4080, **SIDE_BY_SIDE), PHOTO),
        (written(deep, 4080, **PLANES), PHOTO),
        (written(np.dstack([deep, half]), 4080, **SIDE_BY_SIDE, **alpha), over_white),
        (written(np.dstack([deep, half]), 4080, **PLANES, **alpha), over_white),
        (written(np.dstack([deep / 2, half]), 4080, **SIDE_BY_SIDE, extrasamples=["assocalpha"]), over_white),
        (written(gray, 65535, photometric="minisblack", planarconfig="contig", **alpha), GRAY[:, :, None]),
    ]:
        assert np.abs(np.asarray(load_image(content)).astype(int) - expected).max() <= 2


# Color


def swapped_profile():
    """An RGB profile that is not sRGB: that of sRGB with its red and blue primaries exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for position in range(132, 132 + 12 * int.from_bytes(profile[128:132], "big"), 12):
        name = bytes(profile[position : position + 4])
        profile[position : position + 4] = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}.get(name, name)
    return bytes(profile)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_profiles_are_applied_on_request(format):
    options = {"lossless": True} if format == "WEBP" else {"quality": 98} if format == "JPEG" else {}
    content = encoded(PHOTO[:, :, ::-1].copy(), format, icc_profile=swapped_profile(), **options)
    plain = np.asarray(load_image(content)).astype(int)
    assert np.abs(plain - PHOTO[:, :, ::-1]).mean() < 3
    converted = load_image(content, color="srgb")
    assert np.abs(np.asarray(converted).astype(int) - PHOTO).mean() < 3
    assert "icc_profile" not in converted.info
    again = to_array(load_image(content), ImageConfig(img_size=32, color="srgb"))[0]
    assert np.array_equal(again, to_array(content, ImageConfig(img_size=32, color="srgb"))[0])


@pytest.mark.parametrize("profile", [b"nonsense", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()])
def test_profiles_that_do_not_fit_are_ignored(profile):
    content = encoded(PHOTO, "PNG", icc_profile=profile)
    assert np.array_equal(np.asarray(load_image(content, color="srgb")), PHOTO)


def test_a_lab_picture_is_not_converted_by_an_rgb_profile():
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    picture = ImageCms.applyTransform(
        Image.fromarray(PHOTO), ImageCms.buildTransform(srgb, lab, "RGB", "LAB"), inPlace=False
    )
    content = encoded(picture, "TIFF", icc_profile=swapped_profile())
    assert np.abs(np.asarray(load_image(content, color="srgb")).astype(int) - PHOTO).mean() < 2


def test_a_profile_that_is_no_bytes_is_ignored():
    """A program may have put anything into `info`."""
    image = Image.fromarray(PHOTO)
    image.info["icc_profile"] = "sRGB"
    assert np.array_equal(np.asarray(load_image(image, color="srgb")), PHOTO)


def test_srgb_profiles_change_no_pixel():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(np.asarray(load_image(encoded(PHOTO, "PNG", icc_profile=profile), color="srgb")), PHOTO)


def test_color_is_part_of_what_a_configuration_states():
    assert "color" not in str(TokenizerConfig(image=ImageConfig()).stated())
    assert TokenizerConfig(image=ImageConfig(color="srgb")).stated()["image"] == {"color": "srgb"}
    with pytest.raises(ValueError, match="image.color"):
        ImageConfig(color="p3")


# Sources


def test_more_kinds_of_sources():
    content = encoded(PHOTO, "PNG")
    gray = torch.from_numpy(GRAY)[None]
    for source in (
        io.BytesIO(content),
        bytearray(content),
        memoryview(content),
        PHOTO / 255,
        (PHOTO / 255).astype("f4"),
    ):
        assert np.array_equal(np.asarray(load_image(source)), PHOTO)
    assert np.array_equal(np.asarray(load_image(gray))[:, :, 0], GRAY)
    with pytest.raises(ImageError, match="binary mode"):
        load_image(io.StringIO("text"))


def test_what_is_no_file_gets_advice(tmp_path):
    with pytest.raises(FileNotFoundError) as missing:
        load_image(tmp_path / "absent.png")
    assert isinstance(missing.value, MissingImageError)
    for source, advice in [(tmp_path, "dyntok batch"), ("*.jpg", "glob.glob"), ("https://a.b/c.jpg", "urlopen")]:
        with pytest.raises(ImageError, match=advice):
            load_image(source)


def test_formats_are_recognized_by_their_first_bytes():
    for format in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "PCX", "DDS"):
        assert sniff(encoded(PHOTO, format)) == format
    assert sniff(b"plain text") is None


def test_jpeg_xl_with_its_plugin():
    content = encoded(PHOTO, "JXL", lossless=True)
    assert np.array_equal(np.asarray(load_image(content)), PHOTO)
    for size, options in [((8, 8), {}), ((30, 400), {"use_container": True}), ((256, 144), {}), ((255, 1), {})]:
        content = encoded(Image.new("RGB", size), "JXL", **options)
        assert load_image(content).size == size
        with pytest.raises(ImageError, match=f"{size[0]} x {size[1]}"):  # before anything is decoded
            load_image(content, max_pixels=10)
    with pytest.raises(ImageError, match="damaged JPEG XL"):
        load_image(content[: len(content) // 2])


def test_heic_without_its_plugin_says_what_to_install():
    code = (
        "import sys; sys.modules['pillow_heif'] = None\n"
        "import importlib.util as u; f = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'pillow_heif' else f(n, *a)\n"
        "import dyntok.image as i\n"
        "try: i.load_image(b'\\0\\0\\0\\x18ftypheic' + bytes(40))\n"
        "except i.ImageError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert "pip install pillow-heif" in done.stdout, done.stderr
