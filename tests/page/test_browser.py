"""The page in headless Chromium, with the bundled tokenizer and npm's onnxruntime-web.

The pictures that Chromium decodes are PNG files, whose pixels are the same everywhere.
"""

import re

import numpy as np
import pytest
from PIL import Image
from support.web import NEEDS_BROWSER, browser, png, settle

import dyntok

pytestmark = NEEDS_BROWSER


@pytest.fixture(scope="module")
def opened(bundled_site):
    with browser(bundled_site, viewport={"width": 1280, "height": 1000}) as (page, wrong):
        yield page
    assert wrong == []  # no script failed, and no other host was asked


def choose(page, name, data, mime="image/png"):
    page.set_input_files("#file", {"name": name, "mimeType": mime, "buffer": data})
    settle(page)


def codes(page):
    return page.evaluate("dyntok.state.codes")


def test_codes_are_those_of_python(opened, photos):
    tokenizer = dyntok.load()
    for photo in photos[:4]:
        choose(opened, "photo.png", png(photo))
        encoding = tokenizer.encode(photo)
        assert codes(opened) == encoding.codes[0].tolist()
        assert opened.evaluate("dyntok.state.kept") == encoding.positions[0].tolist()
        ours = np.asarray(tokenizer.decode(encoding)[0]).astype(int)
        theirs = np.reshape(list(opened.evaluate("Object.values(dyntok.state.result)")), ours.shape)
        assert abs(ours - theirs).max() <= 1


def test_the_slider_sets_the_number_of_codes(opened, photos):
    choose(opened, "photo.png", png(photos[0]))
    opened.locator("#length").fill("40")
    settle(opened)
    assert codes(opened) == dyntok.load().encode(photos[0], budget=40).codes[0].tolist()
    assert opened.locator("#strip button").count() == 40 and opened.inner_text("#count") == "40"
    opened.locator("#length").press("ArrowRight")
    settle(opened)
    assert len(codes(opened)) == 41
    opened.click("#learned")
    settle(opened)
    assert opened.inner_text("#count") == re.search(r"\d+", opened.inner_text("#learned"))[0]


def test_a_code_lights_up_its_patch_and_back(opened):
    settle(opened)
    opened.hover("#strip button:nth-child(3)")
    area, spot = (opened.locator(name).first.bounding_box() for name in ("#result", ".lit .spot >> nth=2"))
    position = opened.evaluate("dyntok.state.kept[2]")
    row, column = divmod(position, 16)
    assert abs(spot["x"] - area["x"] - column / 16 * area["width"]) < 3
    assert abs(spot["y"] - area["y"] - row / 16 * area["height"]) < 3
    row, column = divmod(opened.evaluate("dyntok.state.kept[5]"), 16)
    side = area["width"] / 16
    opened.hover("#patches", position={"x": (column + 0.5) * side, "y": (row + 0.5) * side})
    assert "lit" in opened.locator("#strip button").nth(5).get_attribute("class")
    opened.locator("#strip button").nth(5).focus()
    opened.keyboard.press("ArrowRight")
    assert "lit" in opened.locator("#strip button").nth(6).get_attribute("class")


def test_an_exchanged_code_changes_the_picture_and_can_be_put_back(opened, photos):
    choose(opened, "photo.png", png(photos[0]))
    before, first = opened.evaluate("[[...dyntok.state.result], dyntok.state.codes[0]]")
    opened.click("#strip button:nth-child(1)")
    opened.fill("#code", str((first + 1000) % 8192))
    opened.click("#editor button[type=submit]")
    settle(opened)
    assert codes(opened)[0] == (first + 1000) % 8192 and opened.evaluate("[...dyntok.state.result]") != before
    opened.click("#restore")
    settle(opened)
    assert opened.evaluate("[...dyntok.state.result]") == before


def test_pasted_codes_become_a_picture(opened):
    tokenizer = dyntok.load()
    opened.fill("#pasted", "525 4821 7815")
    opened.click("#paste button")
    settle(opened)
    ours = np.asarray(tokenizer.decode([[525, 4821, 7815]])[0]).astype(int)
    theirs = np.reshape(opened.evaluate("[...dyntok.state.result]"), ours.shape)
    assert abs(ours - theirs).max() <= 1 and opened.is_disabled("#length")
    opened.fill("#pasted", str(tokenizer.vocab_size))
    opened.click("#paste button")
    settle(opened)
    assert f"{tokenizer.vocab_size} is no code" in opened.inner_text("#message")


def test_a_broken_file_is_an_error_and_the_page_goes_on(opened, photos):
    choose(opened, "broken.jpg", b"\xff\xd8\xff\xe0 not a photograph", "image/jpeg")
    assert "broken.jpg can't be read as a picture" in opened.inner_text("#message")
    choose(opened, "photo.png", png(photos[2]))
    assert opened.is_hidden("#message")


def test_fifty_megapixels(opened, photos):
    large = Image.fromarray(photos[0]).resize((8192, 6144))
    choose(opened, "large.png", png(np.asarray(large)))
    expected = dyntok.load().encode(large).codes[0].tolist()
    assert opened.is_hidden("#message") and codes(opened) == expected


def test_a_limit_of_patches_gives_another_grid(opened, photos):
    for photo in photos[1:5:3]:  # a wide and a tall one
        choose(opened, "photo.png", png(photo))
        opened.select_option("#max-patches", "128")
        settle(opened)
        encoding = dyntok.load().encode(photo, max_patches=128)
        assert opened.evaluate("dyntok.state.grid") == encoding.grids[0].tolist()
        assert codes(opened) == encoding.codes[0].tolist()
        opened.select_option("#max-patches", "256")
        settle(opened)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(opened, scheme):
    page = opened.context.browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page.goto(opened.url)
    page.wait_for_selector("html[data-ready]", timeout=60_000)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("[...document.images].every((image) => image.hasAttribute('alt'))")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 384) == (scheme == "light")
    assert "WASM" in page.inner_text("#status") and "ms" in page.inner_text("#status")
    page.close()
