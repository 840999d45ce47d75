"""URLs of Redis: read and checked, shown without passwords, written anew for Celery. Nothing connects here."""

from __future__ import annotations

import ipaddress
import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

from pydantic_core import core_schema

from l4queue.errors import ConfigError

__all__ = (
    "Address",
    "Place",
    "SecretUrl",
    "celery_url",
    "parse_url",
    "redacted",
    "with_password",
    "without_password",
    "without_secrets",
)

Place = tuple[str, int]

PORT, SENTINEL_PORT = 6379, 26379  # Redis's own defaults
_SCHEMES = ("redis", "rediss", "unix")
_WAYS = ("", "sentinel", "cluster")
_KNOWN = "redis, rediss, unix, redis+sentinel, rediss+sentinel, redis+cluster, rediss+cluster"
_ENCODE = (
    "write the characters / ? # % of a user or password percent-encoded, or the queue's password into "
    "L4_REDIS_PASSWORD as it is"
)
_PASSWORD = re.compile(r"(password=)[^&]*")
_PASSWORD_OPTION = re.compile(r"\w*password=")
_OF_VALUES = re.compile(r"(?<![^&])(?:\w*password|username)=[^&]*")
_FALSE, _TRUE = ("0", "f", "false", "n", "no"), ("1", "t", "true", "y", "yes")
_REQUIREMENTS = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}


