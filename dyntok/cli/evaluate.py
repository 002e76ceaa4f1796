"""The command `dyntok eval`. Nothing of the extra `train` is imported before it runs."""

import argparse
from collections.abc import Sequence

from tqdm import tqdm

from dyntok.cli.arguments import OK, SOME_SKIPPED, keep_options, mapping, print_json, whole
from dyntok.errors import DataError, MissingDependencyError


def add_eval(commands: argparse._SubParsersAction, parents: Sequence[argparse.ArgumentParser]) -> None:
    add = commands.add_parser("eval", parents=parents, help="quality on a folder or tar of images")
    add.add_argument("data", nargs="+", metavar="SOURCE", help="folders of images, webdataset tars")
    add.add_argument(
        "--split",
        choices=["all", "train", "validation"],
        default="all",
        help="by a hash of the key, 1 in 20 for validation",
    )
    add.add_argument("--limit", type=whole(1, 2**31), metavar="N", help="only N images, spread evenly over all")
    add.add_argument("--keys", metavar="PREFIX", default="", help="only images whose key starts with PREFIX")
    add.add_argument("--without-positions", action="store_true", help="decode from the codes alone")
    add.add_argument(
        "--selection",
        choices=["learned", "random", "even"],
        default="learned",
        help="compare with other masks of the same lengths",
    )
    add.add_argument("--teacher", metavar="NAME", help="a timm model that classifies originals and reconstructions")
    add.add_argument(
        "--teacher-weights", metavar="FILE", default="hub", help="its weights, safetensors (default: from the hub)"
    )
    add.add_argument("--teacher-args", type=mapping, default={}, metavar="JSON", help="arguments of timm.create_model")
    add.add_argument(
        "--probe",
        action="store_true",
        help="look for neighbors in the training part of SOURCE, not among the evaluated images",
    )
    add.add_argument(
        "--probe-keys", metavar="PREFIX", default="", help="only images whose key starts with PREFIX join the probe"
    )
    add.set_defaults(run=_eval)


def _eval(options: argparse.Namespace) -> int:
    try:
        from dyntok.loading import load
        from dyntok.training.classifier import load_judge
        from dyntok.training.data import find_samples
        from dyntok.training.evaluate import evaluate
        from dyntok.training.recipe import Teacher
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(str(error.name), "train") from error

    samples = [sample for sample in find_samples(options.data, options.split) if sample.key.startswith(options.keys)]
    if not samples:
        raise DataError(f"no key of an image in {', '.join(options.data)} begins with {options.keys!r}")
    teacher = (
        load_judge(Teacher(options.teacher, options.teacher_weights, options.teacher_args)) if options.teacher else None
    )
    with tqdm(desc="eval", unit=" images", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = evaluate(
            load(options.model, device=options.device),
            samples,
            policy=keep_options(options),
            positions=not options.without_positions,
            selection=options.selection,
            teacher=teacher,
            probe_samples=find_samples(options.data, "train") if options.probe else None,
            probe_prefix=options.probe_keys,
            limit=options.limit,
            progress=progress,
        )
    if options.json:
        print_json(report.to_dict())
    else:
        print(report.table())
    return SOME_SKIPPED if report.failures else OK
