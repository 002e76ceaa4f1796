"""Compare `dyntok batch` with the ideal of this machine: decoding alone and encoding alone, each with all cores.

    python benchmarks/batch.py TAR... [--options "--workers 1"] [--output benchmarks/results/batch.jsonl]
    python benchmarks/batch.py --camera 24 [--output ...]    full against scaled decoding of generated camera files
    python benchmarks/batch.py TAR... --before CHECKOUT [--options "--model tiny"]    this version against another

The ideal is 1 / (1 / decoding alone + 1 / encoding alone), both measured in this process before and after the run. The
memory is that of the command's whole process tree without program files (Linux). A second run on the first 2,000 rows
shows whether memory grows with the number of images.

With --camera, N generated JPEG files of 4,000 x 3,000 pixels are encoded twice, with full and with scaled decoding, 125
files after 125. With --before, two versions encode every tar, each with its own defaults and with --options for this
one alone, and take turns at going first. "faster" is the median of the turns. The images/s are the command's own, so
they leave out starting Python and loading the model.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from decoding import WAYS, camera_jpegs
from timing import append, environment

import dyntok
from dyntok.batch import BatchOptions
from dyntok.batch.engines.decoding import DecodeJob, decode_chunks
from dyntok.batch.engines.rows import Work
from dyntok.batch.engines.stages import DecodeOptions, chunked, encode, read
from dyntok.batch.inputs.open import open_input
from dyntok.chunks import batched

_FEW = 2000
_TURN = 125  # files that are encoded in both ways before the next ones are generated
_SUMMED = ("images", "seconds", "errors")
_DECODING_WORKERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tars", nargs="*")
    parser.add_argument("--camera", type=int, metavar="N", help="generate N files, in place of tars")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="another version, to compare with")
    parser.add_argument("--rows", type=int, default=800, help="for decoding alone and encoding alone")
    parser.add_argument("--options", default="", help="of `dyntok batch`, such as '--workers 0'")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if bool(options.tars) == bool(options.camera) or (options.camera and options.before):
        parser.error("name tars, with or without --before, or give --camera N")
    if options.camera:
        row = camera(options.camera, options.options)
    else:
        row = versions(options) if options.before else compare(options)
    print(json.dumps(row, indent=1))
    append(options.output, row)


def camera(count: int, options: str) -> dict[str, Any]:
    """Images/s of full and of scaled decoding, by turns, and how many times faster the second one is in each turn."""
    size = (4000, 3000)
    turns: list[dict[str, dict[str, float]]] = []
    for files in batched(camera_jpegs(count, *size), _TURN):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "in"
            source.mkdir()
            for number, file in enumerate(files):
                (source / f"{number:06d}.jpg").write_bytes(file)
            turns.append({way: batch([str(source), f"{folder}/{way}"], f"--decoding {way} {options}") for way in WAYS})
    total = {way: {name: sum(turn[way][name] for turn in turns) for name in _SUMMED} for way in WAYS}
    speed = {way: sums["images"] / sums["seconds"] for way, sums in total.items()}
    ratios = [turn["full"]["seconds"] / turn["scaled"]["seconds"] for turn in turns]
    return {
        **environment(), "tokenizer": dyntok.load().name, "camera": count, "size": size, "options": options,
        "errors": [sums["errors"] for sums in total.values()], "images_per_s": speed,
        "faster": statistics.median(ratios), "faster_in_turns": ratios,
        "tree_peak_mib": [max(turn[way]["peak_mib"] for turn in turns) for way in WAYS],
    }  # fmt: skip


def versions(options: argparse.Namespace) -> dict[str, Any]:
    """Images/s and memory of this version and of another, tar by tar."""
    turns: list[dict[str, dict[str, float]]] = []
    for number, tar in enumerate(str(Path(tar).absolute()) for tar in options.tars):
        given = {"before": ("", options.before.absolute()), "now": (options.options, None)}
        order = sorted(given, reverse=number % 2 == 1)
        with tempfile.TemporaryDirectory() as folder:
            turns.append({name: batch([tar, f"{folder}/{name}"], *given[name]) for name in order})
        print(json.dumps({"tar": Path(tar).name, **turns[-1]}), file=sys.stderr, flush=True)
    total = {name: {key: sum(turn[name][key] for turn in turns) for key in _SUMMED} for name in turns[0]}
    ratios = [turn["before"]["seconds"] / turn["now"]["seconds"] for turn in turns]
    return {
        **environment(), "options": options.options,
        "images": {name: sums["images"] for name, sums in total.items()},
        "errors": {name: sums["errors"] for name, sums in total.items()},
        "images_per_s": {name: sums["images"] / sums["seconds"] for name, sums in total.items()},
        "faster": statistics.median(ratios), "faster_in_turns": ratios,
        "tree_peak_mib": {name: max(turn[name]["peak_mib"] for turn in turns) for name in total},
    }  # fmt: skip


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """The command beside decoding alone and encoding alone."""
    tokenizer = dyntok.load()
    with tempfile.TemporaryDirectory() as folder:
        before = alone(tokenizer, options.tars, options.rows)
        run = batch([*options.tars, f"{folder}/all"], options.options)
        after = alone(tokenizer, options.tars, options.rows)
        few = batch([cut(options.tars[0], Path(folder) / "few.tar"), f"{folder}/few"], options.options)
    decoding, encoding = ((a + b) / 2 for a, b in zip(before, after, strict=True))
    ideal = 1 / (1 / decoding + 1 / encoding)
    speed = run["images"] / run["seconds"]
    return {
        **environment(), "images": run["images"], "errors": run["errors"], "options": options.options,
        "decoding_alone": [before[0], after[0]], "encoding_alone": [before[1], after[1]],
        "ideal": ideal, "batch": speed,
        "share_of_ideal": speed / ideal, "share_with_start": run["images"] / run["wall"] / ideal,
        "tree_peak_mib": run["peak_mib"], f"tree_peak_mib_{_FEW}": few["peak_mib"],
        "tokens": run["tokens"], "bytes": run["bytes"],
    }  # fmt: skip


def alone(tokenizer: dyntok.DynamicVisualTokenizer, tars: list[str], rows: int) -> tuple[float, float]:
    """Images/s of decoding alone, and of encoding alone."""
    options = BatchOptions()
    source = open_input(tars, options, {})
    work = (Work(shard, 0, shard.begin) for shard in source.shards())
    chunks = chunked((row for some in work for row in read(source, some, options.shard_size)), 32)
    job = DecodeJob(source, DecodeOptions.of(tokenizer, options), time_limit=60.0)
    stream = decode_chunks(chunks, job, _DECODING_WORKERS)
    kept = [next(stream)]  # the processes have started
    start, count = time.perf_counter(), 0
    for some in stream:
        count += len(some.rows)
        kept = (kept + [some])[: rows // 32 + 1]
        if count >= 5 * rows:
            break
    decoding = count / (time.perf_counter() - start)
    stream.close()
    encode(kept[0], tokenizer, options)
    start, count = time.perf_counter(), 0
    for some in kept[1:]:
        encode(some, tokenizer, options)
        count += len(some.rows)
    return decoding, count / (time.perf_counter() - start)


def batch(arguments: list[str], options: str, checkout: Path | None = None) -> dict[str, float]:
    """The command's own summary, its seconds on the clock, and the peak memory of its process tree.

    checkout: of another version, whose command runs.
    """
    start = time.perf_counter()
    command = [sys.executable, "-m", "dyntok.cli", "batch", *arguments, "--json", *options.split()]
    path = {} if checkout is None else {"PYTHONPATH": f"{checkout}{os.pathsep}{checkout / 'kernels'}"}
    # the folder it runs in comes before all others on Python's path
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=checkout, env={**os.environ, **path})
    peak = [0]
    threading.Thread(target=watch, args=(process.pid, peak, lambda: process.returncode is None), daemon=True).start()
    out, _ = process.communicate()
    if process.returncode not in (0, 3):
        raise SystemExit(f"the command failed with {process.returncode}: no figures of a failed run")
    return {**json.loads(out), "wall": time.perf_counter() - start, "peak_mib": round(peak[0] / 1024)}


def watch(pid: int, peak: list[int], running: Callable[[], bool]) -> None:
    while running():
        peak[0] = max(peak[0], sum(memory(process) for process in tree(pid)))
        time.sleep(0.5)


def tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(process for child in children for process in tree(int(child)))]


def memory(pid: int) -> int:
    """Returns anonymous memory and the share of shared memory, in KiB. Program files do not count."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def cut(tar: str, target: Path) -> str:
    """Its first samples."""
    keys: set[str] = set()
    with tarfile.open(tar) as source, tarfile.open(target, "w") as small:
        for member in source:
            keys.add(member.name.partition(".")[0])
            if len(keys) > _FEW:
                break
            small.addfile(member, source.extractfile(member))
    return str(target)


if __name__ == "__main__":
    main()
