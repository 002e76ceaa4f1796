"""Pictures of chats from the web: refused unless allowed, and then within limits. A server on this machine is asked."""

import io
import threading
import time
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from dyntok.errors import CodeError, ConfigError, ImageError
from dyntok.llm import fetch_image
from dyntok.llm.fetch import _is_same_host

DRIPPED = {  # what comes before the bytes that drip
    "/headers": b"HTTP/1.1 200 OK\r\nX-Slow: ",
    "/chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
}
ELSEWHERE = {
    "/host": "http://localhost:{}/cat.png",  # another name, of this machine by chance
    "/port": "http://127.0.0.1:1/cat.png",
    "/ftp": "ftp://127.0.0.1:{}/cat.png",
    "/file": "file:///etc/hostname",
}


class Answers(BaseHTTPRequestHandler):
    picture = b""

    def do_GET(self):
        if self.path in DRIPPED:
            self.wfile.write(DRIPPED[self.path])
            with suppress(OSError):  # nobody listens any longer
                for _ in range(60):
                    self.wfile.write(b"0")
                    time.sleep(0.2)
            return
        if self.path in ELSEWHERE or self.path.startswith("/around"):
            time.sleep(0.5 * self.path.startswith("/around"))
            target = ELSEWHERE.get(self.path, self.path + "d")
            self.send_response(302)
            self.send_header("Location", target.format(self.server.server_port))
            with suppress(OSError):
                self.end_headers()
            return
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/cat.png")
            self.end_headers()
            return
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        if self.path == "/cat.png":
            self.send_header("Content-Length", str(len(self.picture)))
        self.end_headers()
        if self.path == "/slow":
            for _ in range(20):
                self.wfile.write(b"a")
                time.sleep(0.1)
        else:
            self.wfile.write(self.picture)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(photos, monkeypatch):
    file = io.BytesIO()
    Image.fromarray(photos[0]).save(file, "PNG")
    monkeypatch.setattr(Answers, "picture", file.getvalue())
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as answers:
        threading.Thread(target=answers.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{answers.server_port}"
        answers.shutdown()


@pytest.mark.parametrize("path", ["/cat.png", "/unsized", "/moved"])
def test_chats_bring_pictures_of_the_web_where_that_is_allowed(path, server, tokenizer, photos):
    pytest.importorskip("transformers")
    from support.processors import made

    address = server + path
    forms = [
        {"type": "image", "url": address},
        {"type": "image", "image": address},
        {"type": "image_url", "image_url": {"url": address}},
    ]
    refusing, allowing = made(tokenizer), made(tokenizer, fetch=fetch_image)
    chat = [{"role": "user", "content": [{"type": "image", "image": photos[0]}]}]
    wanted = refusing.apply_chat_template(chat)["input_ids"].tolist()
    for form in forms:
        chat = [{"role": "user", "content": [form]}]
        assert allowing.apply_chat_template(chat)["input_ids"].tolist() == wanted
        with pytest.raises(CodeError, match="fetch=dyntok.llm.fetch_image to allow it"):
            refusing.apply_chat_template(chat)


@pytest.mark.parametrize(
    "path, options, message",
    [
        ("/cat.png", {"max_bytes": 100}, "has [0-9,]+ bytes; max_bytes is 100"),
        ("/unsized", {"max_bytes": 100}, "goes on after 100 bytes"),
        ("/slow", {"timeout": 0.3}, "did not come within 0.3 s"),
        ("/missing", {}, "HTTP 404"),
    ],
    ids=["size", "unstated size", "time", "missing"],
)
def test_limits_hold(path, options, message, server):
    with pytest.raises(ImageError, match=message):
        fetch_image(server + path, **options)


@pytest.mark.parametrize("path", [*DRIPPED, "/around"])
def test_the_limit_holds_for_the_whole_call(path, server):
    """Though each of its steps is quick."""
    start = time.monotonic()
    with pytest.raises(ImageError, match="did not come within 1 s"):
        fetch_image(server + path, timeout=1)
    assert time.monotonic() - start < 4


@pytest.mark.parametrize("path", ELSEWHERE)
def test_redirects_to_other_places_are_refused(path, server):
    """Whoever checked the host of an address knows who is asked."""
    message = "HTTP 302 .* is not allowed" if path == "/file" else "redirects to .*, expected the same host and port"
    with pytest.raises(ImageError, match=message):
        fetch_image(server + path)


def test_other_addresses_are_refused():
    with pytest.raises(ImageError, match="expected http:// or https://"):
        fetch_image("file:///etc/hostname")
    with pytest.raises(ImageError, match="can't be fetched"):
        fetch_image("http://127.0.0.1:1/cat.png")
    with pytest.raises(ConfigError, match="timeout is 0"):
        partial(fetch_image, timeout=0)("http://127.0.0.1:1/cat.png")


@pytest.mark.parametrize(
    "one, other, allowed",
    [
        ("http://a/x", "https://a/y", True),
        ("http://a:80/x", "http://a/y", True),
        ("https://a/x", "http://a/y", False),
        ("http://a/x", "https://a:8443/y", False),
        ("http://a:8080/x", "https://a/y", False),
        ("https://a/x", "https://b/y", False),
    ],
)
def test_redirects_stay_on_the_host_and_port_or_turn_to_https(one, other, allowed):
    assert _is_same_host(one, other) == allowed
