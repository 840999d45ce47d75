"""Address of Flower, by our settings and by its own `FLOWER_` variables, which win; and whether it answers."""

from __future__ import annotations

import asyncio
import http.client
import os
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass

from l4queue.config import Settings
from l4queue.errors import ConfigError

__all__ = ("FlowerPlace", "flower_answers", "flower_place", "is_well")

_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
_TRY_S = 5.0  # for Flower to answer one HTTP request
_SOON_S = 2.0  # the same while it starts


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowerPlace:
    """An address of this machine, or a `socket`; `prefix` is empty or begins with a slash."""

    host: str = "127.0.0.1"
    port: int = 5555
    socket: str = ""
    prefix: str = ""
    is_tls: bool = False

    @property
    def url(self) -> str:
        """For a browser on this machine."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.is_tls else 'http'}://{host}:{self.port}{self.prefix}"

    @property
    def text(self) -> str:
        """For people: the URL, or the socket."""
        return f"{self.socket}{self.prefix}" if self.socket else self.url


def flower_place(settings: Settings, environment: Mapping[str, str] = os.environ) -> FlowerPlace:
    """Where `python -m dispatcher.flower` listens; ConfigError when FLOWER_PORT is no port. Empty: not set."""
    port = environment.get("FLOWER_PORT", "") or str(settings.flower_port)
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"FLOWER_PORT: {port} is no port; unset it, or set L4_FLOWER_PORT")
    prefix = environment.get("FLOWER_URL_PREFIX", "").strip("/")
    address = environment.get("FLOWER_ADDRESS", "")
    return FlowerPlace(
        host=_EVERYWHERE.get(address, address),
        port=int(port),
        socket=environment.get("FLOWER_UNIX_SOCKET", ""),
        prefix=f"/{prefix}" if prefix else "",
        is_tls=bool(environment.get("FLOWER_CERTFILE") and environment.get("FLOWER_KEYFILE")),
    )


def flower_answers(place: FlowerPlace, *, timeout_s: float = _TRY_S) -> None:
    """Return when it says that it is well; OSError or HTTPException with the reason when not."""
    connection = _connection(place, timeout_s)
    try:
        connection.request("GET", f"{place.prefix}/healthcheck", headers={"Host": "localhost"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise http.client.HTTPException(f"HTTP Error {reply.status}: {reply.reason}")
    finally:
        connection.close()


async def is_well(place: FlowerPlace) -> bool:
    """Whether it answers soon, as a supervisor asks."""
    try:
        await asyncio.to_thread(flower_answers, place, timeout_s=_SOON_S)
    except (OSError, http.client.HTTPException):
        return False
    return True


def _connection(place: FlowerPlace, timeout_s: float) -> http.client.HTTPConnection:
    if place.socket:
        return _SocketConnection(place.socket, timeout_s)
    if place.is_tls:
        # A process of this machine is asked whether it lives; its certificate is for other names.
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return http.client.HTTPSConnection(place.host, place.port, timeout=timeout_s, context=context)
    return http.client.HTTPConnection(place.host, place.port, timeout=timeout_s)


class _SocketConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
