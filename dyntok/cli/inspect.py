"""The command `dyntok inspect`. Nothing of the extra `batch` is imported before it runs."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dyntok.cli.arguments import LARGEST, OK, add_command, add_json_option, add_model_option, print_json, report, whole
from dyntok.errors import BatchError, ConfigError, DataError, DyntokError

if TYPE_CHECKING:
    from dyntok.addresses import StorageOptions
    from dyntok.batch import Report
    from dyntok.cli.arguments import Commands


def add_inspect(commands: "Commands") -> None:
    """Add the command `inspect`."""
    add = add_command(
        commands,
        "inspect",
        _inspect,
        summary="Summarize an output folder of batch.",
        details="Shows lengths, code usage and errors; with -o it also draws pictures.",
        example="dyntok inspect codes -o report",
    )
    add.add_argument("folder", metavar="OUTPUT", help="the output folder of `dyntok batch`")
    add.add_argument("-o", "--output", metavar="FOLDER", help="write lengths.png, sheet.png and errors.jsonl there")
    add_model_option(add)
    add.add_argument(
        "--images",
        type=whole(1, LARGEST),
        default=12,
        metavar="N",
        help="number of images in sheet.png (default: %(default)s)",
    )
    add.add_argument("--storage-options", metavar="FILE", help='options of fsspec as JSON: {"s3": {"key": ...}}')
    add_json_option(add)


def _inspect(options: argparse.Namespace) -> int:
    from dyntok.addresses import read_storage_options
    from dyntok.batch import inspect

    storage = read_storage_options(options.storage_options)
    found = inspect(options.folder, storage=storage)
    if options.json:
        print_json(found.to_dict())
    else:
        print(found)
    if options.output is None:
        report("next: add -o FOLDER to draw lengths and sample images", to_stderr=options.json)
        return OK
    folder = Path(options.output)
    try:
        written = _write_pictures(found, folder, options, storage)
    except OSError as error:
        if isinstance(error, DyntokError):
            raise
        raise ConfigError(f"can't write to {folder}: {error.strerror or error}") from error
    report(f"wrote {', '.join(written)} to {folder}", to_stderr=options.json)
    return OK


def _write_pictures(found: "Report", folder: Path, options: argparse.Namespace, storage: "StorageOptions") -> list[str]:
    """Write errors.jsonl and the pictures, and return the names of the files."""
    from dyntok import load
    from dyntok.batch.report import all_errors, draw_lengths, draw_sample_sheet

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "errors.jsonl", "w", encoding="utf-8") as file:
        for row in all_errors(options.folder, storage=storage):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if found.lengths is None:
        return ["errors.jsonl"]
    draw_lengths(found, folder / "lengths.png")
    try:
        sheet = draw_sample_sheet(options.folder, load(options.model), images=options.images, storage=storage)
    except (BatchError, DataError) as error:
        print(f"dyntok: can't draw sheet.png: {error}", file=sys.stderr)
        return ["errors.jsonl", "lengths.png"]
    sheet.save(folder / "sheet.png")
    return ["errors.jsonl", "lengths.png", "sheet.png"]