class SecretUrl(str):
    """A URL that may hold a password: whole for programs, redacted wherever it is printed, logged or formatted.

    Pass it on as it is: `str()` and f-strings give the redacted form, `reveal()` the whole text.
    """

    __slots__ = ()

    def reveal(self) -> str:
        """The whole URL as ordinary text."""
        return str.__str__(self)

    def __str__(self) -> str:
        return redacted(self.reveal())

    def __repr__(self) -> str:
        return repr(str(self))

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        shown = core_schema.plain_serializer_function_ser_schema(str, when_used="json")
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema(), serialization=shown)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A parsed URL: one server (`host` and `port`, or the socket `path`), or `places` to ask where it is.

    `replicas` must have every transition before it counts as done; 0: replication is not waited for.
    `options` are redis-py's own, by its names.
    """

    way: str = ""
    host: str = "localhost"
    port: int = PORT
    path: str = ""
    places: tuple[Place, ...] = ()
    service: str = ""
    database: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    replicas: int = 0
    is_tls: bool = False
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    sentinel_login: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def tls_options(self) -> dict[str, Any]:
        """Those of `options` that are about TLS."""
        return {name: value for name, value in self.options.items() if name.startswith("ssl_")}


_MAX_CHARS = 4096  # of a URL, as of every text setting


def parse_url(url: str, *, name: str = "L4_REDIS_URL") -> Address:
    """Read a URL; ConfigError names the setting and says what is wrong with it, never with a piece of a password.

    redis://[user:password@]host[:port][/db], rediss:// with TLS, unix://[user:password@]/path[?db=N]
    redis+sentinel://[user:password@]host[:port][,host[:port]...]/service[/db]
    redis+cluster://[user:password@]host[:port][,host[:port]...]
    Options after `?`: replicas=N; sentinel_username, sentinel_password; db, username, password; some of redis-py.
    """
    text = url.reveal().strip() if isinstance(url, SecretUrl) else url.strip()
    if len(text) > _MAX_CHARS or not text.isprintable():
        raise ConfigError(f"{name}: a URL has at most {_MAX_CHARS} characters, all of them printable")
    if not text:
        raise ConfigError(f"{name}: it is empty; unset it, or name a Redis, as in redis://host:6379/0")
    whole, colon, rest = text.partition("://")
    scheme, _, way = whole.lower().partition("+")
    if not colon or scheme not in _SCHEMES or way not in _WAYS or (way and scheme == "unix"):
        if not colon:  # what stands there may be a password
            raise ConfigError(
                f"{name}: it begins with no scheme; write redis:// before it, as in redis://host:6379/0"
            )
        raise ConfigError(f"{name}: {whole or 'nothing'} is no scheme of a Redis URL; known are {_KNOWN}")
    rest, _, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    _refuse_raw_characters(name, text, path, query, is_socket=scheme == "unix")
    credentials, _, hosts = authority.rpartition("@")
    values = _Options(name, query, is_tls=scheme == "rediss")
    username, _, password = credentials.partition(":")
    common: dict[str, Any] = {
        "way": way,
        "username": values.take("username", unquote(username)) or None,
        "password": values.take("password", unquote(password)) or None,
        "replicas": values.number("replicas", 0),
        "sentinel_login": values.sentinel_login(way),
        "is_tls": scheme == "rediss",
    }
    parts = [unquote(part) for part in path.split("/") if part]
    if scheme == "unix":
        if hosts or not path:
            raise ConfigError(f"{name}: a socket is unix:///path, with three slashes")
        common |= {"path": unquote(slash + path), "database": values.number("db", 0)}
    elif way:
        default = SENTINEL_PORT if way == "sentinel" else PORT
        common["places"] = tuple(_place(host, default, name) for host in hosts.split(","))
    else:
        # This may be a password without its host, so it is not shown.
        shown = "what stands before the first / or ?"
        hosts = hosts if hosts and not hosts.startswith(":") else f"localhost{hosts}"
        common["host"], common["port"] = _place(hosts, PORT, name, shown=shown)
    if way == "sentinel":
        if not parts:
            raise ConfigError(f"{name}: redis+sentinel://host:port,.../SERVICE lacks the name of the service")
        common["service"] = parts.pop(0)
    if scheme != "unix":
        common["database"] = values.database(parts)
    if way == "cluster" and common["database"]:
        raise ConfigError(f"{name}: a cluster has database 0 only")
    return Address(**common, options=values.rest())


def _refuse_raw_characters(name: str, text: str, path: str, query: str, *, is_socket: bool) -> None:
    """An end of the user or password that is really a part of it: no piece of this URL may be shown then."""
    if "#" in text or "@" in _OF_VALUES.sub("", query) or ("@" in path and not is_socket):
        raise ConfigError(f"{name}: it cannot be read; {_ENCODE}")


def _place(text: str, default_port: int, name: str, *, shown: str = "") -> Place:
    """One `host[:port]`; IPv6 addresses stand in brackets. `shown` is what an error calls it."""
    found = re.fullmatch(r"(\[[^\[\]]+\]|[^:\[\]\s]+)(?::([0-9]{1,5}))?", text)
    if found is None:
        raise ConfigError(f"{name}: {shown or repr(text)} is not host:port")
    host, port = unquote(found[1]), int(found[2] or default_port)
    if host.startswith("["):
        host = host.strip("[]")
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ConfigError(f"{name}: {shown or repr(text)} is not host:port: no IPv6 address") from None
    if not 0 < port < 65536:
        raise ConfigError(f"{name}: {port} is no port")
    return host, port


def _yes(text: str) -> bool:
    if text.lower() not in (*_TRUE, *_FALSE):
        raise ValueError("not true or false")
    return text.lower() in _TRUE


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError("not a number above 0")
    return value


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ValueError("not a whole number above 0")
    return int(text)


def _requirements(text: str) -> ssl.VerifyMode:
    word = text.lower().removeprefix("cert_")
    if word not in _REQUIREMENTS:
        raise ValueError("not required, optional or none")
    return _REQUIREMENTS[word]


_READERS: dict[str, Callable[[str], Any]] = {
    "client_name": str,
    "health_check_interval": _positive,
    "max_connections": _count,
    "socket_connect_timeout": _positive,
    "socket_keepalive": _yes,
    "socket_read_size": _count,
    "socket_timeout": _positive,
    "ssl_ca_certs": str,
    "ssl_ca_data": str,
    "ssl_ca_path": str,
    "ssl_cert_reqs": _requirements,
    "ssl_certfile": str,
    "ssl_check_hostname": _yes,
    "ssl_ciphers": str,
    "ssl_keyfile": str,
    "ssl_min_version": lambda text: ssl.TLSVersion(int(text)),
    "ssl_password": str,
}
"""Options of redis-py that a URL may have: none that repeats commands or changes replies, both are ours."""


class _Options:
    """The options of a URL, taken one by one; what is left must be known to redis-py."""

    def __init__(self, name: str, query: str, *, is_tls: bool) -> None:
        self._name = name
        self._is_tls = is_tls
        self._left: dict[str, str] = {}
        for key, value in parse_qsl(query, keep_blank_values=True):
            if key in self._left:
                raise ConfigError(f"{name}: the option {key} is given twice")
            self._left[key] = value

    def take(self, key: str, default: str) -> str:
        """An option that is text."""
        return self._left.pop(key, default)

    def number(self, key: str, default: int) -> int:
        """An option that is a whole number."""
        text = self._left.pop(key, "")
        if text and not (text.isascii() and text.isdigit()):
            raise ConfigError(f"{self._name}: {key}={text} is no number")
        return int(text) if text else default

    def database(self, path: list[str]) -> int:
        """The database: the path's, or `db`; not two different ones."""
        if len(path) > 1 or not all(part.isascii() and part.isdigit() for part in path):
            raise ConfigError(f"{self._name}: /{'/'.join(path)} is no database, which is a number such as /0")
        by_path = int(path[0]) if path else None
        by_option = self.number("db", by_path or 0)
        if by_path is not None and by_path != by_option:
            raise ConfigError(f"{self._name}: it names database {by_path} and database {by_option}")
        return by_option

    def sentinel_login(self, way: str) -> dict[str, str]:
        """The sentinels' own credentials."""
        keys = [key for key in ("username", "password") if f"sentinel_{key}" in self._left]
        if keys and way != "sentinel":
            raise ConfigError(f"{self._name}: sentinel_{keys[0]} is for redis+sentinel:// only")
        return {key: self._left.pop(f"sentinel_{key}") for key in keys}

    def rest(self) -> dict[str, Any]:
        """redis-py's options, read."""
        found: dict[str, Any] = {}
        for key, text in self._left.items():
            if key not in _READERS:
                known = ", ".join(("db", "username", "password", "replicas", *_READERS))
                raise ConfigError(f"{self._name}: {key} is no option of a Redis URL; known are {known}")
            if key.startswith("ssl_") and not self._is_tls:
                raise ConfigError(f"{self._name}: {key} is for TLS: write rediss:// in place of redis://")
            try:
                found[key] = _READERS[key](text)
            except ValueError as error:
                shown = "" if "password" in key else f"={text}"
                raise ConfigError(f"{self._name}: {key}{shown} cannot be used: {error}") from None
        return found


