"""Compare `dyntok batch` with the ideal of this machine: decoding alone and encoding alone, each with all cores.

    python benchmarks/batch.py TAR... [--options "--workers 1"] [--output benchmarks/results/batch.jsonl]
    python benchmarks/batch.py --camera 24 [--output ...]    full against scaled decoding of generated camera files

The ideal is 1 / (1 / decoding alone + 1 / encoding alone), both measured in this process before and after the run. The
memory is that of the command's whole process tree without program files (Linux). A second run on the first 2,000 rows
shows whether memory grows with the number of images.

With --camera, N generated JPEG files of 4,000 x 3,000 pixels are encoded twice, with full and with scaled decoding, 125
files after 125. "faster" is the median of these turns. The images/s are the command's own, so they leave out
starting Python and loading the model.
"""

import argparse
import json
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
    parser.add_argument("--rows", type=int, default=800, help="for decoding alone and encoding alone")
    parser.add_argument("--options", default="", help="of `dyntok batch`, such as '--workers 0'")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if bool(options.tars) == bool(options.camera):
        parser.error("name tars, or give --camera N")
    row = camera(options.camera, options.options) if options.camera else compare(options)
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


def batch(arguments: list[str], options: str) -> dict[str, float]:
    """The command's own summary, its seconds on the clock, and the peak memory of its process tree."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "dyntok.cli", "batch", *arguments, "--json", *options.split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
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
