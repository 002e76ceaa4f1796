"""Measure images/s of `encode` with JPEG decoding, where the time goes, and the cost of computing every image alone.

    python benchmarks/encode.py [--images 200] [--model NAME] [--output benchmarks/results/encode.jsonl]

Encodes crops of the example photograph, one per image, stored as JPEG of 160 px. Before timing it checks that the codes
of the timed paths agree wherever they must.
"""

import argparse
import io
from pathlib import Path

import torch
from PIL import Image
from timing import append, environment, seconds

import dyntok
from dyntok.image import load_image, to_pixels

PHOTO = Path(dyntok.__file__).parent / "assets" / "astronaut.jpg"


def photographs(count: int) -> list[bytes]:
    """JPEGs of 160 x 160 pixels, each another crop of the demo photograph."""
    photo = load_image(PHOTO)
    generator = torch.Generator().manual_seed(0)
    files = []
    for _ in range(count):
        x, y, scale = torch.rand(3, generator=generator).tolist()
        side = 160 + scale * (min(photo.size) - 160)
        left, top = x * (photo.width - side), y * (photo.height - side)
        file = io.BytesIO()
        photo.resize((160, 160), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)).save(
            file, "JPEG", quality=90
        )
        files.append(file.getvalue())
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--model")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    tokenizer = dyntok.load(options.model)
    files = photographs(options.images)
    pixels = torch.stack([to_pixels(file, tokenizer.config.image) for file in files])

    alone = tokenizer.encode(files)
    if alone != tokenizer.encode_tensor(pixels):
        raise SystemExit("the raw door gives other codes than encode(): no timing of a wrong result")

    with torch.no_grad():
        features = torch.cat([tokenizer.backbone(p[None]) for p in pixels])
        keep = dyntok.KeepPolicy()(tokenizer.selector(features, tokenizer.grid))
        rows = list(zip(features.split(1), keep.split(1), strict=True))
        merged = [tokenizer.merger(f, k) for f, k in rows]
        projected = [tokenizer.projection(m) for m in merged]
        stages = {
            "encode, all": lambda: tokenizer.encode(files),
            "  decode JPEG and resize": lambda: [to_pixels(file, tokenizer.config.image) for file in files],
            "  backbone": lambda: [tokenizer.backbone(p[None]) for p in pixels],
            "  selector": lambda: [tokenizer.selector(f, tokenizer.grid) for f, _ in rows],
            "  merger": lambda: [tokenizer.merger(f, k) for f, k in rows],
            "  projection": lambda: [tokenizer.projection(m) for m in merged],
            "  code search": lambda: [tokenizer.codebook(p) for p in projected],
            "backbone, 32 at once": lambda: [tokenizer.backbone(p) for p in pixels.split(32)],
            "decode to images": lambda: tokenizer.decode(alone),
        }
        timed = {name: seconds(work) for name, work in stages.items()}

    row = {
        **environment(), "images": len(files),
        "tokens": alone.num_tokens / len(files), "fingerprint": tokenizer.fingerprint,
        "ms_per_image": {name.strip(): round(1e3 * median / len(files), 3) for name, (median, _) in timed.items()},
        "spread_ms": {name.strip(): round(1e3 * spread / len(files), 3) for name, (_, spread) in timed.items()},
    }  # fmt: skip
    for name, (median, spread) in timed.items():
        each = 1e3 / len(files)
        print(
            f"{name:<28}{each * median:8.2f} ms/image  +- {each * spread / 2:.2f}  {len(files) / median:8.1f} images/s"
        )
    append(options.output, row)


if __name__ == "__main__":
    main()
