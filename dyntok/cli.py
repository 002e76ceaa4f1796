"""The command `dyntok`: demo, encode, decode, show, info, eval, train.

Exit codes: 0 done; 1 an error of ours, told in one line on stderr; 2 wrong usage; 3 done, but some images were left out; 130 interrupted.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyntok import __version__
from dyntok.errors import CodeError, ConfigError, DyntokError, MissingDependencyError

OK, FAILED, USAGE, SOME_SKIPPED, INTERRUPTED = 0, 1, 2, 3, 130
DEMO_PHOTO = Path(__file__).parent / "assets" / "astronaut.jpg"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except DyntokError as error:
        print(f"dyntok: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("dyntok: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        sys.stderr.close()
        return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dyntok", description="An image as a short sequence of integers, and back.")
    parser.add_argument("--version", action="version", version=f"dyntok {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", metavar="NAME", help="hub name or folder of a tokenizer (default: the bundled one)")
    model.add_argument("--json", action="store_true", help="for machines: JSON on stdout")
    keep = argparse.ArgumentParser(add_help=False)
    one = keep.add_mutually_exclusive_group()
    one.add_argument("--budget", type=_budget, metavar="N", help="exactly N tokens per image, or a share of the patches such as 0.25")
    one.add_argument("--threshold", type=float, metavar="P", help="keep patches whose keep probability is at least P")
    one.add_argument("--sample", type=int, metavar="SEED", help="the paper's stochastic choice, from this seed")
    keep.add_argument("--max-tokens", type=int, metavar="N", help="at most N tokens per image")

    add = commands.add_parser("demo", parents=[model, keep], help="a photograph into integers and back")
    add.add_argument("-o", "--output", default="demo.png", help="where the picture goes (default: %(default)s)")
    add.set_defaults(run=_demo)

    add = commands.add_parser("encode", parents=[model, keep], help="images to codes")
    add.add_argument("images", nargs="+", metavar="IMAGE", help="files, or - for one image on stdin")
    add.add_argument("-o", "--output", metavar="FILE", help="write the codes as JSON to FILE (- is stdout)")
    add.add_argument("--skip-errors", action="store_true", help="leave bad images out and exit with 3")
    add.set_defaults(run=_encode)

    add = commands.add_parser("decode", parents=[model], help="codes to images")
    add.add_argument("codes", metavar="CODES", help="JSON made by encode, or a list of lists of codes; - is stdin")
    add.add_argument("-o", "--output", required=True, metavar="OUT", help="a .png for one image, a folder for many")
    add.set_defaults(run=_decode)

    add = commands.add_parser("show", parents=[model, keep], help="original, kept patches and reconstruction side by side")
    add.add_argument("images", nargs="+", metavar="IMAGE")
    add.add_argument("-o", "--output", required=True, metavar="OUT.png")
    add.add_argument("--columns", type=int, default=1, help="panels side by side")
    add.set_defaults(run=_show)

    add = commands.add_parser("info", parents=[model], help="what a tokenizer is made of")
    add.set_defaults(run=_info)

    add = commands.add_parser("eval", parents=[model, keep], help="quality on a folder or tar of images")
    add.add_argument("data", nargs="+", metavar="SOURCE", help="folders of images, webdataset tars")
    add.add_argument("--split", choices=["all", "train", "validation"], default="all", help="by a hash of the key, 1 in 20 for validation")
    add.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    add.add_argument("--keys", metavar="PREFIX", default="", help="only images whose key begins so")
    add.add_argument("--without-positions", action="store_true", help="decode codes alone")
    add.add_argument("--selection", choices=["learned", "random", "even"], default="learned", help="other masks with as many tokens, to compare")
    add.add_argument("--teacher", metavar="NAME", help="a timm model that judges the reconstructions")
    add.add_argument("--teacher-weights", metavar="FILE", default="hub", help="its weights, safetensors (default: from the hub)")
    add.add_argument("--teacher-args", type=json.loads, default={}, metavar="JSON", help="arguments of timm.create_model")
    add.add_argument("--probe", action="store_true", help="kNN on pooled code vectors against kNN on pixels (needs labels)")
    add.set_defaults(run=_eval)

    add = commands.add_parser("train", help="train a tokenizer from a recipe; goes on where the folder's last checkpoint stands")
    add.add_argument("recipe", help="a YAML file, or the name of a recipe in the package")
    add.add_argument("-o", "--output", required=True, metavar="FOLDER", help="checkpoints, log and the trained tokenizer")
    add.add_argument("--init", metavar="NAME", help="start from the weights of this tokenizer")
    add.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    add.set_defaults(run=_train)
    return parser


def _budget(text: str) -> int | float:
    return float(text) if "." in text else int(text)


def _policy(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    sample = None if options.sample is None else torch.Generator().manual_seed(options.sample)
    return {"budget": options.budget, "threshold": options.threshold, "sample": sample, "max_tokens": options.max_tokens}


def _load(options: argparse.Namespace):
    import dyntok

    return dyntok.load(options.model)


def _sources(names: Sequence[str]) -> list[str | bytes]:
    return [sys.stdin.buffer.read() if name == "-" else name for name in names]


def _progress(items, what: str):
    """A bar on a terminal, nothing elsewhere."""
    from tqdm import tqdm

    return tqdm(items, desc=what, unit=" images", disable=None if len(items) > 1 else True)


def _write_json(values: Any, output: str | None) -> None:
    text = json.dumps(values)
    if output in (None, "-"):
        print(text)
    else:
        _guarded(lambda: Path(output).write_text(text + "\n"), output)


def _guarded(write, output: str):
    """What the system says about a path of the user's becomes an error of ours."""
    try:
        return write()
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't write {output}: {error}") from error


