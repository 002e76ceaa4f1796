"""Measures the web page in headless Chromium: size, time to the first picture, per slider step, and equal codes.

dyntok page -o site --runtime onnxruntime-web-1.30.0.tgz
python benchmarks/page.py site --photos PHOTOS.tar

`--screenshots docs/` makes the screenshots of the documentation instead.
"""

import argparse
import base64
import io
import json
import random
import shutil
import statistics
import tarfile
import threading
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from timing import environment

import dyntok
from dyntok.page.serve import address, make_server

# width, height, color scheme, and which of the page's photographs
_SCREENSHOTS = [(1280, 900, "light", 3), (1280, 900, "dark", 2), (360, 740, "light", 3), (360, 740, "dark", 2)]
_STEP = "async (n) => { const t = performance.now(); await dyntok.setLength(n); return performance.now() - t; }"
_ENCODE = """async (bytes) => {
  const blob = await (await fetch(`data:image/jpeg;base64,${bytes}`)).blob();
  await dyntok.openFile(new File([blob], "photo.jpg"));
  return [dyntok.state.codes, dyntok.state.kept];
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path)
    parser.add_argument(
        "--photos", type=Path, help="a tar of JPEG files, to compare the codes of them and of tall and wide strips"
    )
    parser.add_argument("--model")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--screenshots", type=Path, metavar="FOLDER", help="write screenshots and measure nothing")
    options = parser.parse_args()
    server = make_server(options.site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    files = [path for path in options.site.rglob("*") if path.is_file()]
    found: dict[str, Any] = {"megabytes": sum(path.stat().st_size for path in files) / 1e6}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        if options.screenshots:
            screenshots(browser, address(server), options.screenshots)
            return
        page, found["first_picture_ms"] = opened(browser, address(server))
        found["slider_step_ms"] = slider(page)
        if options.photos:
            found |= equal_codes(page, options)
    print(json.dumps(found | environment(), indent=1))


def screenshots(browser: Browser, home: str, folder: Path) -> None:
    """Write the page at two widths, light and dark; the wide ones with a code pointed at."""
    for width, height, scheme, photo in _SCREENSHOTS:
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.goto(home)
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        page.click(f"#examples button:nth-child({photo})")
        page.wait_for_selector(f"#examples button:nth-child({photo})[aria-pressed=true]")
        page.wait_for_function("!document.body.classList.contains('busy')", timeout=60_000)
        if width > 640:
            page.hover("#strip button:nth-child(31)")
        page.wait_for_timeout(1000)  # for the files of JPEG and WebP
        picture = Image.open(io.BytesIO(page.screenshot()))
        picture.save(folder / f"page-{width}-{scheme}.webp", quality=82, method=6)
        page.close()


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
    """Returns how many photographs, strips of them, and codes are the same in the page and in Python."""
    tokenizer = dyntok.load(options.model)
    with tarfile.open(options.photos) as archive:
        members = [member for member in archive if member.name.endswith(".jpg")]
        chosen = random.Random(0).sample(members, min(options.limit, len(members)))
        photos = [archive.extractfile(member).read() for member in chosen]  # type: ignore[union-attr]
    cut = [strip(photo, tall) for photo in photos[: len(photos) // 10] for tall in (True, False)]
    return {"photographs": compared(page, tokenizer, photos), "tall_and_wide": compared(page, tokenizer, cut)}


def strip(photo: bytes, tall: bool) -> bytes:
    """Returns the middle of a photograph as a JPEG file, a sixth of it wide or high."""
    image = Image.open(io.BytesIO(photo))
    across, down = (image.width * 5 // 12, 0) if tall else (0, image.height * 5 // 12)
    file = io.BytesIO()
    image.crop((across, down, image.width - across, image.height - down)).save(file, "JPEG", quality=95)
    return file.getvalue()


def compared(page: Page, tokenizer: Any, photos: list[bytes]) -> dict[str, int]:
    """Returns the numbers of photographs and of codes, and how many of each are the same."""
    found = {"number": len(photos), "same": 0, "codes": 0, "same_codes": 0}
    for data in photos:
        theirs, kept = page.evaluate(_ENCODE, base64.b64encode(data).decode())
        ours = tokenizer.encode(data)
        pairs = dict(zip(kept, theirs, strict=True))
        own = dict(zip(ours.positions[0].tolist(), ours.codes[0].tolist(), strict=True))
        found["same"] += own == pairs
        found["codes"] += len(own)
        found["same_codes"] += sum(pairs.get(place) == code for place, code in own.items())
    return found


if __name__ == "__main__":
    main()
