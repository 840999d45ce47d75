"""Connections from a URL: to one server, Sentinel's primary, a cluster's slot owner.

All keys share one slot, so a cluster is one server that may move, as behind Sentinel. Every connection asks where
that server is before it connects, and breaks when it learns that it talks to another one.
"""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import redis
import redis.asyncio as aredis
import redis.asyncio.sentinel as asentinel
import redis.exceptions as rx
import redis.sentinel
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from l4queue.errors import ConfigError
from l4queue.redis_url import Address, Place, parse_url

__all__ = ("Address", "Place", "async_pool", "connect", "mislead", "parse_url")

_FILES = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")
_SENTINEL: Any = redis.sentinel.Sentinel  # without types
_ASYNC_SENTINEL: Any = asentinel.Sentinel
CONNECT_TIMEOUT_S = 5.0  # chosen: a SYN is sent three times in it
_FRESH_S = 0.05  # connections that break together ask once where the primary is
_CONNECT: dict[str, Any] = {
    # Library defaults retry writes silently and change the reply shapes; both are decided here instead.
    "decode_responses": False,
    "protocol": 2,
    "socket_keepalive": True,
    "retry_on_timeout": False,
}


def connect(
    address: Address,
    *,
    pool: type[redis.ConnectionPool],
    timeout_s: float,
    most: int,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
) -> Any:
    """A blocking client without retries of its own; `most` connections."""
    more = {"socket_timeout": timeout_s, "max_connections": most, **_options(address, connect_timeout_s)}
    if address.way:
        more["connection_class"] = _TlsConnection if address.is_tls else _Connection
        more["locator"] = _Locator(address)
    elif address.path:
        more["connection_class"] = redis.UnixDomainSocketConnection
    elif address.is_tls:
        more["connection_class"] = redis.SSLConnection
    return redis.Redis(connection_pool=pool(retry=Retry(NoBackoff(), 0), **more))


def async_pool(
    address: Address,
    *,
    timeout_s: float,
    most: int,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
) -> aredis.ConnectionPool:
    """How to connect on an event loop, for `ThinClient`; nothing is taken from the pool itself."""
    more = {"socket_timeout": timeout_s, "max_connections": most, **_options(address, connect_timeout_s)}
    if address.way:
        more["connection_class"] = _AsyncTlsConnection if address.is_tls else _AsyncConnection
        more["locator"] = _AsyncLocator(address)
    elif address.path:
        more["connection_class"] = _AsyncUnixConnection
    elif address.is_tls:
        more["connection_class"] = aredis.SSLConnection
    return aredis.ConnectionPool(retry=AsyncRetry(NoBackoff(), 0), **more)


def _options(address: Address, connect_timeout_s: float) -> dict[str, Any]:
    """Options of connections by redis-py's names; the URL's win over ours."""
    for name in _FILES:
        if name in address.options and not Path(address.options[name]).exists():
            raise ConfigError(f"L4_REDIS_URL: {name}: there is no {address.options[name]}")
    login = {"username": address.username, "password": address.password}
    ours = {**_CONNECT, "socket_connect_timeout": connect_timeout_s, "db": address.database}
    more = {**ours, **login, **address.options}
    if address.path:
        del more["socket_keepalive"]  # of TCP
        more["path"] = address.path
    elif not address.way:  # connections of the other ways learn their host when they connect
        more |= {"host": address.host, "port": address.port}
    return more


class _Whereabouts:
    """Where the server was last known to be, and how long that is believed."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.known: Place | None = None
        self._known_s = 0.0
        self._turn = 0

    def believed(self) -> Place | None:
        """The place to try: in a cluster the last that was named, else a node in turn; None: ask Sentinel."""
        if self.address.way == "cluster":
            return self.known or self.address.places[self._turn % len(self.address.places)]
        return self.known if time.monotonic() - self._known_s < _FRESH_S else None

    def is_at(self, place: Place) -> Place:
        """It was found, or has moved there."""
        self.known, self._known_s = place, time.monotonic()
        return place

    def is_not_at(self, place: Place) -> None:
        """Nobody answers there, or not as the one that is wanted."""
        if self.known == place:
            self.known = None
        if place in self.address.places:
            self._turn = self.address.places.index(place) + 1

    def nobody_knows(self) -> rx.ConnectionError:
        """The error when no sentinel answers with a primary; the library's own text tells all its options."""
        return rx.ConnectionError(f"no sentinel knows the primary of {self.address.service!r}")

    def sentinel_options(self) -> dict[str, Any]:
        """How to talk to a sentinel."""
        common = {"socket_timeout": 1.0, "socket_connect_timeout": 1.0, **self.address.sentinel_login}
        if not self.address.is_tls:
            return common
        return {**common, "ssl": True, **self.address.tls_options}


