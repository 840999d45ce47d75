"""The one place that makes connections from a URL: to one server, Sentinel's primary, a cluster's slot owner.

All keys share one slot, so a cluster is to us one server that may move, as it is behind Sentinel: every connection
asks where that server is before it connects, and breaks when it learns that it talks to the wrong one.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import redis
import redis.asyncio as aredis
import redis.asyncio.sentinel as asentinel
import redis.exceptions as rx
import redis.sentinel
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.connection import parse_url as parse_options
from redis.retry import Retry

from l4queue.errors import ConfigError
from l4queue.strict_json import check_text

__all__ = ("Address", "Place", "connect", "connect_async", "parse_url")

Place = tuple[str, int]

_SCHEMES = ("redis", "rediss", "unix")
_WAYS = ("", "sentinel", "cluster")
_NUMBER = re.compile("[0-9]{1,5}")
_SENTINEL_PORT, _PORT = 26379, 6379
_SENTINEL: Any = redis.sentinel.Sentinel  # without types
_ASYNC_SENTINEL: Any = asentinel.Sentinel
_FRESH_S = 0.05  # connections that break together ask once where the primary is
_CONNECT: dict[str, Any] = {
    # Library defaults retry writes silently and change the reply shapes; both are decided here instead.
    "decode_responses": False,
    "protocol": 2,
    "socket_connect_timeout": 5.0,
    "socket_keepalive": True,
    "retry_on_timeout": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """What a URL says. `plain_url` is that of one server, with database, credentials and the library's options.

    `replicas` must have every transition before it counts as done; 0: replication is not waited for.
    """

    plain_url: str
    way: str = ""
    places: tuple[Place, ...] = ()
    service: str = ""
    replicas: int = 0
    is_tls: bool = False
    sentinel_login: dict[str, str] = field(default_factory=dict)


def parse_url(url: str) -> Address:
    """Read a URL; ConfigError says what is wrong with it.

    redis://[user:password@]host[:port][/db], rediss:// with TLS, unix:///path
    redis+sentinel://[user:password@]host[:port][,host[:port]...]/service[/db]
    redis+cluster://[user:password@]host[:port][,host[:port]...]
    Options after `?`: replicas=N; sentinel_username, sentinel_password; and those of redis-py.
    """
    try:
        check_text(url)
        parts = urlsplit(url)
    except ValueError:  # its text may show the password
        raise ConfigError("L4_REDIS_URL: it cannot be read as a URL") from None
    scheme, _, way = parts.scheme.partition("+")
    if scheme not in _SCHEMES or way not in _WAYS or (way and scheme == "unix"):
        known = "redis, rediss, unix, redis+sentinel, rediss+sentinel, redis+cluster, rediss+cluster"
        raise ConfigError(f"L4_REDIS_URL: {parts.scheme or 'it'} is no scheme of a Redis URL; known are {known}")
    options = dict(parse_qsl(parts.query))
    replicas = options.pop("replicas", "0")
    if _NUMBER.fullmatch(replicas) is None:
        raise ConfigError(f"L4_REDIS_URL: replicas={replicas[:20]} is no number of replicas")
    login = {k: options.pop(f"sentinel_{k}") for k in ("username", "password") if f"sentinel_{k}" in options}
    credentials, at, hosts = parts.netloc.rpartition("@")
    path = [part for part in parts.path.split("/") if part]
    service, places = "", tuple[Place, ...]()
    if way:
        default = _SENTINEL_PORT if way == "sentinel" else _PORT
        places = tuple(_place(host, default) for host in hosts.split(","))
        hosts = "l4queue.invalid"  # connections learn their host when they connect
    if way == "sentinel":
        if not path:
            raise ConfigError("L4_REDIS_URL: redis+sentinel://host:port,.../SERVICE lacks the name of the service")
        service = path.pop(0)
    if way == "cluster" and path not in ([], ["0"]):
        raise ConfigError("L4_REDIS_URL: a cluster has database 0 only")
    # For redis-py a scheme chooses the class of connections; it is ours where the place has to be found first.
    plain = f"redis://{credentials}{at}{hosts}/{'/'.join(path)}" if way else url.partition("?")[0]
    plain += f"?{urlencode(options)}" if options else ""
    return Address(
        plain_url=plain,
        way=way,
        places=places,
        service=service,
        replicas=int(replicas),
        is_tls=scheme == "rediss",
        sentinel_login=login,
    )


def connect(address: Address, *, pool: type[redis.ConnectionPool], timeout_s: float, most: int) -> Any:
    """A blocking client without retries of its own; `most` connections."""
    more: dict[str, Any] = {**_CONNECT, "retry": Retry(NoBackoff(), 0)}
    if address.way:
        more["connection_class"] = _TlsConnection if address.is_tls else _Connection
        more["locator"] = _Locator(address)
    more |= {"socket_timeout": timeout_s, "max_connections": most}
    return redis.Redis(connection_pool=_opened(pool, address, more))


def connect_async(address: Address, *, pool: type[aredis.ConnectionPool], timeout_s: float, most: int) -> Any:
    """The same for asyncio; belongs to the event loop that first uses it."""
    more: dict[str, Any] = {**_CONNECT, "retry": AsyncRetry(NoBackoff(), 0)}
    if address.way:
        more["connection_class"] = _AsyncTlsConnection if address.is_tls else _AsyncConnection
        more["locator"] = _AsyncLocator(address)
    more |= {"socket_timeout": timeout_s, "max_connections": most}
    return aredis.Redis(connection_pool=_opened(pool, address, more))


def _opened(pool: Any, address: Address, options: Mapping[str, Any]) -> Any:
    """A pool of connections, which reads the rest of the URL."""
    try:
        return pool.from_url(address.plain_url, **options)
    except ValueError as error:
        raise ConfigError(f"L4_REDIS_URL: {error}") from None


def _place(text: str, default_port: int) -> Place:
    host, colon, port = text.rpartition(":")
    if not colon or port.endswith("]"):
        host, port = text, str(default_port)
    if not host or _NUMBER.fullmatch(port) is None or int(port) > 65535:
        raise ConfigError(f"L4_REDIS_URL: {text[:80]!r} is not host:port")
    return host.strip("[]"), int(port)


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
        """What is raised when no sentinel answers with a primary; the library's own text tells all its options."""
        return rx.ConnectionError(f"no sentinel knows the primary of {self.address.service!r}")

    def sentinel_options(self) -> dict[str, Any]:
        """How to talk to a sentinel."""
        common = {"socket_timeout": 1.0, "socket_connect_timeout": 1.0, **self.address.sentinel_login}
        if not self.address.is_tls:
            return common
        given = parse_options(self.address.plain_url)  # type: ignore[no-untyped-call]  # redis-py has none here
        return {**common, "ssl": True, **{k: v for k, v in given.items() if k.startswith("ssl_")}}


def _mislead(connection: Any, error: rx.ResponseError) -> str | None:
    """What an error says of where to go: the reason to break the connection; None: it is about something else."""
    whereabouts: _Whereabouts = connection.locator.whereabouts
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
            reason = _mislead(self, error)
            if reason is None:
                raise
            self.disconnect()  # type: ignore[no-untyped-call]  # redis-py has none here
            raise rx.ConnectionError(reason) from error


class _TlsConnection(_Connection, redis.SSLConnection):
    """The same with TLS."""


class _AsyncConnection(aredis.Connection):
    """The same for asyncio."""

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

    async def read_response(self, *args: Any, **more: Any) -> Any:
        try:
            return await super().read_response(*args, **more)
        except rx.ResponseError as error:
            reason = _mislead(self, error)
            if reason is None:
                raise
            await self.disconnect()
            raise rx.ConnectionError(reason) from error


class _AsyncTlsConnection(_AsyncConnection, aredis.SSLConnection):
    """The same for asyncio with TLS."""
