"""Facts on the pages that the code knows: the sizes of tokenizers, and the errors that have an entry."""

import ast
import re

import pytest
from support.pages import FOLDER, ROOT

import dyntok
from dyntok.cli.main import main
from dyntok.config import TokenizerConfig
from dyntok.loading import PRETRAINED
from dyntok.training.grids import Grids
from dyntok.training.recipe import Recipe

SIZES = re.compile(r"^\| `(\w)` \| [^|]+ \| ([\d,]+) \| ([\d,]+) \|$", re.MULTILINE)
ENTRY = re.compile(r"^\*\*`([^`]+)`\.\*\*", re.MULTILINE)


def test_the_sizes_of_tokenizers():
    rows = SIZES.findall((FOLDER / "how-it-works.md").read_text(encoding="utf-8"))
    stated = [{row[0]: int(row[column].replace(",", "")) for row in rows} for column in (1, 2)]
    tokenizer, lavit = dyntok.load(), TokenizerConfig.preset("lavit")
    for sizes, config, width in (
        (stated[0], tokenizer.config, tokenizer.backbone.embed_dim),
        (stated[1], lavit, 1408),  # of `eva_giant_patch14_clip_224`
    ):
        codebook = config.codebook
        assert sizes == {"D": width, "H": config.merger.num_heads, "C": codebook.dim, "K": codebook.size}


@pytest.mark.parametrize("name", ["flex", "tiny"])
def test_the_number_of_parameters_is_that_of_info(name, capsys):
    assert main(["info", name]) == 0
    (count,) = re.findall(r"^parameters +([\d,]+), codebook included$", capsys.readouterr().out, re.MULTILINE)
    words = f"has {int(count.replace(',', '')) / 1e6:.1f} million parameters, codebook included,"
    assert words in (PRETRAINED / name / "README.md").read_text(encoding="utf-8")
    assert name != "flex" or words in (FOLDER / "quality.md").read_text(encoding="utf-8")


def test_how_much_training_enlarges_pictures():
    """A crop of the smallest share, of the smallest picture that is not replaced."""
    stated = f"enlarged up to {1 / (Grids().min_scale * Recipe.min_crop):.2f} times"
    assert stated in (FOLDER / "training.md").read_text(encoding="utf-8")


def messages():
    """Returns the parts of all texts in the package, without what is filled in."""
    for path in (ROOT / "dyntok").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


@pytest.mark.parametrize("entry", ENTRY.findall((FOLDER / "troubleshooting.md").read_text(encoding="utf-8")))
def test_errors_have_the_words_that_they_are_found_by(entry):
    known = list(messages())
    for words in filter(None, map(str.strip, entry.split("..."))):
        assert any(words in message for message in known), words
