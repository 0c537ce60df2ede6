"""Whether wandb's server can be reached and would know us, decided in seconds and before anything waits for it."""

from __future__ import annotations

import netrc
import os
import socket
import threading
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

SECONDS = 3.0


def unreachable(settings: Any) -> str | None:
    """Why not; None if a connection to the server, or to the proxy before it, was made within 3 s.

    Args:
        settings: wandb's, of this process.
    """
    url = urllib.parse.urlsplit(settings.base_url)
    host = url.hostname or ""
    if not _key(settings, host):
        return f"no key for {host}; `wandb login` keeps one"
    proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(url.scheme)
    if proxy:
        url = urllib.parse.urlsplit(proxy)
    port = url.port or {"http": 80, "https": 443}.get(url.scheme, 443)
    return _connect(url.hostname or "", port)


def _connect(host: str, port: int) -> str | None:
    """In a thread, since looking a name up has no time limit of its own."""
    said = [f"no answer of {host}:{port} within {SECONDS:g} s"]

    def knock() -> None:
        try:
            socket.create_connection((host, port), timeout=SECONDS).close()
            said[0] = ""
        except OSError as error:
            said[0] = f"{host}:{port}: {error.strerror or error}"

    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return said[0] or None


def _key(settings: Any, host: str) -> bool:
    """Whether there is a key, an identity token or a line in a .netrc for the server."""
    if settings.api_key or settings.identity_token_file:
        return True
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    named = os.environ.get("NETRC")
    for file in [Path(named)] if named else [Path("~/.netrc").expanduser(), Path("~/_netrc").expanduser()]:
        try:
            if netrc.netrc(file).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