def _demo(options: argparse.Namespace) -> int:
    from dyntok.sheet import draw_sheet

    tokenizer = _load(options)
    encoding = tokenizer.encode(DEMO_PHOTO, **_policy(options))
    _guarded(lambda: draw_sheet(tokenizer, [DEMO_PHOTO], encoding).save(options.output), options.output)
    if options.json:
        _write_json({**encoding.to_dict(), "picture": options.output}, None)
        return OK
    codes, patches = encoding.codes[0].tolist(), tokenizer.grid[0] * tokenizer.grid[1]
    bits = len(codes) * (tokenizer.config.codebook.size - 1).bit_length()
    print(f"{DEMO_PHOTO.name}: {patches} patches became {len(codes)} integers ({bits / 8:.0f} bytes)\n{' '.join(map(str, codes))}")
    print(f"original, kept patches and the picture made of those integers: {options.output}")
    return OK


def _encode(options: argparse.Namespace) -> int:
    tokenizer = _load(options)
    encoding = tokenizer.encode(
        _progress(_sources(options.images), "encode"), errors="skip" if options.skip_errors else "raise", **_policy(options)
    )
    for index, error in encoding.failures:
        print(f"dyntok: left out {options.images[index]}: {error}", file=sys.stderr)
    if options.output or options.json:
        sources = [options.images[index] for index in encoding.source_index]
        _write_json({**encoding.to_dict(), "sources": sources}, options.output)
    if not options.json and options.output != "-":
        for index, codes in zip(encoding.source_index.tolist(), encoding.codes, strict=True):
            print(f"{options.images[index]}: {len(codes)} tokens" + ("" if options.output else ": " + " ".join(map(str, codes.tolist()))))
    return SOME_SKIPPED if encoding.failures else OK


def _decode(options: argparse.Namespace) -> int:
    from dyntok.encoding import Encoding

    try:
        values = json.loads(sys.stdin.read() if options.codes == "-" else Path(options.codes).read_text())
    except (OSError, ValueError) as error:
        raise CodeError(f"can't read codes from {options.codes}: {error}; expected JSON as `dyntok encode -o` writes it") from error
    if isinstance(values, dict):
        values = Encoding.from_dict({name: value for name, value in values.items() if name not in ("sources", "picture")})
    elif isinstance(values, list) and values and not isinstance(values[0], list):
        values = [values]
    images = _load(options).decode(values)
    target = Path(options.output)
    if target.suffix and len(images) == 1:
        paths = [target]
    else:
        _guarded(lambda: target.mkdir(parents=True, exist_ok=True), options.output)
        paths = [target / f"{i:05d}.png" for i in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        _guarded(lambda image=image, path=path: image.save(path), str(path))
    _write_json([str(path) for path in paths], None) if options.json else print("\n".join(map(str, paths)))
    return OK


def _show(options: argparse.Namespace) -> int:
    from dyntok.sheet import draw_sheet

    tokenizer, images = _load(options), _sources(options.images)
    encoding = tokenizer.encode(images, **_policy(options))
    sheet = draw_sheet(tokenizer, images, encoding, columns=options.columns)
    _guarded(lambda: sheet.save(options.output), options.output)
    if options.json:
        _write_json({"picture": options.output, "lengths": encoding.lengths.tolist()}, None)
    else:
        print(f"{options.output}: " + ", ".join(f"{name} {n} tokens" for name, n in zip(options.images, encoding.lengths.tolist(), strict=True)))
    return OK


def _info(options: argparse.Namespace) -> int:
    tokenizer = _load(options)
    config = tokenizer.config
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in tokenizer.named_children()}
    parts["codebook"] = tokenizer.codebook.embedding.numel()
    facts = {
        "fingerprint": tokenizer.fingerprint,
        "input": f"{config.image.img_size} x {config.image.img_size} pixels, {config.image.resize}",
        "patches": f"{tokenizer.grid[0]} x {tokenizer.grid[1]}",
        "codebook": f"{config.codebook.size} codes of dimension {config.codebook.dim}",
        "parameters": sum(parts.values()),
        **{f"  {name}": count for name, count in parts.items()},
        "makes pixels": "yes" if tokenizer.pixel_head is not None else "no",
    }
    if options.json:
        _write_json({"fingerprint": tokenizer.fingerprint, "config": config.to_dict(), "parameters": parts}, None)
    else:
        print("\n".join(f"{name:<14}{value:,}" if isinstance(value, int) else f"{name:<14}{value}" for name, value in facts.items()))
    return OK


def _train(options: argparse.Namespace) -> int:
    try:
        from dyntok.training.loop import Trainer
        from dyntok.training.recipe import Recipe
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(str(error.name), "train") from error
    import dyntok

    recipe = Recipe.find(options.recipe)
    Trainer(recipe, options.output, tokenizer=dyntok.load(options.init) if options.init else None, cpu=options.cpu).run()
    return OK


if __name__ == "__main__":
    sys.exit(main())
