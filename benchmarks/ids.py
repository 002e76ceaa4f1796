"""Measure pictures that come back from ids alone, against WebP files of as many bytes.

    python benchmarks/ids.py SOURCE... [--model NAME] [--ids 100 160] [--max-patches 256] [--square] [--limit 200]
        [--encode-patches 573] [--refine 1]

SOURCE is a folder of images or a webdataset tar; with tars only the validation part is used (1 image in 20, by key).
Every picture goes through `to_ids`, `to_encoding` and `decode`. Ids count codes and map tokens, but not the four tokens
for start, end, rows and columns. A code is worth log2(K) bits, a map token log2(625). A WebP file counts as a whole,
and may scale the picture down.
With `--encode-patches` the tokenizer does, too: it encodes a coarser grid, and the result is scaled up to the pictures
of `--max-patches` patches that everything is compared with. `--refine` is the option of `encode`.
"""

import argparse
import io
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image
from timing import append, environment

import dyntok
from dyntok.image import to_array
from dyntok.training.sources import find_samples

WEBP_SCALES = (1.0, 0.75, 0.5, 0.35, 0.25)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return -10 * math.log10(max(np.square(a.astype(float) / 255 - b.astype(float) / 255).mean(), 1e-10))


def from_ids(
    tok: dyntok.DynamicVisualTokenizer, image: bytes, wanted: np.ndarray, ids: int, places: str, options: dict
) -> tuple:
    """Returns the PSNR, the number of ids and their bytes; the budget leaves room for the header."""
    vocab = dyntok.VisualVocab.of(tok, after=0, layout=places, any_grid=tok.any_grid)
    rows, columns = tok.encode(image, budget=1, **{**options, "refine": 0}).grids[0].tolist()
    header = -(-rows // 4) * -(-columns // 4) if places == "map" else 0
    encoding = tok.encode(image, budget=max(1, min(ids - header, rows * columns)), places=places, **options)
    written = vocab.to_ids(encoding)
    again = tok.decode(vocab.to_encoding(written))[0]
    again = again.resize(wanted.shape[1::-1], Image.Resampling.BICUBIC)  # a copy where the size is right
    bits = encoding.num_tokens * math.log2(tok.vocab_size) + header * math.log2(625)
    return psnr(np.asarray(again), wanted), encoding.num_tokens + header, bits / 8


def webp(wanted: np.ndarray, size: float) -> float:
    """Returns the best PSNR of a WebP file of at most `size` bytes, of the picture or of a smaller one."""
    image, best = Image.fromarray(wanted), 0.0
    for scale in WEBP_SCALES:
        small = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
        low, high = 0, 100
        while low < high:  # the highest quality that fits
            middle = (low + high + 1) // 2
            file = io.BytesIO()
            small.save(file, "WEBP", quality=middle, method=6)
            low, high = (middle, high) if len(file.getvalue()) <= size else (low, middle - 1)
        file = io.BytesIO()
        small.save(file, "WEBP", quality=low, method=6)
        if len(file.getvalue()) <= size:
            again = Image.open(file).convert("RGB").resize(image.size, Image.Resampling.BICUBIC)
            best = max(best, psnr(np.asarray(again), wanted))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--ids", type=int, nargs="+", default=[100, 160])
    parser.add_argument("--max-patches", type=int)
    parser.add_argument("--encode-patches", type=int, metavar="N", help="of the encoded grid (default: --max-patches)")
    parser.add_argument("--refine", type=int, default=0)
    parser.add_argument("--square", action="store_true", help="crop the central square")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    tok = dyntok.load(options.model)
    shape = {"fit": "crop"} if options.square else {}
    if options.max_patches:
        shape["max_patches"] = options.max_patches
    coded: dict = {**shape, "refine": options.refine}
    if options.encode_patches:
        coded["max_patches"] = options.encode_patches
    found = find_samples(options.sources, "validation" if options.sources[0].suffix == ".tar" else "all")
    samples = found[:: max(1, len(found) // options.limit)][: options.limit]
    pixels = [to_array(sample.read(), tok.image_config(**shape))[0] for sample in samples]
    for ids in options.ids:
        for places in ("map", "lattice"):
            pairs = zip(samples, pixels, strict=True)
            results = [from_ids(tok, sample.read(), wanted, ids, places, coded) for sample, wanted in pairs]
            quality, count, size = np.mean(results, axis=0)
            row = {"model": tok.name, "fingerprint": tok.fingerprint, "places": places, "asked": ids, "ids": count,
                   "bytes": size, "psnr": quality, "images": len(samples), **shape}  # fmt: skip
            if options.refine:
                row["refine"] = options.refine
            if options.encode_patches:
                row["encode_patches"] = options.encode_patches
            if places == "map":
                row["webp"] = float(np.mean([webp(p, r[2]) for p, r in zip(pixels, results, strict=True)]))
            print(json.dumps(row), flush=True)
            append(options.output, {**environment(), **row})


if __name__ == "__main__":
    main()
