"""The table of image formats: which ones are read, which are only recognized, and how their files are named and begin.

Not here: reading any of them (`decode.py`).
"""

import importlib.util
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A kind of image file.

    `advice` says what to do about a format that can't be read; it is empty for one that can.
    """

    name: str
    suffixes: tuple[str, ...]  # of file names, in lower case, with the dot
    magic: str = ""  # a regular expression for the first bytes; "" if the files have no reliable signature
    advice: str = ""


def _advice_unless_installed(module: str, package: str, format: str) -> str:
    return "" if importlib.util.find_spec(module) else f"{format} needs: pip install {package}"


_CONVERT = "convert it to PNG or JPEG first"
_AVIF = "" if importlib.util.find_spec("PIL._avif") else "AVIF needs: pip install 'Pillow>=11.3'"
_HEIC = _advice_unless_installed("pillow_heif", "pillow-heif", "HEIC")
_JXL = _advice_unless_installed("pillow_jxl", "pillow-jxl-plugin", "JPEG XL")

# None of the formats without advice starts another program, as EPS does with Ghostscript. The first match of `magic`
# counts.
FORMATS = (
    Format("JPEG", (".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".mpo"), r"\xff\xd8\xff"),
    Format("PNG", (".png", ".apng"), r"\x89PNG\r\n\x1a\n"),
    Format("WEBP", (".webp",), r"RIFF....WEBP"),
    Format("GIF", (".gif",), r"GIF8[79]a"),
    Format("BMP", (".bmp", ".dib"), r"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\x00\x00\x00"),
    Format("Canon raw", (".cr2", ".cr3", ".crw"), r"II\*\x00....CR|....ftypcrx ", _CONVERT),
    Format("TIFF", (".tif", ".tiff"), r"II\*\x00|MM\x00\*|MM\*\x00|II\x00\*|MM\x00\+|II\+\x00"),
    Format("AVIF", (".avif", ".avifs"), r"....ftyp(avif|avis|(mif1|msf1)....(....){0,8}?avi[fs])", _AVIF),
    Format(
        "JPEG2000", (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"), r"\x00\x00\x00\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"
    ),
    Format("PPM", (".ppm", ".pgm", ".pbm", ".pnm"), r"P[1-6][\s#]"),
    Format("HEIC", (".heic", ".heif", ".heics", ".heifs", ".hif"), r"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", _HEIC),
    Format("JPEG XL", (".jxl",), r"\xff\x0a|\x00\x00\x00\x0cJXL \r\n\x87\n", _JXL),
    Format("PSD", (".psd", ".psb"), r"8BPS", _CONVERT),
    Format("EPS", (".eps",), r"%!PS|\xc5\xd0\xd3\xc6", _CONVERT),
    Format("ICO", (".ico",), r"\x00\x00\x01\x00[^\x00]\x00", _CONVERT),
    Format("ICNS", (".icns",), r"icns", _CONVERT),
    Format("QOI", (".qoi",), r"qoif", _CONVERT),
    Format("TGA", (".tga",), "", _CONVERT),
    Format("DDS", (".dds",), r"DDS ", _CONVERT),
    Format("PCX", (".pcx",), r"\x0a[\x00\x02\x03\x04\x05]\x01[\x01\x02\x04\x08]", _CONVERT),
    Format("PFM", (".pfm",), r"P[Ff]\s", _CONVERT),
    Format("OpenEXR", (".exr",), r"v/1\x01", _CONVERT),
    Format("Radiance HDR", (".hdr",), r"#\?(RADIANCE|RGBE)", _CONVERT),
    Format("GIMP", (".xcf",), r"gimp xcf", _CONVERT),
    Format("SGI", (".sgi",), r"\x01\xda[\x00\x01][\x01\x02]", _CONVERT),
    Format("Sun raster", (".ras",), r"\x59\xa6\x6a\x95", _CONVERT),
    Format("WMF", (".wmf", ".emf"), r"\xd7\xcd\xc6\x9a|\x01\x00\x00\x00.{36} EMF", _CONVERT),
    Format("FITS", (".fits",), r"SIMPLE  =", _CONVERT),
    Format("DICOM", (".dcm",), r".{128}DICM", _CONVERT),
    Format("DjVu", (".djvu",), r"AT&TFORM", _CONVERT),
    Format("SVG", (".svg",), r"(\xef\xbb\xbf)?\s*<(svg|(\?xml|!--|!DOCTYPE svg).*<svg)[\s>]", _CONVERT),
    Format("JPEG XR", (".jxr", ".wdp", ".hdp"), r"II\xbc[\x00\x01]", _CONVERT),
    Format("PDF", (), r"%PDF-", _CONVERT),
    Format(
        "camera raw",
        (
            ".dng",
            ".nef",
            ".nrw",
            ".arw",
            ".sr2",
            ".srw",
            ".raf",
            ".orf",
            ".rw2",
            ".pef",
            ".x3f",
            ".kdc",
            ".iiq",
            ".3fr",
        ),
        r"FUJIFILMCCD-RAW|IIU\x00|IIR[OS]",
        _CONVERT,
    ),
)

BY_NAME = {format.name: format for format in FORMATS}
ACCEPTED_FORMATS = tuple(format.name for format in FORMATS if not format.advice)

# Suffix -> format. A file of the first table can be read; one of the second is a picture, but reading it is an
# `ImageError`.
IMAGE_SUFFIXES = {suffix: format.name for format in FORMATS for suffix in format.suffixes if not format.advice}
UNREADABLE_SUFFIXES = {suffix: format.name for format in FORMATS for suffix in format.suffixes if format.advice}

_MAGIC = [(format.name, re.compile(format.magic.encode("latin-1"), re.DOTALL)) for format in FORMATS if format.magic]


def sniff(data: bytes) -> str | None:
    """Returns the name of the image format that the bytes begin with, readable or not; None if it is none of `FORMATS`.

    The first 512 bytes are enough. TGA has no signature and is never recognized.
    """
    head = bytes(data[:512])
    return next((name for name, pattern in _MAGIC if pattern.match(head)), None)
