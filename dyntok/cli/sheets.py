"""The commands `demo` and `show`, which draw contact sheets."""

import argparse
from typing import TYPE_CHECKING

from dyntok.cli.arguments import (
    LARGEST,
    OK,
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
    whole,
)
from dyntok.cli.files import image_sources, save_picture

if TYPE_CHECKING:
    from dyntok.cli.arguments import Commands

_PICTURE = "the contact sheet to write; - is stdout"


def add_demo(commands: "Commands") -> None:
    """Add the command `demo`."""
    add = add_command(
        commands,
        "demo",
        _demo,
        summary="Encode and decode a bundled photograph.",
        details="The result is a contact sheet: original, kept patches and reconstruction.",
        example="dyntok demo --budget 64 -o demo.png",
    )
    add_model_option(add)
    add_device_option(add)
    add_json_option(add)
    add_policy_options(add)
    add_shape_options(add)
    add.add_argument("-o", "--output", default="demo.png", metavar="FILE", help=f"{_PICTURE} (default: %(default)s)")


def add_show(commands: "Commands") -> None:
    """Add the command `show`."""
    add = add_command(
        commands,
        "show",
        _show,
        summary="Draw a contact sheet of images.",
        details="Each image has a row: original, kept patches and reconstruction.",
        example="dyntok show cat.jpg dog.png -o sheet.png",
    )
    add_model_option(add)
    add_device_option(add)
    add_json_option(add)
    add_policy_options(add)
    add_shape_options(add)
    add_limit_option(add)
    add.add_argument("images", nargs="+", metavar="IMAGE", help="image files; - reads one image from stdin")
    add.add_argument("-o", "--output", required=True, metavar="FILE", help=_PICTURE)
    add.add_argument(
        "--columns", type=whole(1, LARGEST), default=1, metavar="N", help="images side by side (default: %(default)s)"
    )


def _demo(options: argparse.Namespace) -> int:
    from dyntok import load
    from dyntok.loading import EXAMPLE_IMAGE
    from dyntok.visualize import contact_sheet

    tokenizer = load(options.model, device=options.device)
    encoding = tokenizer.encode(EXAMPLE_IMAGE, refine=options.refine, **keep_options(options), **shape_options(options))
    save_picture(contact_sheet(tokenizer, [EXAMPLE_IMAGE], encoding, **shape_options(options)), options.output)
    codes, patches = encoding.codes[0].tolist(), int(encoding.grids[0].prod())
    bits = len(codes) * (tokenizer.config.codebook.size - 1).bit_length()
    if options.output == "-":
        return OK
    if options.json:
        print_json({**encoding.to_dict(), "picture": options.output})
    else:
        print(f"{EXAMPLE_IMAGE.name}: {patches} patches became {len(codes)} integers ({-(-bits // 8)} bytes)")
        print(*codes)
    what = "original, kept patches and reconstruction"
    report(f"wrote {options.output} ({what}); next: dyntok encode YOUR.jpg", to_stderr=options.json)
    return OK


def _show(options: argparse.Namespace) -> int:
    from dyntok import load
    from dyntok.visualize import contact_sheet

    images = image_sources(options.images)
    tokenizer = load(options.model, device=options.device)
    given = {**shape_options(options), **limit_options(options)}
    encoding = tokenizer.encode(images, refine=options.refine, **keep_options(options), **given)
    save_picture(contact_sheet(tokenizer, images, encoding, columns=options.columns, **given), options.output)
    lengths = encoding.lengths.tolist()
    if options.output == "-":
        return OK
    if options.json:
        print_json({"picture": options.output, "lengths": lengths})
    else:
        for name, length in zip(options.images, lengths, strict=True):
            print(f"{name}: {length} tokens")
    report(f"wrote {options.output}; next: dyntok encode IMAGE -o codes.json keeps the codes", to_stderr=options.json)
    return OK
