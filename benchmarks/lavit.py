"""Measure LaVIT's tokenizer: how often packed and exact mode give equal codes, and time and memory at full size.

    python benchmarks/lavit.py agreement FIXTURE [--output FILE]
        FIXTURE is a parity fixture (tests/fixtures/lavit_parity_a.safetensors)
    python benchmarks/lavit.py full [--folder FOLDER] [--output FILE]
        first writes 3.7 GB to FOLDER unless they are there
    python benchmarks/lavit.py half [--output FILE]
        what bf16 and fp16 change in the codes of the bundled tokenizer (trained weights)
    python benchmarks/lavit.py merger [--images 4] [--output FILE]
        packed against exact: 12 blocks, width 1408, a third kept

`agreement` uses the folder `photos/` of `DYNTOK_DATA`, or scikit-image's photographs if the variable is not set.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from timing import append, environment, seconds

import dyntok
from dyntok.image import to_pixels
from dyntok.lavit.release import FILES
from dyntok.model.codebook import Codebook
from dyntok.model.merger import build_merger

FACTORS = (1, 3, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", choices=["agreement", "full", "run", "half", "merger"], help="run: the measured part of full"
    )
    parser.add_argument("fixture", nargs="?", type=Path)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "dyntok-lavit-random")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    row = {"agreement": agreement, "full": full, "run": run, "half": half, "merger": merger}[options.what](options)
    print(json.dumps(row))
    if options.what != "run":
        append(options.output, {"what": options.what, **environment(), **row})


def load_fixture(path: Path, folder: Path) -> dyntok.DynamicVisualTokenizer:
    """The fixture's networks, through files in the released layout."""
    with safe_open(path, "pt") as file:
        names, config = list(file.keys()), json.loads(file.metadata()["config"])
        for place in FILES.values():
            prefix = Path(place).name + "/"
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            torch.save(
                {n.removeprefix(prefix): file.get_tensor(n) for n in names if n.startswith(prefix)}, folder / place
            )
    return dyntok.load(folder, config=config)


def photographs(count: int) -> list:
    if "DYNTOK_DATA" in os.environ:
        from dyntok.training.sources import find_samples

        samples = find_samples([Path(os.environ["DYNTOK_DATA"]) / "photos"])
        return [samples[i * len(samples) // count].read() for i in range(count)]
    from skimage import data

    return [data.astronaut(), data.coffee(), data.cat(), data.rocket()]


def agreement(options: argparse.Namespace) -> dict:
    """Share of equal codes with the logits of both attentions as they are and several times as large."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_fixture(options.fixture, Path(folder))
    pixels = torch.stack([to_pixels(photo, tokenizer.config.image) for photo in photographs(200)])
    width = tokenizer.backbone.embed_dim
    queries = [
        (layer.weight[:width], layer.bias[:width])
        for b in tokenizer.merger.blocks
        for layer in (b.self_qkv, b.cross_query)
    ]
    scaled, shares = 1, {}
    for factor in FACTORS:
        with torch.no_grad():
            for tensor in (t for pair in queries for t in pair):
                tensor.mul_(factor / scaled)
        scaled = factor
        packed, exact = (tokenizer.encode_tensor(pixels, lavit_softmax=mode) for mode in (False, True))
        shares[f"x{factor}"] = float((packed.packed_codes == exact.packed_codes).double().mean())
    return {"images": len(pixels), "tokens": packed.num_tokens, "equal_codes": shares}


def full(options: argparse.Namespace) -> dict:
    """Random weights of the released sizes on disk as fp16, then loaded as float32 in a process of its own."""
    if not (options.folder / "config.json").exists():
        tokenizer = dyntok.DynamicVisualTokenizer(dyntok.TokenizerConfig.preset("lavit"))
        tokenizer.save_pretrained(options.folder, dtype=torch.float16)
        del tokenizer
    command = [sys.executable, __file__, "run", "--folder", str(options.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(options: argparse.Namespace) -> dict:
    marks = [time.perf_counter()]

    def mark() -> float:
        marks.append(time.perf_counter())
        return round(marks[-1] - marks[-2], 2)

    tokenizer = dyntok.load(options.folder)
    loading = mark()
    fingerprint = tokenizer.fingerprint
    hashing = mark()
    encoding = tokenizer.encode(Path(dyntok.__file__).parent / "assets" / "astronaut.jpg", budget=1 / 3)
    encode = mark()
    features = tokenizer.decode_to_features(encoding)
    decode = mark()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    timed = {"load": loading, "fingerprint": hashing, "encode": encode, "decode_to_features": decode}
    return {
        "seconds": timed,
        "peak_gib": round(peak, 2),
        "tokens": encoding.num_tokens,
        "features": list(features.shape),
        "fingerprint": fingerprint,
    }


def half(options: argparse.Namespace) -> dict:
    """Returns the shares of patches that half precision keeps as float32 does, and of equal codes among those."""
    photos = photographs(100)
    tokenizer = dyntok.load()

    def by_position(row: dyntok.Encoding) -> dict[int, int]:
        return dict(zip(row.packed_positions.tolist(), row.packed_codes.tolist(), strict=True))

    whole = [by_position(row) for row in tokenizer.encode(photos)]
    shares = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        rows = dyntok.load(dtype=dtype).encode(photos)
        pairs = list(zip(whole, map(by_position, rows), strict=True))
        both = [(old[p], new[p]) for old, new in pairs for p in old.keys() & new.keys()]
        total = sum(map(len, whole))
        shares[name] = {
            "kept_too": round(len(both) / total, 4),
            "same_code": round(sum(a == b for a, b in both) / len(both), 4),
        }
    return {"images": len(photos), "tokens": sum(map(len, whole)), **shares}


@torch.no_grad()
def merger(options: argparse.Namespace) -> dict:
    """The merger at LaVIT's size, packed against the released formula over all rows; codes of both, then times."""
    torch.manual_seed(0)
    config = dyntok.TokenizerConfig.preset("lavit")
    network = build_merger(1408, config.merger).eval()
    projection = torch.nn.Sequential(torch.nn.Linear(1408, 1408), torch.nn.Tanh(), torch.nn.Linear(1408, 32))
    codebook = Codebook(config.codebook.size, config.codebook.dim)
    features = torch.randn(options.images, 256, 1408)
    order = torch.rand(options.images, 256).argsort(1).argsort(1)
    keep = order < 85
    packed, exact = network(features, keep), network(features, keep, exact=True)
    error = float((packed - exact).norm() / exact.norm())
    equal = float((codebook(projection(packed)) == codebook(projection(exact))).double().mean())
    if error > 1e-3:
        raise SystemExit(f"packed and exact differ by {error:.2g}: no timing of a wrong result")
    timed = {
        name: seconds(lambda mode=mode: network(features, keep, exact=mode), 3)
        for name, mode in (("packed", False), ("exact", True))
    }
    return {"images": options.images, "kept": 85, "relative_error": error, "equal_codes": equal,
            "seconds": {name: round(median, 3) for name, (median, _) in timed.items()},
            "spread": {name: round(spread, 3) for name, (_, spread) in timed.items()},
            "ratio": round(timed["exact"][0] / timed["packed"][0], 2)}  # fmt: skip


if __name__ == "__main__":
    main()
