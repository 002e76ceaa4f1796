"""`import dyntok` alone makes the `Auto` classes of transformers know a tokenizer, before transformers and after it."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("transformers")

WAITING = "[type(finder).__module__ for finder in sys.meta_path].count('dyntok.registration')"
AUTO = "from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor"
USE = f"""
folder = sys.argv[1]
pixels = AutoImageProcessor.from_pretrained(folder)(dyntok.example_image())["pixel_values"]
tokens = AutoModel.from_pretrained(folder).get_image_tokens(pixels)[0]
processor = AutoProcessor.from_pretrained(folder + "/language", local_files_only=True)
kind = AutoConfig.from_pretrained(folder).model_type
print(json.dumps([tokens.tolist(), type(processor).__name__, kind, {WAITING}]))
"""


def run(program, *arguments, warnings="error"):
    """Returns what a new Python printed and complained about; an import that registers nothing complains."""
    command = [
        sys.executable,
        "-W",
        f"{warnings}::ImportWarning:dyntok.registration",
        "-c",
        f"import json, sys\n{program}",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([*command, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize(
    "before", ["import transformers", "sys.modules['transformers'] = None"], ids=["lazy", "absent"]
)
def test_the_import_loads_nothing(before):
    names = "[name for name in ('torch', 'dyntok.llm', 'transformers.models.auto') if name in sys.modules]"
    assert run(f"{before}\nimport dyntok\nprint(json.dumps([{names}, {WAITING}]))")[0] == [[], 1]


@pytest.mark.parametrize(
    "configurations, reason",
    [
        ("class PretrainedConfig: ...", "ImportError: cannot import name"),
        ("class PreTrainedConfig: ...", "AttributeError: 'int' object has no attribute 'register'"),
    ],
    ids=["too old", "changed"],
)
def test_a_transformers_that_does_not_fit_goes_on(configurations, reason, tmp_path):
    for folder in ("", "models", "models/auto"):
        (tmp_path / "transformers" / folder).mkdir()
        (tmp_path / "transformers" / folder / "__init__.py").touch()
    (tmp_path / "transformers" / "configuration_utils.py").write_text(configurations)
    (tmp_path / "transformers" / "models" / "auto" / "configuration_auto.py").write_text("AutoConfig = 4")
    program = (
        "sys.path.insert(0, sys.argv[1])\nimport dyntok\nimport transformers.models.auto.configuration_auto as old"
    )
    printed, complaint = run(f"{program}\nprint(old.AutoConfig)", tmp_path, warnings="always")
    assert printed == 4 and f"transformers does not know dyntok's classes ({reason}" in complaint


@pytest.mark.parametrize("first", ["AutoConfig", pytest.param("AutoProcessor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("order", ["dyntok first", "transformers first"])
def test_either_may_be_imported_first(order, first, tokenizer, tmp_path):
    """Also where the first class that is asked for is not the first one that transformers loads."""
    from support.processors import made

    import dyntok

    lines = ["import dyntok", f"from transformers import {first}"]
    program = "\n".join(lines if order == "dyntok first" else lines[::-1])
    tokenizer.save_pretrained(tmp_path)
    if first == "AutoConfig":
        code = "print(json.dumps(AutoConfig.from_pretrained(sys.argv[1]).model_type))"
        assert run(f"{program}\n{code}", tmp_path)[0] == "dyntok"
        return
    made(tokenizer).save_pretrained(tmp_path / "language")
    codes = tokenizer.encode(dyntok.example_image()).codes[0].tolist()
    assert run(f"{program}\n{AUTO}\n{USE}", tmp_path)[0] == [codes, "VisualProcessor", "dyntok", 0]
