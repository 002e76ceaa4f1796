"""`fetch_image`: pictures of chats from the web, for whoever allows it. By default dyntok downloads nothing."""

import http.client
import time
import urllib.error
import urllib.request

from dyntok.errors import ConfigError, ImageError
from dyntok.structure import brief

_CHUNK = 1 << 16


def fetch_image(address: str, *, timeout: float = 20.0, max_bytes: int = 20_000_000) -> bytes:
    """Returns the file at an http or https address, for `VisualProcessor(..., fetch=fetch_image)`.

    timeout: seconds for the whole file
    max_bytes: the largest file that is read

    A server that takes chats of strangers would ask any host for them, hosts of its own network included. Give the
    processor a function of your own there, which calls this one for the hosts that you trust.

    Raises `ImageError` on another kind of address, an answer that is no file, too many bytes, and when time is up;
    `ConfigError` on limits that are not positive.
    """
    if not all(isinstance(limit, int | float) and limit > 0 for limit in (timeout, max_bytes)):
        raise ConfigError(f"timeout is {timeout!r} and max_bytes is {max_bytes!r}, expected positive numbers")
    shown = address[:200] if isinstance(address, str) else brief(address)
    if not isinstance(address, str) or not address.startswith(("http://", "https://")):
        raise ImageError(f"{shown} is no address of a picture, expected http:// or https://")
    limit = f"; max_bytes is {max_bytes:,}, allow more with fetch_image(..., max_bytes=)"
    end = time.monotonic() + timeout
    try:
        with urllib.request.urlopen(address, timeout=timeout) as answer:
            stated = answer.headers.get("Content-Length", "")
            if stated.isdecimal() and int(stated) > max_bytes:
                raise ImageError(f"{shown} has {int(stated):,} bytes{limit}")
            content = b""
            while chunk := answer.read1(_CHUNK):
                content += chunk
                if len(content) > max_bytes:
                    raise ImageError(f"{shown} goes on after {max_bytes:,} bytes{limit}")
                if time.monotonic() > end:
                    raise ImageError(f"{shown} did not come within {timeout:g} s; allow more with timeout=")
            return content
    except urllib.error.HTTPError as error:
        raise ImageError(f"{shown} gave no picture: HTTP {error.code} {error.reason}") from error
    except TimeoutError as error:
        raise ImageError(f"{shown} did not come within {timeout:g} s; allow more with timeout=") from error
    except (OSError, ValueError, http.client.HTTPException) as error:  # no such host, no HTTP, a malformed address
        raise ImageError(f"{shown} can't be fetched: {getattr(error, 'reason', error)}") from error
