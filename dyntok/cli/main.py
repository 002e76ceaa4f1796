"""The command `dyntok`: demo, encode, decode, show, info, eval, train, import-lavit; batch and inspect are in `cli_batch.py`.

Exit codes: 0 done; 1 an error of ours, told in one line on stderr; 2 wrong usage; 3 done, but some images were left out; 130 interrupted.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from dyntok import DynamicVisualTokenizer, Encoding, __version__, load
from dyntok.cli import batch as cli_batch
from dyntok.cli.arguments import FAILED, INTERRUPTED, OK, SOME_SKIPPED, budget, keep_options, mapping, print_json, whole
from dyntok.cli.evaluate import add_eval
from dyntok.cli.train import add_train
from dyntok.errors import CodeError, ConfigError, DyntokError
from dyntok.lavit import convert as lavit
from dyntok.visualize import draw_sheet

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEMO_PHOTO = Path(__file__).parents[1] / "assets" / "astronaut.jpg"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except DyntokError as error:
        print(f"dyntok: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("dyntok: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (
        BrokenPipeError
    ):  # the reader of our output went away, as `head` does; what is left in the buffer has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dyntok", description="An image as a short sequence of integers, and back.")
    parser.add_argument("--version", action="version", version=f"dyntok {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", metavar="NAME", help="hub name or folder of a tokenizer (default: the bundled one)")
    model.add_argument("--device", metavar="NAME", default="cpu", help="cuda, cuda:1, mps, ... (default: %(default)s)")
    model.add_argument("--json", action="store_true", help="for machines: JSON on stdout")
    keep = argparse.ArgumentParser(add_help=False)
    one = keep.add_mutually_exclusive_group()
    one.add_argument(
        "--budget", type=budget, metavar="N", help="exactly N tokens per image, or a share of the patches such as 0.25"
    )
    one.add_argument("--threshold", type=float, metavar="P", help="keep patches whose keep probability is at least P")
    one.add_argument(
        "--sample", type=whole(0, 2**63 - 1), metavar="SEED", help="the paper's stochastic choice, from this seed"
    )
    keep.add_argument("--max-tokens", type=whole(1, 2**31), metavar="N", help="at most N tokens per image")

    add = commands.add_parser("demo", parents=[model, keep], help="a photograph into integers and back")
    add.add_argument(
        "-o", "--output", default="demo.png", help="where the picture goes, - is stdout (default: %(default)s)"
    )
    add.set_defaults(run=_demo)

    add = commands.add_parser("encode", parents=[model, keep], help="images to codes")
    add.add_argument("images", nargs="+", metavar="IMAGE", help="files, or - for one image on stdin")
    add.add_argument("-o", "--output", metavar="FILE", help="write the codes as JSON to FILE (- is stdout)")
    add.add_argument("--skip-errors", action="store_true", help="leave bad images out and exit with 3")
    add.set_defaults(run=_encode)

    add = commands.add_parser("decode", parents=[model], help="codes to images")
    add.add_argument("codes", metavar="CODES", help="JSON made by encode, or a list of lists of codes; - is stdin")
    add.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="a .png for one image (- is stdout), a folder for many"
    )
    add.set_defaults(run=_decode)

    add = commands.add_parser(
        "show", parents=[model, keep], help="original, kept patches and reconstruction side by side"
    )
    add.add_argument("images", nargs="+", metavar="IMAGE", help="files, or - for one image on stdin")
    add.add_argument("-o", "--output", required=True, metavar="OUT.png", help="where the picture goes, - is stdout")
    add.add_argument("--columns", type=whole(1, 2**31), default=1, metavar="N", help="panels side by side")
    add.set_defaults(run=_show)

    add = commands.add_parser("info", parents=[model], help="what a tokenizer is made of")
    add.set_defaults(run=_info)

    add_eval(commands, [model, keep])
    add_train(commands)
    cli_batch.add_commands(commands, budget, whole)

    add = commands.add_parser(
        "import-lavit", help="LaVIT's released files as an ordinary checkpoint, under LaVIT's licence"
    )
    add.add_argument("source", metavar="SOURCE", help="a folder laid out like the repository, or rain1011/LaVIT-7B-v2")
    add.add_argument("output", metavar="OUT", help="the folder of the new checkpoint")
    add.add_argument("--dtype", choices=list(_DTYPES), default="fp32", help="of most weights (default: %(default)s)")
    add.add_argument(
        "--parts", nargs="*", choices=lavit.PARTS, help="what to take besides the encoder (default: all there is)"
    )
    add.add_argument("--config", type=mapping, metavar="JSON", help="head counts, where they are not the released ones")
    add.add_argument("--revision", metavar="NAME", help="of the repository on the hub")
    add.set_defaults(run=_import_lavit)
    return parser


def _sources(names: Sequence[str]) -> list[str | bytes]:
    return [sys.stdin.buffer.read() if name == "-" else name for name in names]


def _guarded(write: Callable[[], Any], output: str | Path) -> None:
    """What the system says about a path of the user's becomes an error of ours."""
    try:
        write()
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't write {output}: {error}") from error


def _save_picture(picture: Image.Image, output: str | Path) -> None:
    if output == "-":
        picture.save(sys.stdout.buffer, "PNG")
    else:
        _guarded(lambda: picture.save(output), output)


