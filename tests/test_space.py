"""The Space of `examples/space`, asked over HTTP by Gradio's own client and opened in Chromium."""

import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.web import CHROMIUM

import dyntok

FOLDER = Path(__file__).parents[1] / "examples" / "space"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the package was installed without its checkout")
NEEDS_GRADIO = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None,
    reason="gradio is not installed: pip install -r examples/space/requirements.txt",
)


def test_the_app_is_short():
    assert len((FOLDER / "app.py").read_text().splitlines()) < 60


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where the app answers, started as its README says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet = {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "NO_PROXY": "127.0.0.1"}
    environment = {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    log = tmp_path_factory.mktemp("space") / "log"
    with log.open("w") as file:
        app = subprocess.Popen([sys.executable, FOLDER / "app.py"], env=environment, stdout=file, stderr=file)
    try:
        for _ in range(240):
            if "Running on" in log.read_text() or app.poll() is not None:
                break
            time.sleep(0.5)
        assert "Running on" in log.read_text(), log.read_text()
        yield f"http://127.0.0.1:{port}/"
    finally:
        app.terminate()
        app.wait()


@pytest.mark.slow
@NEEDS_GRADIO
def test_ids_are_those_of_python(address, tmp_path):
    from gradio_client import Client, handle_file

    client, tokenizer, photo = Client(address, verbose=False), dyntok.load(), tmp_path / "photo.png"
    vocab = dyntok.VisualVocab.of(tokenizer, after=0)
    dyntok.example_image().save(photo)
    for budget, learned in ((None, True), (30, False)):
        encoding = tokenizer.encode(photo, places=vocab.layout, budget=budget)
        sheet, ids, line = client.predict(handle_file(photo), 30, learned, api_name="/encode")
        assert ids == " ".join(map(str, vocab.to_ids(encoding)[0].tolist()))
        assert line.startswith(f"{len(encoding.codes[0])} of {int(encoding.grids[0].prod())} patches were kept.")
        assert Image.open(sheet).width > Image.open(sheet).height
        ours = np.asarray(tokenizer.decode(encoding)[0], dtype=int)
        assert abs(np.asarray(Image.open(client.predict(ids, api_name="/decode")), dtype=int) - ours).mean() < 4  # WebP
    for wrong in ("no ids", "0 1"):
        with pytest.raises(Exception, match="invalid literal|expected"):
            client.predict(wrong, api_name="/decode")


@pytest.mark.slow
@NEEDS_GRADIO
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_visitor_encodes_and_decodes(address):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1280, "height": 1000})
        page.goto(address)
        page.get_by_role("button", name="Encode").click(timeout=60_000)
        page.wait_for_selector("text=patches were kept", timeout=60_000)
        written = page.get_by_label("Ids", exact=True).input_value()
        assert len(re.findall(r"\d+", written)) > 30
        page.get_by_role("button", name="Decode").click()
        page.wait_for_selector("#picture img", timeout=60_000)
        chromium.close()
