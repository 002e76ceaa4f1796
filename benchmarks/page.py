"""Measures the web page in headless Chromium: size, time to the first picture, per slider step, and equal codes.

dyntok page -o site --runtime onnxruntime-web-1.30.0.tgz
python benchmarks/page.py site --photos PHOTOS.tar
"""

import argparse
import json
import random
import shutil
import statistics
import tarfile
import threading
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright
from timing import environment

import dyntok
from dyntok.page.serve import address, make_server

_STEP = "async (n) => { const t = performance.now(); await dyntok.setLength(n); return performance.now() - t; }"
_ENCODE = """async (bytes) => {
  const blob = await (await fetch(`data:image/jpeg;base64,${bytes}`)).blob();
  await dyntok.openFile(new File([blob], "photo.jpg"));
  return [dyntok.state.codes, dyntok.state.kept];
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path)
    parser.add_argument("--photos", type=Path, help="a tar of JPEG files, to compare codes")
    parser.add_argument("--model")
    parser.add_argument("--limit", type=int, default=100)
    options = parser.parse_args()
    server = make_server(options.site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    files = [path for path in options.site.rglob("*") if path.is_file()]
    found: dict[str, Any] = {"megabytes": sum(path.stat().st_size for path in files) / 1e6}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page, found["first_picture_ms"] = opened(browser, address(server))
        found["slider_step_ms"] = slider(page)
        if options.photos:
            found |= equal_codes(page, options)
    print(json.dumps(found | environment(), indent=1))


def opened(browser: Browser, home: str) -> tuple[Page, float]:
    """Returns a page and the median of 20 times from opening to the first picture, each without a cache."""
    times = []
    for _ in range(20):
        page = browser.new_context().new_page()
        page.goto(home)
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        times.append(float(page.evaluate("document.documentElement.dataset.ready")))
    return page, statistics.median(times)


def slider(page: Page) -> float:
    return statistics.median(page.evaluate(_STEP, 8 + 7 * i) for i in range(20))


def equal_codes(page: Page, options: argparse.Namespace) -> dict[str, Any]:
    """Returns how many photographs and codes are the same in the page and in Python."""
    import base64

    tokenizer = dyntok.load(options.model)
    same = codes = equal = 0
    with tarfile.open(options.photos) as archive:
        members = [member for member in archive if member.name.endswith(".jpg")]
        for member in random.Random(0).sample(members, options.limit):
            data = archive.extractfile(member).read()  # type: ignore[union-attr]
            theirs, kept = page.evaluate(_ENCODE, base64.b64encode(data).decode())
            ours = tokenizer.encode(data)
            pairs = dict(zip(kept, theirs, strict=True))
            own = dict(zip(ours.positions[0].tolist(), ours.codes[0].tolist(), strict=True))
            same += own == pairs
            codes += len(own)
            equal += sum(pairs.get(place) == code for place, code in own.items())
    return {"photographs": options.limit, "same_photographs": same, "codes": codes, "equal_codes": equal / codes}


if __name__ == "__main__":
    main()
