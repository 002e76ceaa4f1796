"""A web server for one folder, for this machine alone."""

import functools
import http.server
import threading
import webbrowser
from pathlib import Path

from dyntok.errors import ConfigError


class _Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = {
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".js": "text/javascript",
        ".wasm": "application/wasm",
    }

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def make_server(folder: str | Path, port: int = 0) -> http.server.ThreadingHTTPServer:
    """Returns a server of the folder on localhost; `serve_forever` runs it. Port 0 takes a free one.

    Raises `ConfigError` where the folder holds no page or the port is taken.
    """
    folder = Path(folder)
    if not (folder / "index.html").is_file():
        raise ConfigError(f"{folder} holds no index.html; `dyntok page -o {folder}` writes a page")
    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), functools.partial(_Handler, directory=str(folder)))
    except OSError as error:
        raise ConfigError(f"can't listen on port {port}: {error}; give another --port") from error


def serve(server: http.server.ThreadingHTTPServer, *, browser: bool = True) -> None:
    """Answer requests until the process is interrupted. browser: open the page in one."""
    if browser:  # beside the server, since a browser of the console returns when its user is done
        threading.Thread(target=webbrowser.open, args=(address(server),), daemon=True).start()
    with server:
        server.serve_forever()


def address(server: http.server.ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/"
