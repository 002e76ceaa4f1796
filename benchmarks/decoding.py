"""Compare JPEG files decoded in full and at a fraction of their size: time, codes and quality.

    python benchmarks/decoding.py [--photos 24] [--width 4000 --height 3000]

The files are photographs enlarged to that size, with noise as a sensor has it, since no large ones come with Python.
Times are medians over all files of one thread, and both ways take turns. A code counts as equal where the same patch
has the same code. The reference of PSNR is the picture that is decoded in full and resized, at the size of its grid.
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Iterator

import numpy as np
from PIL import Image
from skimage import data
from timing import environment

import dyntok
from dyntok.image import to_array

WAYS = ("full", "scaled")


def camera_jpegs(count: int, width: int, height: int) -> Iterator[bytes]:
    """Yields JPEG files of quality 92 that differ: parts of photographs, enlarged, with noise."""
    photographs = [data.astronaut(), data.coffee(), data.cat(), data.rocket()]
    random = np.random.default_rng(0)
    grain = random.normal(0, 4, (height, width, 1)).astype(np.float32)
    for number in range(count):
        photograph = Image.fromarray(photographs[number % len(photographs)])
        side = min(photograph.size) * random.uniform(0.6, 1)
        box = side * min(1, width / height), side * min(1, height / width)
        left, top = (random.uniform(0, whole - part) for whole, part in zip(photograph.size, box, strict=True))
        place = (left, top, left + box[0], top + box[1])
        large = np.asarray(photograph.resize((width, height), Image.Resampling.BICUBIC, box=place))
        noisy = (large + np.roll(grain, 7919 * number)).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=92)
        yield file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="as in `dyntok encode`")
    parser.add_argument("--photos", type=int, default=24)
    parser.add_argument("--width", type=int, default=4000)
    parser.add_argument("--height", type=int, default=3000)
    options = parser.parse_args()
    tokenizer = dyntok.load(options.model)
    configs = {way: tokenizer.image_config(decoding=way) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    quality: dict[str, list[float]] = {way: [] for way in WAYS}
    equal: list[float] = []
    for file in camera_jpegs(options.photos, options.width, options.height):
        encodings = {}
        for way in WAYS:
            began = time.perf_counter()
            to_array(file, configs[way])
            seconds[way].append(time.perf_counter() - began)
            encodings[way] = tokenizer.encode(file, decoding=way)
        original = to_array(file, configs["full"])[0]
        for way in WAYS:
            quality[way].append(psnr(np.asarray(tokenizer.decode(encodings[way])[0]), original))
        equal.append(share_equal(*encodings.values()))
    times = {way: statistics.median(seconds[way]) for way in WAYS}
    row = {
        **environment(),
        "tokenizer": tokenizer.name, "photos": options.photos, "size": [options.width, options.height],
        "ms": {way: 1e3 * value for way, value in times.items()}, "faster": times["full"] / times["scaled"],
        "equal_codes": statistics.mean(equal), "least_equal": min(equal),
        "psnr": {way: statistics.mean(values) for way, values in quality.items()},
    }  # fmt: skip
    print(json.dumps(row, indent=1))


def share_equal(one: dyntok.Encoding, other: dyntok.Encoding) -> float:
    """Returns the share of the first one's tokens that the other one has in the same place."""
    pairs = [set(zip(enc.packed_positions.tolist(), enc.packed_codes.tolist(), strict=True)) for enc in (one, other)]
    return len(pairs[0] & pairs[1]) / len(pairs[0])


def psnr(image: np.ndarray, original: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((image.astype(float) - original) ** 2)))


if __name__ == "__main__":
    main()