def mislead(connection: Any, error: rx.ResponseError) -> str | None:
    """The reason to break a connection that an error gives; None: the error is about something else."""
    locator: _Locator | _AsyncLocator | None = getattr(connection, "locator", None)
    if locator is None:  # there is one place only
        return None
    whereabouts = locator.whereabouts
    if isinstance(error, rx.MovedError):
        whereabouts.is_at((error.host or connection.host, error.port))
        return f"the slot is at {error.host}:{error.port}"
    if isinstance(error, rx.ReadOnlyError) or "-READONLY" in str(error):  # in a script before Redis 7
        whereabouts.is_not_at((connection.host, connection.port))
        return f"{connection.host}:{connection.port} is a replica now"
    return None


class _Locator:
    """Finds the server for blocking connections; shared by those of one pool."""

    def __init__(self, address: Address) -> None:
        self.whereabouts = _Whereabouts(address)
        self._lock = threading.Lock()
        options = self.whereabouts.sentinel_options()
        self._sentinel: Any = _SENTINEL(address.places, sentinel_kwargs=options)

    def find(self) -> Place:
        """Where to connect; an error of the connection when no sentinel knows."""
        with self._lock:
            believed = self.whereabouts.believed()
            if believed is not None:
                return believed
            try:
                found = self._sentinel.discover_master(self.whereabouts.address.service)
            except rx.ConnectionError:
                raise self.whereabouts.nobody_knows() from None
            finally:  # a question in months: no connection waits for the next
                for one in self._sentinel.sentinels:
                    one.close()
            return self.whereabouts.is_at(found)


class _AsyncLocator:
    """The same on an event loop."""

    def __init__(self, address: Address) -> None:
        self.whereabouts = _Whereabouts(address)
        self._lock = asyncio.Lock()
        options = self.whereabouts.sentinel_options()
        self._sentinel: Any = _ASYNC_SENTINEL(address.places, sentinel_kwargs=options)

    async def find(self) -> Place:
        """Where to connect; an error of the connection when no sentinel knows."""
        async with self._lock:
            believed = self.whereabouts.believed()
            if believed is not None:
                return believed
            try:
                found = await self._sentinel.discover_master(self.whereabouts.address.service)
            except rx.ConnectionError:
                raise self.whereabouts.nobody_knows() from None
            finally:
                await self._sentinel.aclose()
            return self.whereabouts.is_at(found)


class _Connection(redis.Connection):
    """A connection to wherever the server is when it connects."""

    def __init__(self, *, locator: _Locator, **more: Any) -> None:
        self.locator = locator
        super().__init__(**more)  # type: ignore[no-untyped-call]  # redis-py has none here

    def connect_check_health(self, *args: Any, **more: Any) -> None:
        if not self.is_connected:
            self.host, self.port = self.locator.find()
        try:
            super().connect_check_health(*args, **more)
        except (rx.ConnectionError, rx.TimeoutError):
            self.locator.whereabouts.is_not_at((self.host, self.port))
            raise

    def read_response(self, *args: Any, **more: Any) -> Any:
        try:
            return super().read_response(*args, **more)
        except rx.ResponseError as error:
            reason = mislead(self, error)
            if reason is None:
                raise
            self.disconnect()  # type: ignore[no-untyped-call]  # redis-py has none here
            raise rx.ConnectionError(reason) from error


class _TlsConnection(_Connection, redis.SSLConnection):
    """The same with TLS."""


class _AsyncUnixConnection(aredis.UnixDomainSocketConnection):
    """A connection over a socket of the file system, with the server's own refusal, which redis-py wraps here."""

    async def connect_check_health(self, *args: Any, **more: Any) -> None:
        try:
            await super().connect_check_health(*args, **more)
        except rx.ConnectionError as error:
            if isinstance(error.__cause__, rx.RedisError):
                raise error.__cause__ from None
            raise


class _AsyncConnection(aredis.Connection):
    """The same as `_Connection` for asyncio."""

    def __init__(self, *, locator: _AsyncLocator, **more: Any) -> None:
        self.locator = locator
        super().__init__(**more)

    async def connect_check_health(self, *args: Any, **more: Any) -> None:
        if not self.is_connected:
            self.host, self.port = await self.locator.find()
        try:
            await super().connect_check_health(*args, **more)
        except (rx.ConnectionError, rx.TimeoutError):
            self.locator.whereabouts.is_not_at((self.host, self.port))
            raise


class _AsyncTlsConnection(_AsyncConnection, aredis.SSLConnection):
    """The same for asyncio with TLS."""
