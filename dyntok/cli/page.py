"""The commands `page` and `serve`: the tokenizer as a web page."""

import argparse
from typing import TYPE_CHECKING

from dyntok.cli.arguments import OK, add_command, add_model_option, whole

if TYPE_CHECKING:
    from dyntok.cli.arguments import Commands


def add_page(commands: "Commands") -> None:
    """Add the command `page`."""
    add = add_command(
        commands,
        "page",
        _page,
        summary="Write a web page that encodes and decodes in the browser.",
        details="Any web server can serve the folder. It needs the npm package onnxruntime-web (npm pack).",
        example="dyntok page -o site --runtime onnxruntime-web-1.30.0.tgz",
    )
    add_model_option(add)
    add.add_argument("-o", "--output", required=True, metavar="FOLDER", help="the folder to write")
    add.add_argument(
        "--runtime",
        default="node_modules/onnxruntime-web",
        metavar="PATH",
        help="onnxruntime-web: its .tgz file or its folder (default: %(default)s)",
    )
    add.add_argument("--webgpu", action="store_true", help="also copy the runtime for GPUs, which adds 27 MB")


def add_serve(commands: "Commands") -> None:
    """Add the command `serve`."""
    add = add_command(
        commands,
        "serve",
        _serve,
        summary="Serve the folder of `dyntok page`, and open it in the browser.",
        details="Serves the folder on localhost alone, until it is interrupted.",
        example="dyntok serve site",
    )
    add.add_argument("folder", nargs="?", default="site", metavar="FOLDER", help="default: %(default)s")
    add.add_argument("--port", type=whole(0, 65535), default=8000, metavar="N", help="0: any (default: %(default)s)")
    add.add_argument("--no-browser", action="store_true", help="only print the address")


def _page(options: argparse.Namespace) -> int:
    from dyntok import load
    from dyntok.page import write_page

    folder = write_page(load(options.model), options.output, runtime=options.runtime, webgpu=options.webgpu)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"wrote {folder} ({size / 1e6:.1f} MB); next: dyntok serve {folder}")
    return OK


def _serve(options: argparse.Namespace) -> int:
    from dyntok.page.serve import address, make_server, serve

    server = make_server(options.folder, options.port)
    print(f"{address(server)} shows {options.folder}; Ctrl+C ends it", flush=True)
    serve(server, browser=not options.no_browser)
    return OK
