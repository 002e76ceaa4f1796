"""Every code block of README and docs runs, and shows the output that it has."""

import ast
import functools
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from support.pages import PAGES, ROOT, Block, Session, arguments, blocks, commands

import dyntok
from dyntok.cli.main import build_parser

BLOCKS = [block for page in PAGES for block in blocks(page)]
LANGUAGES = {"python", "sh", "console", "yaml", "text", "bibtex"}
SLOW = {"docs/batch.md", "docs/export.md", "docs/training.md"}  # these start processes, export or train


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def reader(photos, tmp_path, monkeypatch):
    """The folder in which a reader follows the pages: photographs in every form that the pages name."""
    from support.batch_data import pictures, tar_members, write_folder, write_table, write_tar

    monkeypatch.chdir(tmp_path)
    images = pictures(photos, 12)
    write_folder("photos", {key.replace("/", "-"): content for key, content in images.items()})
    Path("shards").mkdir()
    members = tar_members(images)
    write_tar("shards/000.tar", members[:12])
    write_tar("shards/001.tar", members[12:])
    write_table("images.parquet", images)
    Image.fromarray(photos[2]).save("cat.jpg")
    Image.fromarray(photos[1]).save("dog.png")
    Path("broken.jpg").write_bytes(Path("cat.jpg").read_bytes()[:1000])
    return tmp_path


@pytest.fixture
def language_model(reader):
    """A small Llama in place of the model that the page downloads, and the codes of captioned pictures."""
    transformers = pytest.importorskip("transformers")
    from support.batch_data import run
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(["a photograph of a cat on a red chair, what is it? user: assistant:"] * 9, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes))
    run("shards/*.tar", "captioned", None, keep_columns=("txt",))
    return {"tokenizer": tokenizer, "model": model}


@pytest.fixture
def lavit_release(reader, parity, monkeypatch):
    """LaVIT's files at a small size, in a folder with the name of the hub's repository."""
    from support.lavit_files import write_release

    write_release(parity, reader / "rain1011" / "LaVIT-7B-v2")
    monkeypatch.setattr(dyntok, "load", functools.partial(dyntok.load, config=parity.config))
    return {}


@pytest.fixture
def compiler(reader, monkeypatch):
    """`torch.compile` without code generation where there is no C++ compiler."""
    pytest.importorskip("onnxscript")
    if shutil.which("c++") is None:
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    return {}


PREPARED = {
    "docs/llm.md": "language_model",
    "docs/engines.md": "language_model",
    "docs/lavit.md": "lavit_release",
    "docs/export.md": "compiler",
}


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=named(page), marks=[pytest.mark.slow] * (named(page) in SLOW)) for page in PAGES],
)
def test_the_blocks_of_a_page_run_from_top_to_bottom(page, reader, request):
    if named(page) == "docs/batch.md":
        pytest.importorskip("datasets")
    if named(page) == "docs/engines.md":
        pytest.importorskip("litdata")
    session = Session(dict(request.getfixturevalue(PREPARED[named(page)])) if named(page) in PREPARED else {})
    for block in blocks(page):
        if block.reason is None:
            session.run(block)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_can_be_read(block):
    """Also those that do not run here: Python compiles, commands fit the parser, YAML loads."""
    assert block.language in LANGUAGES, "name the language of the block"
    if block.language == "python":
        ast.parse(block.code)
    elif block.language == "yaml":
        assert isinstance(yaml.safe_load(block.code), dict)
    elif block.language in ("sh", "console"):
        for line, _ in commands(block):
            for command in line.split("&&"):
                check_command(block, arguments(command))


def check_command(block: Block, words: list[str]) -> None:
    if words[:4] == ["accelerate", "launch", "-m", "dyntok.cli"]:
        words = ["dyntok", *words[4:]]
    if words[0] == "dyntok":
        build_parser().parse_args(words[1:])
        return
    assert block.reason is not None, f"{block}: {words[0]} is not run here; mark the block"
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"no target {words[1]}"
    elif words[0] == "python":
        assert (ROOT / words[1]).exists(), f"{words[1]} does not exist"
    elif words[0] == "pip":
        extras = re.findall(r"\[([\w,]+)\]", " ".join(words))
        metadata = (ROOT / "pyproject.toml").read_text() + (ROOT / "setup.py").read_text()
        assert all(f"{extra} = [" in metadata for names in extras for extra in names.split(","))
    else:
        assert words[0] in ("git", "cd", "ray", "npm"), f"{block}: unknown command {words[0]}"


def test_blocks_that_do_not_run_are_few_and_give_a_reason():
    skipped = [block for block in BLOCKS if block.reason is not None]
    assert all(len(block.reason) > 10 for block in skipped)
    assert len(skipped) < len([block for block in BLOCKS if block.language in ("python", "sh", "console")]) / 2
