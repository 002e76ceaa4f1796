"""The page before it is ready."""

import base64

from support.web import NEEDS_BROWSER, browser, png, settle

import dyntok

pytestmark = NEEDS_BROWSER


def test_a_photograph_that_comes_while_the_tokenizer_is_loaded(bundled_site, photos):
    data = base64.b64encode(png(photos[1])).decode()
    script = """const timer = setInterval(() => {
      if (!document.querySelector("#examples button")) return;
      clearInterval(timer);
      const bytes = Uint8Array.from(atob("DATA"), (letter) => letter.charCodeAt(0));
      globalThis.early = document.documentElement.dataset.ready === undefined;
      dyntok.openFile(new File([bytes], "photo.png", { type: "image/png" }));
    }, 1);"""
    with browser(bundled_site, script=script.replace("DATA", data)) as (page, wrong):
        settle(page)
        assert (
            page.evaluate("early")
            and page.evaluate("dyntok.state.codes") == dyntok.load().encode(photos[1]).codes[0].tolist()
        )
        assert page.is_hidden("#message") and wrong == []
