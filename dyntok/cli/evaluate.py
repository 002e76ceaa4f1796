"""The command `dyntok eval`. Nothing of the extra `train` is imported before it runs."""

import argparse
from typing import TYPE_CHECKING

from dyntok.cli.arguments import (
    LARGEST,
    OK,
    SOME_SKIPPED,
    add_command,
    add_device_option,
    add_json_option,
    add_limit_option,
    add_model_option,
    add_policy_options,
    add_shape_options,
    json_object,
    keep_options,
    limit_options,
    print_json,
    report,
    shape_options,
    whole,
)
from dyntok.errors import DataError, MissingDependencyError

_MAX_FAILURES = 10  # printed with their reasons

if TYPE_CHECKING:
    from dyntok.cli.arguments import Commands


def add_eval(commands: "Commands") -> None:
    """Add the command `eval`."""
    add = add_command(
        commands,
        "eval",
        _eval,
        summary="Measure the quality of a tokenizer on images.",
        details="Shows tokens per image, code usage, PSNR and SSIM; with --teacher also semantics.",
        example="dyntok eval photos/ --budget 64 --limit 500",
    )
    add_model_option(add)
    add_device_option(add)
    add_json_option(add)
    add_policy_options(add)
    add_shape_options(add)
    add_limit_option(add)
    add.add_argument("data", nargs="+", metavar="SOURCE", help="folders of images, or webdataset tars")
    add.add_argument(
        "--split",
        choices=["all", "train", "validation"],
        default="all",
        help="part of the images, by a hash of their keys; 1 in 20 is for validation (default: %(default)s)",
    )
    add.add_argument(
        "--limit", type=whole(1, LARGEST), metavar="N", help="evaluate only N images, spread evenly over all"
    )
    add.add_argument("--keys", metavar="PREFIX", default="", help="evaluate only images whose key starts with PREFIX")
    add.add_argument("--without-positions", action="store_true", help="decode from the codes alone")
    add.add_argument(
        "--selection",
        choices=["learned", "random", "even"],
        default="learned",
        help="how patches are chosen; random and even keep as many as learned, for comparison (default: %(default)s)",
    )
    add.add_argument("--teacher", metavar="NAME", help="a timm model that classifies originals and reconstructions")
    add.add_argument(
        "--teacher-weights", metavar="FILE", default="hub", help="its weights, safetensors (default: from the hub)"
    )
    add.add_argument(
        "--teacher-args", type=json_object, default={}, metavar="JSON", help="arguments of timm.create_model"
    )
    add.add_argument(
        "--probe",
        action="store_true",
        help="look for neighbors in the training part of SOURCE, not among the evaluated images",
    )
    add.add_argument(
        "--probe-keys", metavar="PREFIX", default="", help="only images whose key starts with PREFIX join the probe"
    )


def _eval(options: argparse.Namespace) -> int:
    from dyntok.cli.progress import ProgressBar

    try:
        from dyntok.loading import load
        from dyntok.training.classifier import load_classifier
        from dyntok.training.evaluate import evaluate
        from dyntok.training.recipe import Teacher
        from dyntok.training.sources import find_samples, take_inventory
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(str(error.name), "train") from error

    tokenizer = load(options.model, device=options.device)
    inventory = take_inventory(options.data, options.split)
    for line in inventory.report():
        report(line, to_stderr=True)
    samples = [sample for sample in inventory.samples if sample.key.startswith(options.keys)]
    if not samples:
        raise DataError(f"no key of an image in {', '.join(options.data)} starts with {options.keys!r}")
    teacher = (
        load_classifier(Teacher(options.teacher, options.teacher_weights, options.teacher_args)).to(tokenizer.device)
        if options.teacher
        else None
    )
    with ProgressBar(desc="eval", unit=" images", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = evaluate(
            tokenizer,
            samples,
            policy=keep_options(options),
            refine=options.refine,
            positions=not options.without_positions,
            selection=options.selection,
            teacher=teacher,
            probe_samples=find_samples(options.data, "train") if options.probe else None,
            probe_prefix=options.probe_keys,
            **shape_options(options),
            **limit_options(options),
            limit=options.limit,
            progress=progress,
        )
    if options.json:
        print_json(result.to_dict())
    else:
        print(result.table())
    for key, reason in result.failed[:_MAX_FAILURES]:
        report(f"left out: {key}: {reason}", to_stderr=True)
    what = f"{options.model or 'the bundled tokenizer'} on {result.images:,} images"
    what += f" ({result.failures:,} more could not be read)" if result.failures else ""
    report(f"evaluated {what}; next: repeat with --budget 64 or --selection even to compare", to_stderr=options.json)
    return SOME_SKIPPED if result.failures else OK
