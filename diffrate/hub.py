"""The Hugging Face hub and other servers: names of repositories, and no run that hangs where nobody answers."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

HUB = "hf-hub:"
SOURCES = (HUB, "local-dir:")  # timm's words before a model that is no name of its own
ANSWER = 2.0  # seconds that a server has to take a connection


def answers(url: str) -> bool:
    """Whether the server of a URL, or the proxy to it, takes a connection within `ANSWER` seconds."""
    server, proxies = urlsplit(url), getproxies()
    if server.scheme not in ("http", "https"):
        return True  # a file's
    proxy = proxies.get(server.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(server.hostname or ""):
        server = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    found: list[bool] = []

    def connect() -> None:
        with suppress(OSError, ValueError):  # also a port that is none
            address = server.hostname or "", server.port or {"http": 80, "socks5": 1080}.get(server.scheme, 443)
            socket.create_connection(address, ANSWER).close()
            found.append(True)

    thread = threading.Thread(target=connect, daemon=True)  # looking a name up has no time limit of its own
    thread.start()
    thread.join(ANSWER)
    return bool(found)


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Let the hub's client look into its cache alone while nobody answers there: its retries take half a minute."""
    from huggingface_hub import constants, utils

    before = constants.HF_HUB_OFFLINE
    silent = not before and not answers(constants.ENDPOINT)
    reset: Any = getattr(utils, "reset_sessions", None) if silent else None  # before 1.0, sessions keep the setting
    try:
        constants.HF_HUB_OFFLINE = before or silent
        if reset is not None:
            reset()
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        if reset is not None:
            reset()
