"""The page as a visitor uses it in headless Chromium: dropping, copying, pasting wrong text, and the keyboard alone."""

import base64
import json

import numpy as np
import pytest
from support.web import NEEDS_BROWSER, browser, png, settle

import dyntok

pytestmark = NEEDS_BROWSER
DROP = """([name, mime, data]) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const files = new DataTransfer();
  files.items.add(new File([bytes], name, { type: mime }));
  const send = (kind) => dispatchEvent(new DragEvent(kind, { dataTransfer: files, bubbles: true, cancelable: true }));
  send("dragover");
  const invited = !document.getElementById("drop").hidden;
  return [invited, send("drop")];
}"""


@pytest.fixture(scope="module")
def opened(bundled_site):
    with browser(bundled_site, viewport={"width": 1280, "height": 1000}) as (page, wrong):
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        yield page
    assert wrong == []


def drop(page, name, data, mime="image/png"):
    invited, unhandled = page.evaluate(DROP, [name, mime, base64.b64encode(data).decode()])
    assert invited and not unhandled  # otherwise the browser would leave the page for the file
    settle(page)
    assert page.is_hidden("#drop")


def drop_photo(page, photo):
    drop(page, "photo.png", png(photo))


def copied(page, kind):
    """Returns what a button puts on the clipboard."""
    page.evaluate("document.getElementById('copied').textContent = ''")
    page.click(f"[data-copy={kind}]")
    page.wait_for_function("document.getElementById('copied').textContent.includes('characters copied')")
    return page.evaluate("navigator.clipboard.readText()")


def paste(page, text):
    page.fill("#pasted", text)
    page.click("#paste button")
    settle(page)


def state(page):
    return page.evaluate("[dyntok.state.codes, dyntok.state.kept, dyntok.state.grid]")


def test_a_dropped_file_is_encoded(opened, photos):
    drop_photo(opened, photos[1])
    encoding = dyntok.load().encode(photos[1])
    assert state(opened)[:2] == [encoding.codes[0].tolist(), encoding.positions[0].tolist()]
    assert opened.locator("#examples [aria-pressed=true]").count() == 0


def test_a_dropped_file_that_is_no_picture(opened):
    before = state(opened)
    drop(opened, "letter.txt", b"Dear reader", "text/plain")
    assert "letter.txt can't be read as a picture" in opened.inner_text("#message")
    assert state(opened) == before


def test_the_copied_line_of_python_runs_and_gives_the_picture(opened, photos):
    drop_photo(opened, photos[0])
    line = copied(opened, "python")
    ours = np.asarray(eval(line, {"dyntok": dyntok})).astype(int)  # as in a shell of Python after `import dyntok`
    theirs = np.reshape(opened.evaluate("[...dyntok.state.result]"), ours.shape)
    assert abs(ours - theirs).max() <= 1


@pytest.mark.parametrize("kind", ["codes", "text", "json", "python"])
def test_what_a_button_copies_can_be_pasted(kind, opened, photos):
    drop_photo(opened, photos[2])
    codes, kept, grid = state(opened)
    text = copied(opened, kind)
    if kind == "json":
        assert dyntok.Encoding.from_dict(json.loads(text)).codes[0].tolist() == codes
    paste(opened, text)
    assert opened.is_hidden("#message")
    assert state(opened)[0] == codes
    if kind != "codes":  # plain integers hold no places
        assert state(opened) == [codes, kept, grid]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a cat on a sofa", "No codes are in this text"),
        ('{"codes": [[1, 2', "begins like JSON but is not complete"),
        ('{"codes": [[1]], "fingerprint": "0000000000000000"}', "of the tokenizer 0000000000000000"),
        ("1 2 99999999", "99999999 is no code"),
    ],
)
def test_pasting_wrong_text_says_why_and_keeps_the_picture(text, message, opened, photos):
    drop_photo(opened, photos[0])
    before = state(opened)
    paste(opened, text)
    assert message in opened.inner_text("#message")
    assert state(opened) == before and opened.is_enabled("#length")


def tab_to(page, selector):
    """Press Tab until an element has the focus, which must be visible there."""
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("(name) => document.activeElement.matches(name)", selector):
            return
    pytest.fail(f"Tab does not reach {selector}")


def test_the_keyboard_is_enough(opened):
    opened.reload()
    opened.wait_for_selector("html[data-ready]", timeout=60_000)
    press = opened.keyboard.press
    tab_to(opened, "#examples button:nth-child(2)")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert opened.evaluate(outline) == "solid"
    press("Enter")
    settle(opened)
    assert opened.get_attribute("#examples button:nth-child(2)", "aria-pressed") == "true"
    tab_to(opened, "#file")
    tab_to(opened, "#length")
    press("Home")
    settle(opened)
    assert opened.inner_text("#count") == "8" == str(len(state(opened)[0]))
    tab_to(opened, "#strip button")
    press("ArrowRight")
    press("Enter")
    assert opened.is_visible("#editor")
    before = state(opened)[0]
    tab_to(opened, "#code")
    opened.keyboard.type(str((before[1] + 1) % 8192))  # the field's content is selected when the focus comes
    press("Enter")
    settle(opened)
    assert state(opened)[0] == [before[0], (before[1] + 1) % 8192, *before[2:]]
    tab_to(opened, "#pasted")
    opened.keyboard.type("1 2 3")
    tab_to(opened, "#paste button")
    press("Enter")
    settle(opened)
    assert state(opened)[0] == [1, 2, 3]


def test_a_code_is_not_exchanged_in_codes_that_came_meanwhile(opened, photos):
    drop_photo(opened, photos[0])
    opened.evaluate("() => { dyntok.setLength(8); dyntok.exchange(40, 5); }")
    settle(opened)
    assert state(opened)[0] == dyntok.load().encode(photos[0], budget=8).codes[0].tolist()
