"""The promise "same image, same codes", for any batch, order, process or run (float32 on a CPU)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import dyntok
from dyntok.loading import BUNDLED
from dyntok.training.sources import find_samples

PHOTOGRAPHS = 208

# Prints, for every photograph of a folder, all results that differ: one for each, if the promise is kept.
ENCODE = """
import json, random, sys
from pathlib import Path
import dyntok

model, folder, seed, *sizes = sys.argv[1:]
tokenizer = dyntok.load(model)
results = {path: [] for path in sorted(Path(folder).iterdir())}
for size in map(int, sizes):
    paths = list(results)
    random.Random(int(seed) + size).shuffle(paths)
    for start in range(0, len(paths), size):
        encoding = tokenizer.encode(paths[start : start + size])
        for path, codes, positions in zip(paths[start:], encoding.codes, encoding.positions):
            result = [codes.tolist(), positions.tolist()]
            if result not in results[path]:
                results[path].append(result)
print(json.dumps({path.name: found for path, found in results.items()}))
"""


def encode(model, folder, seed, *sizes):
    """In a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", ENCODE, model, folder, seed, *sizes]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def check(one, other):
    assert [name for name, found in one.items() if len(found) != 1 or found != other[name]] == []
    lengths = [len(codes) for ((codes, _),) in one.values()]
    assert len(set(lengths)) > 5  # else batch mates of other lengths were not tried
    assert len({code for ((codes, _),) in one.values() for code in codes}) > 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The bundled tokenizer; where it is not there, one of its size with random weights."""
    if (BUNDLED / "model.safetensors").exists():
        return BUNDLED
    torch.manual_seed(0)
    tokenizer = dyntok.DynamicVisualTokenizer(dyntok.TokenizerConfig.preset("tiny"))
    with torch.no_grad():
        tokenizer.selector.head.weight.mul_(30)
        tokenizer.selector.head.bias.zero_()
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = os.environ.get("DYNTOK_DATA")
    if not root or not (Path(root) / "photos").is_dir():
        pytest.skip("DYNTOK_DATA names no folder with photos")
    samples = find_samples([Path(root) / "photos"])
    folder = tmp_path_factory.mktemp("photographs")
    for i in range(PHOTOGRAPHS):
        (folder / f"{i}.jpg").write_bytes(samples[i * len(samples) // PHOTOGRAPHS].read())
    return folder


@pytest.mark.slow
def test_two_hundred_photographs(model, folder):
    one = encode(model, folder, 1, 1, 8)
    assert len(one) == PHOTOGRAPHS
    check(one, encode(model, folder, 2, 3, 32))


def test_a_few_photographs(checkpoint_folder, photos, tmp_path):
    for i, photo in enumerate(photos):
        for j, box in enumerate([None, (0, 0, 150, 150), (40, 20, 140, 140)]):
            Image.fromarray(photo).resize((100, 90), box=box).save(tmp_path / f"{i}-{j}.png")
    found = encode(checkpoint_folder, tmp_path, 1, 1, 3, 8)
    encoding = dyntok.load(checkpoint_folder).encode(tmp_path / name for name in found)
    pairs = zip(encoding.codes, encoding.positions, strict=True)
    check(
        found,
        {name: [[codes.tolist(), positions.tolist()]] for name, (codes, positions) in zip(found, pairs, strict=True)},
    )


def test_the_number_of_threads_does_not_matter(model, photos):
    tokenizer, threads = dyntok.load(model), torch.get_num_threads()
    images = [
        Image.fromarray(photo).crop(box)
        for photo in photos
        for box in [(0, 0, 150, 150), (20, 10, 90, 80), (50, 0, 150, 120)]
    ]
    encodings = []
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            encodings.append(tokenizer.encode(images))
    finally:
        torch.set_num_threads(threads)
    assert encodings[0] == encodings[1] == encodings[2] and len(set(encodings[0].lengths.tolist())) > 5


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_any_batch_and_any_place_in_it(dtype, checkpoint_folder, photos):
    """On a GPU, with `batch_invariant`: tests/test_on_gpu.py."""
    tokenizer = dyntok.load(checkpoint_folder, dtype=dtype)
    images = [Image.fromarray(photo).crop(box) for photo in photos for box in [(0, 0, 150, 150), (20, 10, 90, 80)]]
    alone = [tokenizer.encode(image) for image in images]
    assert len({encoding.num_tokens for encoding in alone}) > 1
    for size in (2, len(images)):
        for shift in range(2):
            order = [(i + shift) % len(images) for i in range(len(images))]
            found = tokenizer.encode([images[i] for i in order], batch_size=size)
            assert all(row == alone[i] for row, i in zip(found, order, strict=True))


def test_every_image_is_computed_alone(tokenizer, photos):
    """Rounding rarely differs between batch shapes, so the comparisons above might miss images computed together."""
    shapes = []
    tokenizer.backbone.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    tokenizer.encode(photos)
    tokenizer.encode_tensor(torch.zeros(5, 3, 64, 64))
    assert shapes == [(1, 3, 64, 64)] * (len(photos) + 5)
