"""Measure the figures of docs/quality.md that `ids.py` and `table.py` do not: recognition, neighbors, lengths, cost.

    DYNTOK_DATA=... python benchmarks/figures.py [--model NAME] [--only NAME...] [--limit N] [--refine N] \
        [--teacher NAME=FILE...] [--output benchmarks/results/figures.jsonl]

`DYNTOK_DATA` is a folder with `photos/` (webdataset tars whose `cls.txt` is an ImageNet class) and
`teacher/mobilenetv2_100_imagenet.safetensors`. Only the validation part is measured. A teacher is a timm classifier and
a safetensors file of its weights; every one is asked. Sections, each a line of JSON or several:

    recognition  squares at 100 and 160 ids: map with its positions, from ids alone, an even lattice of as many ids;
                 without --refine also the map with the vectors before the codebook; and a lattice of 85 codes, as
                 lists of integers
    neighbors    kNN by pooled codes against kNN by pixels, squares at 100 ids
    lengths      learned lengths: mean, deviation, rank correlation with the size as a JPEG
    memory       peak of a process that encodes and decodes a photograph at 4,096 patches (Linux)
    speed        `encode` of one photograph at 256 patches against `tiny`, by turns in one process
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import append, environment

import dyntok
from dyntok.image import to_pixels
from dyntok.training.classifier import Classifier, load_classifier
from dyntok.training.evaluate import evaluate
from dyntok.training.metrics import psnr
from dyntok.training.recipe import Teacher
from dyntok.training.sources import ImageSample, find_samples, spread

KEYS = "imagenette-"
HEADER = 16  # map tokens of a square of 16 x 16 patches
MEMORY = """
import dyntok
tok = dyntok.load({model!r})
photo = dyntok.example_image().resize((512, 512))
tok.decode(tok.encode(photo, max_patches=4096))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
# MobileNetV2's weights want RGB in -1 to 1
OPTIONS = {"mobilenetv2_100": {"pad_type": "same", "pretrained_cfg_overlay": {"mean": [0.5] * 3, "std": [0.5] * 3}}}


