"""`fetch_image`: pictures of chats from the web, for whoever allows it. By default dyntok downloads nothing."""

import http.client
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent import futures
from contextlib import suppress
from functools import partial
from typing import IO, Any
from urllib.parse import urlsplit

from dyntok.errors import ConfigError, ImageError
from dyntok.structure import brief

_CHUNK = 1 << 16
_PORTS = {"http": 80, "https": 443}
_Watch = Callable[[socket.socket], None]


def fetch_image(address: str, *, timeout: float = 20.0, max_bytes: int = 20_000_000) -> bytes:
    """Returns the file at an http or https address, for `VisualProcessor(..., fetch=fetch_image)`.

    timeout: seconds for the whole call, from the look-up of the name to the last byte, redirects included
    max_bytes: the largest file that is read

    A server that takes chats of strangers would ask any host for them, hosts of its own network included. Give the
    processor a function of your own there, which calls this one for the hosts that you trust. Checking the host of the
    address is enough: redirects are followed on the same host and port alone, and from http to https.

    Raises `ImageError` on another kind of address, a redirect to another host, an answer that is no file, too many
    bytes, and when time is up; `ConfigError` on limits that are not positive.
    """
    if not all(isinstance(limit, int | float) and limit > 0 for limit in (timeout, max_bytes)):
        raise ConfigError(f"timeout is {timeout!r} and max_bytes is {max_bytes!r}, expected positive numbers")
    shown = address[:200] if isinstance(address, str) else brief(address)
    if not isinstance(address, str) or not address.startswith(("http://", "https://")):
        raise ImageError(f"{shown} is no address of a picture, expected http:// or https://")
    late = f"{shown} did not come within {timeout:g} s; allow more with timeout="
    outcome: futures.Future[bytes] = futures.Future()
    sockets = _Sockets()

    def work() -> None:
        try:
            outcome.set_result(_read(address, timeout, max_bytes, sockets.watch))
        except Exception as error:
            outcome.set_exception(error)

    # a socket limits each of its operations alone, and a server that drips its headers stays within that
    threading.Thread(target=work, name="fetch_image", daemon=True).start()
    try:
        return outcome.result(timeout)
    except ImageError:
        raise
    except (TimeoutError, futures.TimeoutError) as error:
        raise ImageError(late) from error
    except urllib.error.HTTPError as error:
        raise ImageError(f"{shown} gave no picture: HTTP {error.code} {error.reason}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:  # no such host, no HTTP, a malformed address
        reason = getattr(error, "reason", error)
        raise ImageError(late if isinstance(reason, TimeoutError) else f"{shown} can't be fetched: {reason}") from error
    finally:
        sockets.end()


def _read(address: str, timeout: float, max_bytes: int, watch: _Watch) -> bytes:
    """Returns the file at an address. Raises `ImageError` if it is too large, and what urllib raises."""
    shown, limit = address[:200], f"; max_bytes is {max_bytes:,}, allow more with fetch_image(..., max_bytes=)"
    opener = urllib.request.build_opener(_Handler(watch), _SameHost())
    with opener.open(address, timeout=timeout) as answer:
        stated = answer.headers.get("Content-Length", "")
        if stated.isdecimal() and int(stated) > max_bytes:
            raise ImageError(f"{shown} has {int(stated):,} bytes{limit}")
        content = bytearray()
        while chunk := answer.read1(_CHUNK):
            content += chunk
            if len(content) > max_bytes:
                raise ImageError(f"{shown} goes on after {max_bytes:,} bytes{limit}")
        return bytes(content)


class _Sockets:
    """The sockets of a call. Once it has ended, its thread must not wait for them any longer."""

    def __init__(self) -> None:
        self._watched: list[socket.socket] = []
        self._ended = False

    def watch(self, connected: socket.socket) -> None:
        """Adds a socket, which is of no use if the call has ended."""
        self._watched.append(connected)
        if self._ended:
            self.end()

    def end(self) -> None:
        """Ends all operations of the sockets, in whichever thread they are."""
        self._ended = True
        for connected in list(self._watched):
            with suppress(OSError):  # closed already
                connected.shutdown(socket.SHUT_RDWR)


def _watched(kind: type[http.client.HTTPConnection], watch: _Watch, host: str, **options: Any) -> Any:
    """Returns a connection whose socket is watched: of https after its handshake, to which the socket's limit holds."""
    connection = kind(host, **options)
    connect = connection.connect

    def connect_and_watch() -> None:
        connect()
        watch(connection.sock)

    connection.connect = connect_and_watch  # type: ignore[method-assign]
    return connection


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens addresses by watched connections."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_watched, http.client.HTTPConnection, self._watch), req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_watched, http.client.HTTPSConnection, self._watch), req)


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follows redirects to the host that was asked for alone."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """Raises `ImageError` on a redirect to another host or port, or to another kind of address."""
        fp.close()  # urllib would read all of what comes with a redirect, of whatever length
        if not _is_same_host(req.full_url, newurl):
            raise ImageError(
                f"{req.full_url[:200]} redirects to {newurl[:200]}, expected the same host and port, or https instead "
                "of http; give that address itself if you trust it"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _is_same_host(one: str, other: str) -> bool:
    """Returns whether a redirect from one address to another stays on its host and port, or only turns to https."""
    then, now = urlsplit(one), urlsplit(other)
    if now.scheme not in _PORTS or then.hostname != now.hostname or (then.scheme, now.scheme) == ("https", "http"):
        return False
    ports = tuple(parts.port or _PORTS[parts.scheme] for parts in (then, now))
    return ports[0] == ports[1] or ports == (_PORTS["http"], _PORTS["https"])
