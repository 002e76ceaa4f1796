"""The command `dyntok batch`. Nothing of the extra `batch` is imported before it runs."""

import argparse
import shlex
import sys
from contextlib import closing
from typing import TYPE_CHECKING

from dyntok.cli.arguments import (
    LARGEST,
    OK,
    SOME_SKIPPED,
    add_command,
    add_json_option,
    add_limit_option,
    add_model_option,
    add_policy_options,
    add_shape_options,
    names,
    print_json,
    report,
    whole,
)
from dyntok.errors import ConfigError, DyntokError

if TYPE_CHECKING:
    from dyntok.batch import Summary
    from dyntok.batch.dry_run import DryRun
    from dyntok.cli.arguments import Commands


def add_batch(commands: "Commands") -> None:
    """Add the command `batch`."""
    add = add_command(
        commands,
        "batch",
        _batch,
        summary="Encode whole datasets into shards of codes.",
        details="Run the same command again to resume an interrupted run.",
        example="dyntok batch 's3://bucket/{000..099}.tar' codes --dry-run",
    )
    add.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="inputs of one kind: folders, webdataset tars, zip archives, Parquet files or lists of paths (.txt); "
        "globs, {000..099} and s3:// work",
    )
    add.add_argument("output", metavar="OUTPUT", help="a new folder, or the folder of the run to resume")
    add_model_option(add)
    add.add_argument("--dry-run", action="store_true", help="estimate from a sample what would be done; write nothing")
    add_json_option(add)
    add_policy_options(add, sample=False)
    add_shape_options(add)
    _add_input_options(add.add_argument_group("input"))
    _add_output_options(add.add_argument_group("output"))
    _add_performance_options(
        add.add_argument_group("performance (these options never affect the output, except --time-limit)")
    )


def _add_input_options(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--kind",
        choices=["auto", "folder", "tar", "zip", "parquet", "list"],
        default="auto",
        help="kind of the inputs (default: by their names)",
    )
    group.add_argument(
        "--image-column", metavar="NAME", help="Parquet column of the images (default: the only one that holds images)"
    )
    group.add_argument(
        "--key-column", metavar="NAME", help="Parquet column of the keys (default: key or __key__, else file and row)"
    )
    group.add_argument("--interleaved", action="store_true", help="each row holds several images")
    add_limit_option(group)
    group.add_argument("--storage-options", metavar="FILE", help='options of fsspec as JSON: {"s3": {"key": ...}}')


def _add_output_options(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--format",
        choices=["parquet", "webdataset", "megatron"],
        default="parquet",
        help="format of the output (default: %(default)s)",
    )
    group.add_argument(
        "--shard-size",
        type=whole(1, LARGEST),
        default=8192,
        metavar="N",
        help="at most N images per output shard (default: %(default)s)",
    )
    group.add_argument(
        "--keep-columns",
        type=names,
        default=[],
        metavar="NAME,...",
        help="extra columns to keep: columns of Parquet, or extensions such as txt",
    )
    group.add_argument(
        "--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="dtype of most weights (default: %(default)s)"
    )
    group.add_argument(
        "--batch-invariant",
        action="store_true",
        help="GPU: compute every image alone, so that its codes do not depend on the batch; slower",
    )
    group.add_argument(
        "--margins",
        action="store_true",
        help="parquet: a column with the shares of codes and of patches that were close",
    )
    group.add_argument(
        "--vocab-size",
        type=whole(1, LARGEST),
        metavar="N",
        help="megatron: size of the LLM's vocabulary; the codes come after it",
    )
    group.add_argument("--eod", type=whole(0, LARGEST), metavar="ID", help="megatron: an id that ends every document")
    group.add_argument(
        "--layout",
        choices=["map", "positions", "lattice", "none"],
        help="megatron: how ids say the places of codes (default: as the tokenizer's masks need it)",
    )
    group.add_argument(
        "--text-tokenizer",
        metavar="FILE",
        help="megatron: the LLM's tokenizer.json; the columns of --keep-columns are then written as text",
    )
    group.add_argument("--retry-errors", action="store_true", help="encode only the images that failed before")
    group.add_argument(
        "--max-error-rate",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="stop if a larger share of the images fails (default: never)",
    )


def _add_performance_options(group: "argparse._ArgumentGroup") -> None:
    positive = whole(1, LARGEST)
    group.add_argument("--engine", choices=["local", "ray"], default="local", help="(default: %(default)s)")
    group.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="images per batch (default: %(default)s)"
    )
    group.add_argument(
        "--time-limit",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="an image that takes longer to decode is an error; needs decoding processes (default: %(default)g)",
    )
    group.add_argument(
        "--workers", type=whole(0, 2**10), metavar="N", help="local: decoding processes (default: by number of cores)"
    )
    group.add_argument(
        "--devices",
        type=names,
        default=[],
        metavar="NAME,...",
        help="local: one model process per device, such as cuda:0,cuda:1 (default: all GPUs, or cpu)",
    )
    group.add_argument("--threads", type=positive, metavar="N", help="threads of each model process on a CPU")
    group.add_argument(
        "--address", metavar="ADDRESS", help="ray: the cluster; auto finds this machine's (default: start one)"
    )
    group.add_argument(
        "--actors", type=positive, metavar="N", help="ray: copies of the tokenizer (default: one per GPU or two cores)"
    )


def _batch(options: argparse.Namespace) -> int:
    from dyntok.addresses import read_storage_options
    from dyntok.batch import BatchOptions, EngineOptions, tokenize
    from dyntok.batch.dry_run import dry_run
    from dyntok.batch.run import with_devices
    from dyntok.batch.task import prepare
    from dyntok.cli.batch_progress import Progress
    from dyntok.validation import counted

    if options.dry_run and options.retry_errors:
        raise ConfigError("--dry-run and --retry-errors were both given; give one of them")
    given = vars(options)
    run_options = BatchOptions(**{name: given[name] for name in BatchOptions.__dataclass_fields__ if name in given})
    engine = EngineOptions(
        options.engine,
        batch_size=options.batch_size,
        time_limit=options.time_limit,
        threads=options.threads,
        workers=options.workers,
        devices=options.devices,
        address=options.address,
        actors=options.actors,
    )
    storage = read_storage_options(options.storage_options)
    if options.dry_run:
        engine = with_devices(engine)
        task = prepare(
            options.inputs, options.output, model=options.model, options=run_options, engine=engine, storage=storage
        )
        estimate = dry_run(task, next(iter(engine.devices), None))
        _print(estimate, options.json)
        return SOME_SKIPPED if estimate.all_failed or estimate.found_nothing else OK
    progress = Progress()
    try:
        with closing(progress):
            summary = tokenize(
                options.inputs,
                options.output,
                model=options.model,
                options=run_options,
                storage=storage,
                engine=engine,
                progress=progress,
                retry_errors=options.retry_errors,
                max_error_rate=options.max_error_rate,
            )
    except (KeyboardInterrupt, DyntokError):
        if progress.last is not None:
            done = counted(progress.last.shards, "output shard")
            print(f"dyntok: {done} complete; run the same command again to resume", file=sys.stderr)
        raise
    _print(summary, options.json)
    report(f"next: dyntok inspect {shlex.quote(options.output)}", to_stderr=options.json)
    return SOME_SKIPPED if summary.errors or summary.failed_before or summary.found_nothing else OK


def _print(result: "Summary | DryRun", as_json: bool) -> None:
    if as_json:
        print_json(result.to_dict())
    else:
        print(result)
