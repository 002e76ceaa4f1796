"""`dyntok page` and `dyntok serve`: the folder, what it takes from onnxruntime-web, and the server."""

import json
import re
import tarfile
import threading
import urllib.error
import urllib.request

import pytest
from support.web import empty_runtime, served

from dyntok.cli.main import main
from dyntok.page.build import SITE, facts
from dyntok.page.serve import make_server, serve


@pytest.fixture(scope="module")
def site(checkpoint_folder, tmp_path_factory):
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("web")
    runtime = empty_runtime(folder / "onnxruntime-web")
    arguments = ["page", "-o", str(folder / "site"), "--model", str(checkpoint_folder), "--runtime", str(runtime)]
    assert main(arguments) == 0
    return folder / "site"


def test_the_folder_is_complete(site):
    page = (site / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert "app.js" in links and all((site / link).is_file() for link in links)
    for script in site.glob("*.js"):
        imports = re.findall(r'from "\./([^"]+)"', script.read_text(encoding="utf-8"))
        assert all((site / name).is_file() for name in imports), script
    for name in ("model/score.onnx", "model/codes.onnx", "model/picture.onnx", "runtime/ort.wasm.min.mjs"):
        assert (site / name).is_file()
    for graph in (site / "model").iterdir():
        assert b".py" not in graph.read_bytes(), "names of source files on the machine that made it"
    assert len(list((site / "photos").iterdir())) == 6


def test_no_file_of_ours_names_another_host():
    for path in SITE.glob("*.*"):
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z0-9-]+\.", text), path


def test_every_photograph_and_the_runtime_have_their_license():
    text = (SITE / "licenses.txt").read_text(encoding="utf-8")
    assert "MIT License" in text and "Copyright (c) Microsoft Corporation" in text
    assert all(f"  {path.stem} " in text for path in (SITE / "photos").iterdir())


def test_the_page_knows_the_tokenizer(site, tokenizer):
    written = json.loads((site / "page.json").read_text(encoding="utf-8"))
    assert written == facts(tokenizer, webgpu=False) | {"name": written["name"]}
    assert written["codes"] == 256 and written["grid"] == [8, 8] and written["fingerprint"] == tokenizer.fingerprint


def test_the_archive_of_npm_is_read(checkpoint_folder, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    runtime = empty_runtime(tmp_path / "package")
    with tarfile.open(tmp_path / "ort.tgz", "w:gz") as archive:
        archive.add(runtime, "package")
    arguments = ["page", "-o", str(tmp_path / "site"), "--model", str(checkpoint_folder)]
    assert main([*arguments, "--runtime", str(tmp_path / "ort.tgz")]) == 0
    assert (tmp_path / "site" / "runtime" / "ort-wasm-simd-threaded.wasm").is_file()
    assert "next: dyntok serve" in capsys.readouterr().out
    assert main([*arguments, "--runtime", str(tmp_path / "ort.tgz"), "--webgpu"]) == 1
    assert "lacks ort.webgpu.min.mjs" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"not an archive"])
def test_a_runtime_that_is_missing_or_broken(content, checkpoint_folder, tmp_path, capsys):
    if content:
        (tmp_path / "ort.tgz").write_bytes(content)
    arguments = ["page", "-o", str(tmp_path / "site"), "--model", str(checkpoint_folder)]
    assert main([*arguments, "--runtime", str(tmp_path / "ort.tgz")]) == 1
    assert "npm pack onnxruntime-web" in capsys.readouterr().err


def test_the_server_serves_the_folder_alone(site):
    with served(site) as home:
        assert home.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(home + "runtime/ort-wasm-simd-threaded.wasm") as answer:
            assert answer.headers["Content-Type"] == "application/wasm"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(home + "../secret")


def test_serve_wants_a_page(tmp_path, capsys):
    assert main(["serve", str(tmp_path)]) == 1
    assert "holds no index.html" in capsys.readouterr().err


def test_a_browser_of_the_console_is_answered(site, monkeypatch):
    """It runs in the terminal, and its call returns when the user is done with the page."""
    server, read = make_server(site), []

    def console_browser(address):
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                read.append(answer.read())
        finally:  # by another thread, as the call would wait for a server that has not begun
            threading.Thread(target=server.shutdown, daemon=True).start()

    monkeypatch.setattr("webbrowser.open", console_browser)
    serve(server)
    assert read == [(site / "index.html").read_bytes()]
