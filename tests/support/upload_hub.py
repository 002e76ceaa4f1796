"""A small Hugging Face hub on this machine's loopback interface that takes uploads of the real client."""

import base64
import functools
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The routes that an upload needs; everything is sent as an ordinary file."""

    files: dict[str, bytes] = {}
    commits: list[tuple[str, str, list[str]]] = []  # path, authorization, what was done in order

    def do_POST(self):
        body = (
            self.rfile.read(int(self.headers["Content-Length"]))
            if "Content-Length" in self.headers
            else b"".join(self.chunks())
        )
        if self.path == "/api/repos/create":
            request = json.loads(body)
            if request["organization"] == "forbidden":
                return self.answer({"error": "You don't have the rights"}, 403)
            return self.answer({"url": f"http://127.0.0.1/{request['organization']}/{request['name']}"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return self.answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        done = []
        for line in body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif key == "deletedFile":
                del self.files[value["path"]]
            done.append(f"{key} {value.get('path', value.get('summary'))}")
        self.commits.append((self.path, self.headers["Authorization"], done))
        self.answer(
            {"commitUrl": f"http://127.0.0.1/org/name/commit/{COMMIT}", "commitOid": COMMIT, "pullRequestUrl": None}
        )

    def do_GET(self):
        if "/tree/" not in self.path:  # is the repository there, though it can't be made?
            return self.answer({"error": "Repository not found"}, 404)
        self.answer([{"type": "file", "path": name, "size": len(raw), "oid": "0"} for name, raw in self.files.items()])

    def chunks(self):
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def answer(self, value, status=200):
        raw = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_):
        pass


@contextmanager
def receive(monkeypatch, files):
    """A running hub with these files in every repository; the client is pointed at it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", functools.partial(huggingface_hub.HfApi, endpoint=endpoint))
    monkeypatch.setattr(Hub, "files", dict(files))
    monkeypatch.setattr(Hub, "commits", [])
    try:
        yield Hub
    finally:
        server.shutdown()
        server.server_close()
