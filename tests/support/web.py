"""A page in headless Chromium, and a runtime made of empty files for tests that start no browser.

`DYNTOK_ORT` names the runtime: the .tgz file that `npm pack onnxruntime-web` writes.
"""

import io
import os
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from dyntok.page.build import _CPU_FILES
from dyntok.page.serve import address, make_server

CHROMIUM = shutil.which("chromium")
RUNTIME = os.environ.get("DYNTOK_ORT")
NEEDS_BROWSER = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
    pytest.mark.skipif(RUNTIME is None, reason="DYNTOK_ORT does not name the npm package onnxruntime-web"),
]


def empty_runtime(folder: Path) -> Path:
    """Returns a folder like the npm package's, with files that run nothing."""
    (folder / "dist").mkdir(parents=True)
    for name in _CPU_FILES:
        (folder / "dist" / name).write_bytes(b"//")
    return folder


@contextmanager
def served(folder: Path):
    """Yields the address of the folder on localhost."""
    server = make_server(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address(server)
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def browser(folder: Path, *, script: str = "", **options):
    """Yields a Chromium page that shows the folder and can reach nothing else, and a list of what went wrong in it.

    script: runs before those of the page.
    """
    from playwright.sync_api import sync_playwright

    wrong: list[str] = []
    with served(folder) as home, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page(**options)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: allowed(request.url, home) or wrong.append(f"asked for {request.url}"))
        page.add_init_script(script)
        page.goto(home)
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        yield page, wrong
        chromium.close()


def allowed(url: str, home: str) -> bool:
    return url.startswith((home, "blob:", "data:"))


def settle(page):
    """Wait until the page has nothing left to compute."""
    page.wait_for_timeout(150)
    page.wait_for_function("!document.body.classList.contains('busy')", timeout=60_000)


def png(photo) -> bytes:
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "PNG")
    return file.getvalue()