def _demo(options: argparse.Namespace) -> int:
    tokenizer = load(options.model, device=options.device)
    encoding = tokenizer.encode(DEMO_PHOTO, **keep_options(options))
    _save_picture(draw_sheet(tokenizer, [DEMO_PHOTO], encoding), options.output)
    codes, patches = encoding.codes[0].tolist(), tokenizer.grid[0] * tokenizer.grid[1]
    bits = len(codes) * (tokenizer.config.codebook.size - 1).bit_length()
    if options.output == "-":
        return OK
    if options.json:
        print_json({**encoding.to_dict(), "picture": options.output})
    else:
        print(
            f"{DEMO_PHOTO.name}: {patches} patches became {len(codes)} integers ({-(-bits // 8)} bytes)\n{' '.join(map(str, codes))}"
        )
        print(f"original, kept patches and the picture made of those integers: {options.output}")
    return OK


def _encode(options: argparse.Namespace) -> int:
    tokenizer, names = load(options.model, device=options.device), options.images
    # None: no bar where nobody looks
    images = tqdm(_sources(names), desc="encode", unit=" images", disable=None if len(names) > 1 else True)
    encoding = tokenizer.encode(images, errors="skip" if options.skip_errors else "raise", **keep_options(options))
    for index, error in encoding.failures:
        print(f"dyntok: left out {names[index]}: {error}", file=sys.stderr)
    sources = [names[index] for index in encoding.source_index.tolist()]
    values = {**encoding.to_dict(), "sources": sources}
    to_file = options.output not in (None, "-")
    if to_file:
        _guarded(lambda: Path(options.output).write_text(json.dumps(values) + "\n", encoding="utf-8"), options.output)
    if options.json or options.output == "-":
        print_json(values)
    else:
        for name, codes in zip(sources, encoding.codes, strict=True):
            print(f"{name}: {len(codes)} tokens" + ("" if to_file else ": " + " ".join(map(str, codes.tolist()))))
    return SOME_SKIPPED if encoding.failures else OK


def _decode(options: argparse.Namespace) -> int:
    target = Path(options.output)
    if target.suffix and target.suffix.lower() not in Image.registered_extensions() and not target.is_dir():
        raise ConfigError(
            f"can't write pictures as {target.suffix}; name a .png for one image, or a folder (one with a dot must exist)"
        )
    images = load(options.model, device=options.device).decode(_read_codes(options.codes))
    if options.output == "-" or target.suffix.lower() in Image.registered_extensions():
        if len(images) != 1:
            raise CodeError(
                f"{options.codes} holds the codes of {len(images)} images, and {options.output} takes one; give a folder"
            )
        paths = [options.output]
    else:
        _guarded(lambda: target.mkdir(parents=True, exist_ok=True), target)
        paths = [str(target / f"{i:05d}.png") for i in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        _save_picture(image, path)
    if options.output == "-":
        return OK
    if options.json:
        print_json(paths)
    else:
        print(*paths, sep="\n")
    return OK


def _read_codes(source: str) -> Encoding | list:
    """What `encode` wrote, or codes alone: a list of lists, or the list of a single image."""
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
        values = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise CodeError(
            f"can't read codes from {source}: {error}; expected JSON as `dyntok encode -o` writes it"
        ) from error
    if isinstance(values, dict):
        return Encoding.from_dict({name: value for name, value in values.items() if name not in ("sources", "picture")})
    if not isinstance(values, list):
        raise CodeError(
            f"{source} holds {type(values).__name__}, expected what `dyntok encode -o` writes or a list of lists of codes"
        )
    return values if not values or isinstance(values[0], list) else [values]


def _show(options: argparse.Namespace) -> int:
    tokenizer, images = load(options.model, device=options.device), _sources(options.images)
    encoding = tokenizer.encode(images, **keep_options(options))
    _save_picture(draw_sheet(tokenizer, images, encoding, columns=options.columns), options.output)
    lengths = encoding.lengths.tolist()
    if options.output == "-":
        return OK
    if options.json:
        print_json({"picture": options.output, "lengths": lengths})
    else:
        print(
            f"{options.output}: "
            + ", ".join(f"{name} {n} tokens" for name, n in zip(options.images, lengths, strict=True))
        )
    return OK


def _info(options: argparse.Namespace) -> int:
    tokenizer = load(options.model, device=options.device)
    config = tokenizer.config
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in tokenizer.named_children()}
    parts["codebook"] = tokenizer.codebook.embedding.numel()
    if options.json:
        print_json({"fingerprint": tokenizer.fingerprint, "config": config.to_dict(), "parameters": parts})
        return OK
    facts = {
        "fingerprint": tokenizer.fingerprint,
        "input": f"{config.image.img_size} x {config.image.img_size} pixels, {config.image.resize}",
        "patches": f"{tokenizer.grid[0]} x {tokenizer.grid[1]}",
        "codebook": f"{config.codebook.size} codes of dimension {config.codebook.dim}",
        "parameters": f"{sum(parts.values()):,}",
        **{f"  {name}": f"{count:,}" for name, count in parts.items()},
        "makes pixels": _how_it_paints(tokenizer),
    }
    print(*(f"{name:<18}{value}" for name, value in facts.items()), sep="\n")
    return OK


def _how_it_paints(tokenizer: DynamicVisualTokenizer) -> str:
    if tokenizer.pixel_head is not None:
        return "yes"
    conditions = tokenizer.config.decoder is not None and tokenizer.config.decoder.conditions is not None
    return "with a diffusion model" if conditions or tokenizer.late_parts is not None else "no"


def _import_lavit(options: argparse.Namespace) -> int:
    choices = {"parts": options.parts, "config": options.config, "revision": options.revision}
    tokenizer = lavit.convert(options.source, options.output, dtype=_DTYPES[options.dtype], **choices)
    print(
        f"{options.output}: fingerprint {tokenizer.fingerprint}; the licence of these weights is LaVIT's, see README.md there"
    )
    return OK
