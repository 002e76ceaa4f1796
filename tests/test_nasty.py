"""Several hundred awkward and broken files, one at a time and mixed: read or refused with `ImageError`, no crash, no
hang, at most 2 GB.

Needs the folder `nasty` in the one that DYNTOK_DATA names.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import dyntok.image

SECONDS, MEGABYTES = 10, 2000

# The kernel's count for a process starts with the peak of the one that started it; that of its memory map does not.
PEAK = """
from pathlib import Path

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])  # kilobytes
"""

# In a process of its own, since a file may crash it or run it out of memory. The watchdog ends it when one file takes
# too long.
READ_ALL = (
    PEAK
    + """
import faulthandler, json, sys

from dyntok.config import ImageConfig
from dyntok.errors import ImageError
from dyntok.image import to_pixels

for path in sorted(Path(sys.argv[1]).iterdir()):
    faulthandler.dump_traceback_later(int(sys.argv[2]), exit=True)
    outcomes = []
    for resize in ("crop", "squash"):
        try:
            pixels = to_pixels(path, ImageConfig(img_size=128, resize=resize)).numpy()
            outcomes.append("read" if pixels.shape == (3, 128, 128) and abs(pixels).max() <= 1 else "wrong pixels")
        except ImageError as error:
            outcomes.append("refused" if str(error).startswith(str(path)) else f"unnamed: {error}")
        except Exception as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    faulthandler.cancel_dump_traceback_later()
    kilobytes = peak()
    print(json.dumps([path.name, outcomes, kilobytes / 1000]), flush=True)
"""
)

# The same through `encode`: alone, where a bad file must raise, and in batches with a good photograph at both ends and
# in the middle.
ENCODE_ALL = (
    PEAK
    + """
import faulthandler, json, sys

import dyntok

model, good, folder, seconds = sys.argv[1:]
tokenizer = dyntok.load(model)
wanted = tokenizer.encode(good)

def watched(inputs):
    for source in inputs:
        faulthandler.dump_traceback_later(int(seconds), exit=True)
        yield source
    faulthandler.cancel_dump_traceback_later()

def alone(path):
    try:
        return tokenizer.encode(watched([path]))
    except dyntok.ImageError as error:
        return str(error)

paths = sorted(Path(folder).iterdir())
for start in range(0, len(paths), 12):
    batch = [good, *paths[start : start + 6], good, *paths[start + 6 : start + 12], good]
    encoding = tokenizer.encode(watched(batch), errors="skip")
    found = dict(zip(encoding.source_index.tolist(), encoding)) | {i: str(error) for i, error in encoding.failures}
    for i, source in enumerate(batch):
        expected = wanted if source is good else alone(source)
        same = type(found[i]) is type(expected) and found[i] == expected
        outcome = "good" if source is good else "read" if isinstance(expected, dyntok.Encoding) else "refused"
        outcome = outcome if same else f"{expected} alone, {found[i]} in a batch"
        kilobytes = peak()
        print(json.dumps([Path(source).name, outcome, kilobytes / 1000]), flush=True)
"""
)


@pytest.fixture(scope="module")
def folder():
    root = os.environ.get("DYNTOK_DATA")
    if not root:
        pytest.skip("DYNTOK_DATA names no folder with test data")
    if not (Path(root) / "nasty").is_dir():
        pytest.skip("there is no folder 'nasty' in the one that DYNTOK_DATA names")
    return Path(root).resolve() / "nasty"


def run(*arguments):
    """Python in a process of its own, and the JSON of its lines."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)
    return done, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def results(folder):
    """(name, outcomes for crop and squash, peak memory so far in MB) of every file."""
    done, lines = run("-W", "error", "-c", READ_ALL, folder, SECONDS)
    names = sorted(path.name for path in folder.iterdir())
    at = names[len(lines)] if len(lines) < len(names) else "the end"
    assert done.returncode == 0, f"ended with {done.returncode} at {at}: {done.stderr[-2000:]}"
    assert sorted(name for name, _, _ in lines) == names
    return lines


def test_each_is_read_or_refused(results):
    surprises = [
        (name, outcomes) for name, outcomes, _ in results if outcomes not in (["read", "read"], ["refused", "refused"])
    ]
    assert not surprises


def test_memory_stays_below_two_gigabytes(results):
    assert max(megabytes for _, _, megabytes in results) < MEGABYTES


def test_good_files_are_read_and_bad_ones_are_not(results):
    read = {name for name, outcomes, _ in results if outcomes[0] == "read"}
    refused = {name for name, _, _ in results} - read
    assert len(read) > len(results) / 2
    assert {name for name in refused if name.startswith("exif-orientation") and name.endswith(".jpg")} == set()
    programs = (".eps", ".wmf", ".psd", ".doc", ".h5", ".pkl", ".fli", ".tga", ".dds")
    assert {name for name in read if name.endswith(programs)} == set()
    assert {
        name for name in read if "crash-" in name or "decompression_bomb.gif" in name or "Bad_reallybig" in name
    } == set()


@pytest.mark.parametrize("kind", ["Landscape", "Portrait"])
def test_all_orientations_show_the_same_picture(folder, kind):
    """They differ in JPEG noise and in the digit that each shows in its middle."""
    pictures = [
        dyntok.image.load_image(folder / f"exif-orientation__{kind}_{k}.jpg").resize((30, 30)).tobytes()
        for k in range(9)
    ]
    for k, picture in enumerate(pictures):
        assert sum(abs(a - b) for a, b in zip(picture, pictures[1], strict=True)) / len(picture) < 4, k


def test_encode_takes_them_one_at_a_time_and_mixed(folder, results, checkpoint_folder, photos, tmp_path):
    good = tmp_path / "good photograph.png"
    Image.fromarray(photos[2]).save(good)
    done, lines = run("-c", ENCODE_ALL, checkpoint_folder, good, folder, SECONDS)
    last = lines[-1][0] if lines else "nothing"
    assert done.returncode == 0, f"ended with {done.returncode} after {last}: {done.stderr[-2000:]}"
    outcomes = {name: outcomes[0] for name, outcomes, _ in results} | {good.name: "good"}
    assert [line for line in lines if line[1] != outcomes[line[0]]] == []
    assert {name for name, _, _ in lines} == set(outcomes) and sum(name == good.name for name, _, _ in lines) > 100
    assert max(megabytes for _, _, megabytes in lines) < MEGABYTES