def redacted(url: str) -> str:
    """The URL without its passwords; also where it is malformed, and then rather too little of it is left."""
    text = url.reveal() if isinstance(url, SecretUrl) else url
    scheme, colon, rest = text.partition("://") if "://" in text else ("", "", text)
    head, mark, query = rest.partition("?")
    if "@" in _OF_VALUES.sub("", query) or "#" in rest:
        head, mark, query = rest, "", ""
    credentials, at, hosts = head.rpartition("@")
    shown = f"***{at}{hosts}" if ":" in credentials or "/" in credentials else head
    port = re.sub(r"\[[^\]]*\]", "", head.partition("/")[0])
    if not at and ("#" in rest or re.search(r":(?![0-9]*(,|$))", port)):
        shown = "***"  # what should be a port may be a password
    return f"{scheme}{colon}{shown}{mark}" + _PASSWORD.sub(r"\1***", query)


def with_password(url: str, password: str) -> SecretUrl:
    """The URL with this password, unless it has one of its own."""
    text = url.reveal() if isinstance(url, SecretUrl) else url
    if not password or parse_url(text).password is not None:
        return SecretUrl(text)
    scheme, _, rest = text.partition("://")
    authority, mark, tail = _split_before(rest, "/?")
    username, _, hosts = authority.rpartition("@")
    username = username.removesuffix(":")
    return SecretUrl(f"{scheme}://{username}:{quote(password, safe='')}@{hosts}{mark}{tail}")


def without_password(url: str) -> str:
    """The URL without its passwords, as it may be written down; `with_password` puts one in."""
    text = url.reveal() if isinstance(url, SecretUrl) else url
    scheme, colon, rest = text.partition("://")
    authority, mark, tail = _split_before(rest, "/?")
    credentials, at, hosts = authority.rpartition("@")
    username = credentials.partition(":")[0]
    path, _, query = (mark + tail).partition("?")
    kept = "&".join(part for part in query.split("&") if part and not _PASSWORD_OPTION.match(part))
    return f"{scheme}{colon}{username}{at if username else ''}{hosts}{path}{'?' if kept else ''}{kept}"


def without_secrets(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of a connection, as kombu tells them to all who ask a worker, without the secrets in them."""
    told = dict(facts)
    if "://" in str(told.get("hostname")):  # of a socket it is the whole URL
        told["hostname"] = redacted(str(told["hostname"]))
    if isinstance(told.get("ssl"), Mapping):
        told["ssl"] = {name: value for name, value in told["ssl"].items() if name != "ssl_password"}
    return told


def _split_before(text: str, marks: str) -> tuple[str, str, str]:
    found = re.search(f"[{marks}]", text)
    return (text, "", "") if found is None else (text[: found.start()], found[0], text[found.end() :])


def celery_url(address: Address) -> tuple[SecretUrl, dict[str, Any]]:
    """The URL of this one server in kombu's form, everything in it encoded; with kombu's TLS options, else {}.

    A certificate is checked unless the URL says otherwise, as it is for the queue.
    """
    login = ""
    if address.username or address.password:
        login = f"{quote(address.username or '', safe='')}:{quote(address.password or '', safe='')}@"
    if address.path:
        return SecretUrl(f"redis+socket://{login}{quote(address.path)}?virtual_host={address.database}"), {}
    host = f"[{address.host}]" if ":" in address.host else quote(address.host)
    scheme = "rediss" if address.is_tls else "redis"
    url = SecretUrl(f"{scheme}://{login}{host}:{address.port}/{address.database}")
    if not address.is_tls:
        return url, {}
    return url, {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True, **address.tls_options}
