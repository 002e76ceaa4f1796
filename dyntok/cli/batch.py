"""The commands `dyntok batch` and `dyntok inspect`. Nothing of the extra `batch` is imported before one of them runs."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from dyntok.errors import BatchError, ConfigError, DyntokError
from dyntok.image import DEFAULT_MAX_PIXELS

if TYPE_CHECKING:
    from dyntok.batch import Summary

OK, SOME_SKIPPED = 0, 3


def add_commands(
    commands: argparse._SubParsersAction, budget: Callable[[str], int | float], whole: Callable[[int, int], Callable]
) -> None:
    """`budget` and `whole` read numbers, as for the other commands."""
    positive = whole(1, 2**31)
    add = commands.add_parser("batch", help="whole datasets into codes; run again, it goes on where it stopped")
    add.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="folders, webdataset tars, Parquet, lists of paths (.txt); globs, {000..099}, s3://",
    )
    add.add_argument("output", metavar="OUTPUT", help="a new folder, or that of the same run begun before")
    add.add_argument("--model", metavar="NAME", help="hub name or folder of a tokenizer (default: the bundled one)")
    add.add_argument(
        "--dry-run", action="store_true", help="what would be read and written, from a sample; writes nothing"
    )
    add.add_argument("--json", action="store_true", help="for machines: JSON on stdout")

    what = add.add_argument_group("what is written")
    what.add_argument(
        "--kind",
        choices=["auto", "folder", "tar", "parquet", "list"],
        default="auto",
        help="of INPUT (default: by its names)",
    )
    what.add_argument(
        "--format", choices=["parquet", "webdataset", "megatron"], default="parquet", help="(default: %(default)s)"
    )
    what.add_argument(
        "--shard-size",
        type=positive,
        default=8192,
        metavar="N",
        help="images in an output shard, at most (default: %(default)s)",
    )
    what.add_argument(
        "--keep-columns",
        type=_names,
        default=[],
        metavar="NAME,...",
        help="extra columns to keep: columns of Parquet, or extensions such as txt",
    )
    what.add_argument("--image-column", metavar="NAME", help="of Parquet (default: the only one that holds images)")
    what.add_argument(
        "--key-column", metavar="NAME", help="of Parquet (default: key or __key__, else file name and row)"
    )
    what.add_argument("--interleaved", action="store_true", help="several images per row")
    one = what.add_mutually_exclusive_group()
    one.add_argument(
        "--budget", type=budget, metavar="N", help="exactly N tokens per image, or a share of the patches such as 0.25"
    )
    one.add_argument("--threshold", type=float, metavar="P", help="keep patches whose keep probability is at least P")
    what.add_argument("--max-tokens", type=positive, metavar="N", help="at most N tokens per image")
    what.add_argument(
        "--max-pixels",
        type=positive,
        default=DEFAULT_MAX_PIXELS,
        metavar="N",
        help="larger images are refused (default: %(default)s)",
    )
    what.add_argument(
        "--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="of most weights (default: %(default)s)"
    )
    what.add_argument(
        "--vocab-size",
        type=positive,
        metavar="N",
        help="megatron: entries of the LLM's vocabulary; codes come behind them",
    )

    how = add.add_argument_group("how the work is done, which changes no code")
    how.add_argument("--engine", choices=["local", "ray"], default="local", help="(default: %(default)s)")
    how.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="images at once (default: %(default)s)"
    )
    how.add_argument(
        "--workers",
        type=whole(0, 2**10),
        metavar="N",
        help="local: decoding processes (default: by the number of cores)",
    )
    how.add_argument(
        "--devices",
        type=_names,
        default=[],
        metavar="NAME,...",
        help="local: one model process each, cuda:0 cuda:1 (default: all GPUs, or cpu)",
    )
    how.add_argument("--threads", type=positive, metavar="N", help="of each model process on a CPU")
    how.add_argument(
        "--address", metavar="ADDRESS", help="ray: of a cluster, auto for this machine's (default: one of its own)"
    )
    how.add_argument(
        "--actors",
        type=positive,
        metavar="N",
        help="ray: copies of the tokenizer (default: one per GPU, or per two cores)",
    )
    how.add_argument("--storage-options", metavar="FILE", help='JSON for fsspec, {"s3": {"key": ...}}; copied nowhere')
    how.add_argument(
        "--max-error-rate", type=float, default=1.0, metavar="SHARE", help="stop when more images fail (default: never)"
    )
    how.add_argument("--retry-errors", action="store_true", help="only the images that failed before")
    add.set_defaults(run=_batch)

    add = commands.add_parser("inspect", help="what an output folder of batch holds: lengths, codes, errors, pictures")
    add.add_argument("folder", metavar="OUTPUT")
    add.add_argument("-o", "--output", metavar="FOLDER", help="write lengths.png, sheet.png and errors.jsonl there")
    add.add_argument(
        "--model", metavar="NAME", help="the tokenizer that made the codes, for sheet.png (default: the bundled one)"
    )
    add.add_argument("--images", type=positive, default=12, metavar="N", help="in sheet.png (default: %(default)s)")
    add.add_argument("--storage-options", metavar="FILE", help="as for batch")
    add.add_argument("--json", action="store_true", help="for machines: JSON on stdout")
    add.set_defaults(run=_inspect)


def _names(text: str) -> list[str]:
    return text.split(",")


def _batch(options: argparse.Namespace) -> int:
    from dyntok.batch import BatchOptions, EngineOptions, tokenize
    from dyntok.batch.dry_run import dry_run
    from dyntok.batch.run import prepare
    from dyntok.batch.storage import read_storage_options

    wanted = {name: getattr(options, name) for name in BatchOptions.__dataclass_fields__}
    engine = EngineOptions(
        options.engine, batch_size=options.batch_size, threads=options.threads, workers=options.workers, devices=options.devices,
        address=options.address, actors=options.actors,
    )  # fmt: skip
    about = {
        "model": options.model,
        "options": BatchOptions(**wanted),
        "storage": read_storage_options(options.storage_options),
    }
    if options.dry_run:
        found = dry_run(prepare(options.inputs, options.output, **about))
        print(json.dumps(found.to_dict()) if options.json else found)
        return OK
    progress = _Progress()
    choices = {"retry_errors": options.retry_errors, "max_error_rate": options.max_error_rate}
    try:
        with progress.bar:
            summary = tokenize(options.inputs, options.output, engine=engine, progress=progress, **choices, **about)
    except (KeyboardInterrupt, DyntokError):
        if progress.last is not None:
            print(
                f"dyntok: {progress.last.shards:,} output shards were finished; the same command goes on from there",
                file=sys.stderr,
            )
        raise
    print(json.dumps(summary.to_dict()) if options.json else summary)
    return SOME_SKIPPED if summary.errors else OK


class _Progress:
    """A bar where somebody looks: images, images/s, tokens per image, errors, time left."""

    def __init__(self) -> None:
        self.bar = tqdm(desc="batch", unit=" images", disable=None, mininterval=0.5)
        self.last: Summary | None = None

    def __call__(self, summary: "Summary") -> None:
        self.last = summary
        if self.bar.disable:
            return
        if self.bar.update(summary.images - self.bar.n):
            left = "?" if summary.seconds_left is None else tqdm.format_interval(summary.seconds_left)
            facts = f"{summary.tokens / max(summary.images, 1):.1f} tokens/image, {summary.errors} errors, {left} left"
            self.bar.set_postfix_str(facts, refresh=False)


def _inspect(options: argparse.Namespace) -> int:
    from dyntok import load
    from dyntok.batch import inspect
    from dyntok.batch.report import all_errors, draw_contact_sheet, draw_lengths
    from dyntok.batch.storage import read_storage_options

    storage = read_storage_options(options.storage_options)
    report = inspect(options.folder, storage=storage)
    print(json.dumps(report.to_dict()) if options.json else report)
    if options.output is None:
        return OK
    folder = Path(options.output)
    try:
        os.makedirs(folder, exist_ok=True)
        with open(folder / "errors.jsonl", "w", encoding="utf-8") as file:
            file.writelines(
                json.dumps(row, ensure_ascii=False) + "\n" for row in all_errors(options.folder, storage=storage)
            )
        if report.lengths is not None:
            draw_lengths(report, folder / "lengths.png")
            draw_contact_sheet(options.folder, load(options.model), images=options.images, storage=storage).save(
                folder / "sheet.png"
            )
    except OSError as error:
        if isinstance(error, DyntokError):
            raise
        raise ConfigError(f"can't write to {folder}: {error.strerror or error}") from error
    except BatchError as error:
        print(f"dyntok: no sheet.png: {error}", file=sys.stderr)
    return OK
