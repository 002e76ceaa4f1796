"""The commands `info` and `import-lavit`: describe a tokenizer, convert LaVIT's released files into one."""

import argparse
from typing import TYPE_CHECKING

from dyntok.cli.arguments import (
    OK,
    add_command,
    add_device_option,
    add_json_option,
    add_model_option,
    json_object,
    print_json,
)

if TYPE_CHECKING:
    from dyntok.cli.arguments import Commands
    from dyntok.tokenizer import DynamicVisualTokenizer


def add_info(commands: "Commands") -> None:
    """Add the command `info`."""
    add = add_command(
        commands,
        "info",
        _info,
        summary="Describe a tokenizer.",
        details="Shows its fingerprint, input size, codebook and the parameters of each part.",
        example="dyntok info tiny",
    )
    either = add.add_mutually_exclusive_group()
    either.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="NAME", help="the same as --model NAME")
    add_model_option(either)
    add_device_option(add)
    add_json_option(add)


def add_import_lavit(commands: "Commands") -> None:
    """Add the command `import-lavit`."""
    add = add_command(
        commands,
        "import-lavit",
        _import_lavit,
        summary="Convert LaVIT's released files into a dyntok checkpoint.",
        details="The license of the weights is LaVIT's; the checkpoint's README.md says more.",
        example="dyntok import-lavit rain1011/LaVIT-7B-v2 lavit --dtype bf16",
    )
    add.add_argument("source", metavar="SOURCE", help="a folder laid out like the repository, or its name on the hub")
    add.add_argument("output", metavar="OUTPUT", help="the folder of the new checkpoint")
    add.add_argument(
        "--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="dtype of most weights (default: %(default)s)"
    )
    add.add_argument(
        "--parts",
        nargs="*",
        metavar="PART",
        help="parts to take besides the encoder: decoder, highres_decoder, understanding, pixels "
        "(default: all that the source has)",
    )
    add.add_argument(
        "--config",
        type=json_object,
        metavar="JSON",
        help="head counts, if they differ from those of the released files",
    )
    add.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the repository on the hub")


def _info(options: argparse.Namespace) -> int:
    from dyntok import load

    tokenizer = load(options.model, device=options.device)
    config = tokenizer.config
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in tokenizer.named_children()}
    parts["codebook"] = tokenizer.codebook.embedding.numel()
    if options.json:
        print_json({"fingerprint": tokenizer.fingerprint, "config": config.to_dict(), "parameters": parts})
        return OK
    shape = f"{config.image.img_size} x {config.image.img_size} pixels"
    patches = f"{tokenizer.grid[0]} x {tokenizer.grid[1]}"
    if tokenizer.any_grid:
        shape, patches = "any shape", f"up to {tokenizer.max_tokens:,} of {config.image.patch_size} pixels"
    facts = {
        "fingerprint": tokenizer.fingerprint,
        "input": f"{shape}; fit: {config.image.resize}",
        "patches": patches,
        "codebook": f"{config.codebook.size:,} codes of dimension {config.codebook.dim}",
        "parameters": f"{sum(parts.values()):,}, codebook included",
        **{f"  {name}": f"{count:,}" for name, count in parts.items()},
        "makes pixels": _pixel_decoder(tokenizer),
    }
    for name, value in facts.items():
        print(f"{name:<18}{value}")
    return OK


def _pixel_decoder(tokenizer: "DynamicVisualTokenizer") -> str:
    if tokenizer.pixel_head is not None:
        return "yes"
    from dyntok.lavit.tokenizer import LavitTokenizer

    if not isinstance(tokenizer, LavitTokenizer):
        return "no"
    decoder = tokenizer.config.decoder
    conditioned = decoder is not None and decoder.conditions is not None
    return "with a diffusion model" if conditioned or tokenizer.lazy_parts is not None else "no"


def _import_lavit(options: argparse.Namespace) -> int:
    from dyntok.lavit.convert import convert
    from dyntok.precision import DTYPES

    tokenizer = convert(
        options.source,
        options.output,
        dtype=DTYPES[options.dtype],
        parts=options.parts,
        config=options.config,
        revision=options.revision,
    )
    print(f"wrote {options.output} (fingerprint {tokenizer.fingerprint}; LaVIT's license applies, see its README.md)")
    print(f"next: dyntok info --model {options.output}")
    return OK
