"""The built documentation: complete, without warnings, and without requests to other hosts."""

import os
import re
import subprocess
import sys

import pytest
from support.pages import FOLDER, ROOT

from dyntok.cli.main import build_parser

pytest.importorskip("mkdocs")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_site_builds_strictly_with_every_page(site):
    assert {page.stem for page in FOLDER.glob("*.md")} <= {page.stem for page in site.glob("*.html")}


@pytest.mark.slow
def test_no_page_asks_another_host_for_anything(site):
    loaded = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=["']?(https?:)?//[^"'\s>]+""")
    for page in site.glob("*.html"):
        assert not loaded.search(page.read_text(encoding="utf-8")), page.name


@pytest.mark.slow
def test_the_command_reference_has_every_command_and_option(site):
    text = re.sub(r"<[^>]+>", "", (site / "cli.html").read_text(encoding="utf-8"))
    (commands,) = (action for action in build_parser()._actions if action.choices)
    for name, parser in commands.choices.items():
        assert f"dyntok {name}" in text
        for action in parser._actions:
            assert all(option in text for option in action.option_strings if option not in ("-h", "--help")), name


@pytest.mark.slow
def test_the_api_reference_has_every_public_name(site):
    text = (site / "api.html").read_text(encoding="utf-8")
    import dyntok
    import dyntok.batch
    import dyntok.llm

    wanted = {f"dyntok.{name}" for name in dyntok.__all__ if not name.startswith("_")}
    errors = {name for name in wanted if name.endswith("Error")}
    wanted = (wanted - errors) | {name.replace("dyntok.", "dyntok.errors.") for name in errors}
    assert [name for name in sorted(wanted) if f'id="{name}"' not in text] == []


@pytest.mark.slow
def test_the_api_reference_has_inherited_methods_and_what_fields_mean(site):
    text = (site / "api.html").read_text(encoding="utf-8")
    methods = "dyntok.DynamicVisualTokenizer.save_pretrained", "dyntok.VisualVocab.meaning"
    fields = "dyntok.training.stage.Stage.rho", "dyntok.batch.BatchOptions.eod", "dyntok.config.DecoderConfig.placement"
    assert [name for name in (*methods, *fields) if f'id="{name}"' not in text] == []
    assert "target share of kept patches" in text
