"""The command `dyntok train`. Nothing of the extra `train` is imported before it runs."""

import argparse
from typing import TYPE_CHECKING

from dyntok.cli.arguments import OK, add_command
from dyntok.errors import MissingDependencyError

if TYPE_CHECKING:
    from dyntok.cli.arguments import Commands


def add_train(commands: "Commands") -> None:
    """Add the command `train`."""
    add = add_command(
        commands,
        "train",
        _train,
        summary="Train a tokenizer from a recipe.",
        details="Run the same command again to resume from the last checkpoint. The recipe `quickstart` takes any "
        "folder of photographs and about ten minutes on two CPU cores.",
        example="dyntok train quickstart --data photos/ -o runs/first",
    )
    add.add_argument("recipe", help="a YAML file, or the name of a recipe in the package, such as quickstart")
    add.add_argument(
        "-o", "--output", required=True, metavar="FOLDER", help="checkpoints, log and the trained tokenizer"
    )
    add.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="folders of images, webdataset tars, and with `stream` Parquet files; replaces the recipe's",
    )
    add.add_argument("--init", metavar="NAME", help="start from the weights of this tokenizer")
    add.add_argument("--cpu", action="store_true", help="do not use a GPU")
    add.add_argument(
        "--dry-run", action="store_true", help="check everything and estimate the time of each stage; write nothing"
    )


def _train(options: argparse.Namespace) -> int:
    try:
        import torch

        from dyntok.loading import load
        from dyntok.training.dry_run import estimate
        from dyntok.training.loop import Trainer
        from dyntok.training.recipe import Recipe
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(str(error.name), "train") from error
    recipe = Recipe.find(options.recipe, data=options.data)
    start = load(options.init) if options.init else None
    with torch.random.fork_rng():  # a run seeds the global generators
        trainer = Trainer(recipe, options.output, tokenizer=start, cpu=options.cpu)
        if options.dry_run:
            print(estimate(trainer).table())
        else:
            trainer.run()
    return OK
