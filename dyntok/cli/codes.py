"""The commands `encode` and `decode`: images to codes, and codes to images."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dyntok.cli.arguments import (
    OK,
    SOME_SKIPPED,
    add_command,
    add_device_option,
    add_json_option,
    add_limit_option,
    add_model_option,
    add_policy_options,
    add_shape_options,
    keep_options,
    limit_options,
    print_json,
    report,
    shape_options,
    size_or_original,
)
from dyntok.cli.files import guard_write, image_sources, read_codes, save_picture, writable_suffixes
from dyntok.errors import CodeError, ConfigError

if TYPE_CHECKING:
    from PIL import Image

    from dyntok.cli.arguments import Commands
    from dyntok.encoding import Encoding


def add_encode(commands: "Commands") -> None:
    """Add the command `encode`."""
    add = add_command(
        commands,
        "encode",
        _encode,
        summary="Turn images into codes.",
        details="The codes are printed, or written as JSON that `dyntok decode` reads.",
        example="dyntok encode cat.jpg dog.png -o codes.json",
    )
    add_model_option(add)
    add_device_option(add)
    add_json_option(add)
    add_policy_options(add)
    add_shape_options(add)
    add_limit_option(add)
    add.add_argument("images", nargs="+", metavar="IMAGE", help="image files; - reads one image from stdin")
    add.add_argument("-o", "--output", metavar="FILE", help="write the codes to FILE as JSON; - is stdout")
    add.add_argument("--skip-errors", action="store_true", help="skip images that can't be read, and exit with 3")


def add_decode(commands: "Commands") -> None:
    """Add the command `decode`."""
    add = add_command(
        commands,
        "decode",
        _decode,
        summary="Turn codes back into images.",
        details="Positions are used if the codes have them; codes alone work, too.",
        example="dyntok decode codes.json -o again",
    )
    add_model_option(add)
    add_device_option(add)
    add_json_option(add)
    add.add_argument(
        "--size",
        type=size_or_original,
        metavar="HxW",
        help="height and width of the pictures, such as 256x384; original: those before `encode` (default: the grid's)",
    )
    add.add_argument("codes", metavar="CODES", help="JSON from `dyntok encode`, or lists of codes; - is stdin")
    add.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="a .png for one image, a folder for several; - is stdout"
    )


def _encode(options: argparse.Namespace) -> int:
    from dyntok import load
    from dyntok.cli.progress import ProgressBar
    from dyntok.policy import KeepPolicy
    from dyntok.target import missed_in_words

    given, sources = options.images, image_sources(options.images)
    tokenizer = load(options.model, device=options.device)
    policy = KeepPolicy(**keep_options(options))
    hidden = None if len(given) > 1 else True  # None: shown on a terminal only
    images = ProgressBar(sources, desc="encode", unit=" images", disable=hidden)
    encoding = tokenizer.encode(
        images,
        errors="skip" if options.skip_errors else "raise",
        policy=policy,
        refine=options.refine,
        **shape_options(options),
        **limit_options(options),
    )
    for index, error in encoding.failures:
        reason = str(error).removeprefix(f"{given[index]}: ")
        print(f"dyntok: skipped {given[index]}: {reason}", file=sys.stderr)
    kept = [given[index] for index in encoding.source_index.tolist()]
    values = {**encoding.to_dict(), "sources": kept}
    to_file = options.output not in (None, "-")
    if to_file:
        text = json.dumps(values) + "\n"
        guard_write(lambda: Path(options.output).write_text(text, encoding="utf-8"), options.output)
    to_stdout = options.json or options.output == "-"
    if to_stdout:
        print_json(values)
    else:
        for name, codes in zip(kept, encoding.codes, strict=True):
            print(f"{name}: {len(codes)} tokens" + ("" if to_file else ": " + " ".join(map(str, codes.tolist()))))
    patches = encoding.grids.prod(1).tolist()
    if missed := sum(map(policy.may_miss, encoding.lengths.tolist(), patches)):
        report(missed_in_words(missed, len(encoding)), to_stderr=to_stdout)
    report(_encoded(encoding, options.output if to_file else None), to_stderr=to_stdout)
    return SOME_SKIPPED if encoding.failures else OK


def _encoded(encoding: "Encoding", path: str | None) -> str:
    """Returns the last line of `encode`: what was made, and what to do next."""
    from dyntok.validation import counted

    made = f"{counted(len(encoding), 'image')}, {counted(encoding.num_tokens, 'token')}"
    if encoding.failures:
        made += f", {len(encoding.failures)} skipped"
    if path is None:
        return f"encoded {made}; next: add -o codes.json to keep the codes"
    target = "again.png" if len(encoding) == 1 else "again"
    return f"wrote {path} ({made}); next: dyntok decode {shlex.quote(path)} -o {target}"


def _decode(options: argparse.Namespace) -> int:
    from dyntok import load

    target, formats = Path(options.output), writable_suffixes()
    if target.suffix and target.suffix.lower() not in formats and not target.is_dir():
        raise ConfigError(
            f"can't write pictures as {target.suffix}; "
            "name a .png for one image, or a folder (one with a dot in its name must exist)"
        )
    tokenizer, chosen = load(options.model, device=options.device), {"size": options.size} if options.size else {}
    images = tokenizer.decode(read_codes(options.codes), **chosen)
    if options.output == "-" or (target.suffix.lower() in formats and not target.is_dir()):
        if len(images) != 1:
            raise CodeError(
                f"{options.codes} has codes of {len(images)} images, but {options.output} holds one; give a folder"
            )
        paths = [options.output]
    else:
        guard_write(lambda: target.mkdir(parents=True, exist_ok=True), target)
        paths = [str(target / f"{i:05d}.png") for i in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        save_picture(image, path)
    if options.output == "-":
        return OK
    if options.json:
        print_json(paths)
    else:
        print(*paths, sep="\n")
    report(_decoded(images, options.output), to_stderr=options.json)
    return OK


def _decoded(images: Sequence["Image.Image"], output: str) -> str:
    from dyntok.validation import counted

    sizes = sorted({f"{image.width} x {image.height}" for image in images})
    made = f"wrote {counted(len(images), 'image')} to {output}" + (f" ({', '.join(sizes)} pixels)" if sizes else "")
    return f"{made}; next: dyntok show IMAGE -o sheet.png compares originals with reconstructions"