class Figures:
    """The sections; each yields rows of results."""

    def __init__(self, tok: dyntok.DynamicVisualTokenizer, limit: int | None, teachers: list[str], refine: int) -> None:
        data = Path(os.environ["DYNTOK_DATA"])
        self.tok, self.limit, self.data, self.refine = tok, limit, data, refine
        files = dict(teacher.split("=", 1) for teacher in teachers)
        files.setdefault("mobilenetv2_100", str(data / "teacher" / "mobilenetv2_100_imagenet.safetensors"))
        self.teachers = {
            name: load_classifier(Teacher(name, weights=file, kwargs=OPTIONS.get(name, {})))
            for name, file in files.items()
        }

    def samples(self, part: str, prefix: str = "") -> list[ImageSample]:
        return [sample for sample in find_samples([self.data / "photos"], part) if sample.key.startswith(prefix)]

    def recognition(self) -> Iterator[dict]:
        tok, every = self.tok, self.samples("validation", KEYS)
        samples = spread(every, self.limit)
        config = tok.image_config(fit="crop")
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
        pixels = torch.stack([to_pixels(sample.read(), config) for sample in samples])
        originals = (pixels * std + mean).clamp(0, 1)
        judges = {name: Classifier(model, [s.label for s in every]) for name, model in self.teachers.items()}

        def judged(images: torch.Tensor) -> dict[str, float]:
            found = {}
            for name, judge in judges.items():
                guesses = [guess for part in images.split(32) for guess in judge(part)[1]]
                right = sum(guess == sample.label for guess, sample in zip(guesses, samples, strict=True))
                found[name] = right / len(samples)
            return found

        def painted(codes: dyntok.Encoding | list) -> torch.Tensor:
            rows = [codes[i : i + 32] for i in range(0, len(samples), 32)]
            return (torch.cat([tok.decode_to_pixels(some) for some in rows]) * std + mean).clamp(0, 1)

        @torch.inference_mode()
        def unrounded(features: dyntok.Features) -> torch.Tensor:
            images, places = [], features.positions.split(features.lengths.tolist())
            for tokens, positions in zip(features.split(), places, strict=True):
                vectors = F.normalize(tok.projection(tokens).float(), dim=-1)  # as the codebook compares them
                limits = torch.tensor([0, len(vectors)], dtype=torch.int32)
                images.append(tok.pixel_head(tok.decoder(vectors, limits, positions, grid=tok.grid), tok.grid))
            return (torch.cat(images) * std + mean).clamp(0, 1)

        yield {"form": "originals", "images": len(samples), "recognized": judged(originals)}
        for ids in (100, 160):
            encoding = tok.encode_tensor(pixels, budget=ids - HEADER, places="map", refine=self.refine)
            vocab = dyntok.VisualVocab.of(tok, after=0, layout="map")
            alone = vocab.to_encoding(vocab.to_ids(encoding))
            even = tok.encode_tensor(pixels, budget=ids, places="lattice", refine=self.refine)
            forms = {
                "map, with positions": painted(encoding),
                "map, from ids": painted(alone),
                "lattice": painted(even),
            }
            if not self.refine:  # which concerns codes alone
                features = tok.features_tensor(pixels, budget=ids - HEADER, places="map")
                forms["map, before the codebook"] = unrounded(features)
            for form, images in forms.items():
                quality = float(psnr(images, originals).mean())
                yield {"form": form, "ids": ids, "psnr": quality, "recognized": judged(images)}
        bare = tok.encode_tensor(pixels, budget=85, places="lattice", refine=self.refine)
        images = painted([row.tolist() for row in bare.codes])
        yield {
            "form": "codes alone",
            "ids": 85,
            "psnr": float(psnr(images, originals).mean()),
            "recognized": judged(images),
        }

    def neighbors(self) -> Iterator[dict]:
        report = evaluate(
            self.tok, self.samples("validation", KEYS), policy={"budget": 100 - HEADER}, fit="crop", limit=self.limit,
            probe_samples=self.samples("train", KEYS), probe_prefix=KEYS,
        )  # fmt: skip
        yield report.to_dict()["probe"]

    def lengths(self) -> Iterator[dict]:
        report = evaluate(self.tok, self.samples("validation"), limit=self.limit)
        yield {"images": report.images, "jpeg_correlation": report.jpeg_correlation, **report.to_dict()["tokens"]}

    def memory(self) -> Iterator[dict]:
        program = MEMORY.format(model=str(self.tok.name))
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        yield {"patches": 4096, "peak_mb": round(int(done.stdout) * 1024 / 1e6)}

    def speed(self) -> Iterator[dict]:
        photo, both = dyntok.example_image(), (self.tok, dyntok.load("tiny"))
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(40):
            for tok, found in zip(both, times, strict=True):
                began = time.process_time()
                tok.encode(photo)
                found.append(time.process_time() - began)
        ours, tiny = (statistics.median(found[5:]) for found in times)
        yield {"ms": round(1e3 * ours, 2), "tiny_ms": round(1e3 * tiny, 2), "ratio": round(ours / tiny, 3)}


SECTIONS = ("recognition", "neighbors", "lengths", "memory", "speed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="NAME")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--refine", type=int, default=0, help="of `encode`, for recognition")
    parser.add_argument("--teacher", nargs="+", default=[], metavar="NAME=FILE")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    tok = dyntok.load(options.model)
    figures = Figures(tok, options.limit, options.teacher, options.refine)
    for section in options.only:
        for result in getattr(figures, section)():
            row = {"model": tok.name, "fingerprint": tok.fingerprint, "figure": section, **result}
            if options.refine and section == "recognition":
                row["refine"] = options.refine
            print(json.dumps(row), flush=True)
            append(options.output, {**environment(), **row})


if __name__ == "__main__":
    main()
