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
        details="Run the same command again to resume from the last checkpoint of the folder.",
        example="dyntok train recipe.yaml -o run",
    )
    add.add_argument("recipe", help="a YAML file, or the name of a recipe in the package")
    add.add_argument(
        "-o", "--output", required=True, metavar="FOLDER", help="checkpoints, log and the trained tokenizer"
    )
    add.add_argument("--init", metavar="NAME", help="start from the weights of this tokenizer")
    add.add_argument("--cpu", action="store_true", help="do not use a GPU")


def _train(options: argparse.Namespace) -> int:
    try:
        from dyntok.loading import load
        from dyntok.training.loop import Trainer
        from dyntok.training.recipe import Recipe
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(str(error.name), "train") from error
    recipe = Recipe.find(options.recipe)
    Trainer(recipe, options.output, tokenizer=load(options.init) if options.init else None, cpu=options.cpu).run()
    return OK
