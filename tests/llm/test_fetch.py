"""Pictures of chats from the web: refused unless allowed, and then within limits. A server on this machine is asked."""

import io
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from dyntok.errors import CodeError, ConfigError, ImageError
from dyntok.llm import fetch_image


class Answers(BaseHTTPRequestHandler):
    picture = b""

    def do_GET(self):
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


def test_other_addresses_are_refused():
    with pytest.raises(ImageError, match="expected http:// or https://"):
        fetch_image("file:///etc/hostname")
    with pytest.raises(ImageError, match="can't be fetched"):
        fetch_image("http://127.0.0.1:1/cat.png")
    with pytest.raises(ConfigError, match="timeout is 0"):
        partial(fetch_image, timeout=0)("http://127.0.0.1:1/cat.png")
