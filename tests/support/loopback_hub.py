"""A small Hugging Face hub on this machine's loopback interface, for the real client."""

import hashlib
import json
import socket
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret"


class Hub(BaseHTTPRequestHandler):
    """The four routes of a download: revision, tree, HEAD and GET of a file (from a byte on where Range says so)."""

    repos: dict[str, dict[str, bytes]] = {}
    requests: list[str] = []
    tokens: set[str] = set()
    torn: set[str] = set()  # files whose next GET is cut off in the middle

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.requests.append(f"{self.command} {path}")
        self.tokens.add(self.headers.get("Authorization", ""))
        owner, name, *rest = path.removeprefix("/api/models").strip("/").split("/")
        repo, files = f"{owner}/{name}", self.repos.get(f"{owner}/{name}")
        if repo == "org/gated":
            return self.answer(403, error="GatedRepo")
        if files is None or repo == "org/private" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(404, error="RepoNotFound")
        rest = rest or ["revision", "main"]  # what is known of the repository as a whole
        if rest[1] not in ("main", COMMIT):
            return self.answer(404, error="RevisionNotFound")
        if rest[0] == "revision":
            siblings = [{"rfilename": file} for file in files]
            return self.answer(
                200,
                json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}).encode(),
            )
        if rest[0] == "tree":
            entries = [
                {"type": "file", "path": f, "size": len(raw), "oid": hashlib.sha1(raw).hexdigest()}
                for f, raw in files.items()
                if f.startswith("".join(f"{part}/" for part in rest[2:]))
            ]
            return (
                self.answer(200, json.dumps(entries).encode()) if entries else self.answer(404, error="EntryNotFound")
            )
        name = "/".join(rest[2:])
        if name not in files:
            return self.answer(404, error="EntryNotFound")
        return self.answer(200, files[name], name=name)

    do_HEAD = do_GET

    def answer(self, status, raw=b"", error=None, name=None):
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else status)
        self.send_header("Content-Length", str(len(raw) - start))
        if start:
            self.requests.append(f"RANGE {start} {name}")
            self.send_header("Content-Range", f"bytes {start}-{len(raw) - 1}/{len(raw)}")
        self.send_header("ETag", f'"{hashlib.sha1(raw).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            body = raw[start:]
            if name in self.torn:
                self.torn.discard(name)
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
            else:
                self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def serve():
    """The address of a running hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def only_hub(repos, monkeypatch):
    """The address of a hub with these repositories: the only one that the client in this process knows."""
    monkeypatch.setattr(Hub, "repos", repos)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    Hub.requests.clear()
    with serve() as address:
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address)
        if (hub := sys.modules.get("transformers.utils.hub")) is not None:  # keeps a client of its own
            monkeypatch.setattr(hub, "_hf_api", None, raising=False)
        yield address


def downloads():
    """Paths of the files that were sent."""
    return sorted(
        {r.split("/resolve/")[1].split("/", 1)[1] for r in Hub.requests if r.startswith("GET") and "/resolve/" in r}
    )
