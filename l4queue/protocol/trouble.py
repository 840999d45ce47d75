"""Passing errors of Redis: their kinds, and one log line for each outage."""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Iterable
from enum import StrEnum

import redis.exceptions as rx

from l4queue.redis_url import redacted

__all__ = ("FAILURES", "Outage", "Trouble", "outage_of", "trouble_of")

log = logging.getLogger("l4queue.redis")

FAILURES = (rx.RedisError, OSError, EOFError, ValueError, IndexError)
"""Classes of errors of an exchange with Redis; the last three where what arrives is no Redis protocol."""
_BRIEF_S = 1.0  # a shorter interruption is not logged
_FORGOTTEN_S = 15.0  # a command that failed and was not tried again keeps no outage open


class Trouble(StrEnum):
    """Why Redis does not serve for now."""

    AWAY = "away"
    FAILOVER = "failover"
    CLUSTER = "cluster"
    BUSY = "busy"
    MEMORY = "memory"
    DISK = "disk"
    LOGIN = "login"
    RIGHTS = "rights"
    CLIENTS = "clients"
    REPLICAS = "replicas"
    DATABASE = "database"
    TLS = "tls"
    PROTOCOL = "protocol"
    OTHER = "other"

    def tell(self, text: str) -> str:
        """Trouble and remedy in words, to follow the address; `text` is the error's."""
        return _TEXTS[self].format(text=text)

    @property
    def is_brief(self) -> bool:
        """Whether it often ends before anybody could act."""
        return self in (Trouble.AWAY, Trouble.FAILOVER, Trouble.CLUSTER, Trouble.BUSY)


_TEXTS = {
    Trouble.AWAY: "cannot be reached ({text}); try `l4queue doctor`",
    Trouble.FAILOVER: "cannot be reached (a replica, or without its primary: {text}); try `l4queue doctor`",
    Trouble.CLUSTER: "cannot be reached (its cluster does not serve the slot: {text}); see docs/failover.md",
    Trouble.BUSY: "cannot be reached (busy: {text}); end the script or function that holds it: SCRIPT KILL",
    Trouble.MEMORY: "is at its memory limit; raise maxmemory or let the queue drain",
    Trouble.DISK: "cannot write its AOF or snapshot (disk full?): {text}; make room, see its log",
    Trouble.LOGIN: (
        "refuses the credentials in L4_REDIS_URL, or misses them ({text}); where it belongs to an `l4queue up`, "
        "`l4queue status` in that directory prints the line to export"
    ),
    Trouble.RIGHTS: "denies this user a command or key ({text}); grant ~* &* +@all, see ACL LOG",
    Trouble.CLIENTS: "accepts no more connections ({text}); raise maxclients or end other clients",
    Trouble.REPLICAS: "lacks the replicas of min-replicas-to-write ({text}); bring one back",
    Trouble.DATABASE: "has no such database ({text}); correct the number in L4_REDIS_URL or raise databases",
    Trouble.TLS: "cannot be reached with TLS ({text}); look at its certificate and at the options of L4_REDIS_URL",
    Trouble.PROTOCOL: "does not answer as Redis does ({text}); look at what listens there",
    Trouble.OTHER: "refuses commands for now: {text}",
}
_CODES = {
    "LOADING": Trouble.AWAY,
    "UNBLOCKED": Trouble.FAILOVER,
    "MASTERDOWN": Trouble.FAILOVER,
    "READONLY": Trouble.FAILOVER,
    "CLUSTERDOWN": Trouble.CLUSTER,
    "TRYAGAIN": Trouble.CLUSTER,
    "ASK": Trouble.CLUSTER,
    "MOVED": Trouble.CLUSTER,
    "BUSY": Trouble.BUSY,
    "OOM": Trouble.MEMORY,
    "MISCONF": Trouble.DISK,
    "NOAUTH": Trouble.LOGIN,
    "WRONGPASS": Trouble.LOGIN,
    "DENIED": Trouble.LOGIN,  # protected mode
    "NOPERM": Trouble.RIGHTS,
    "NOREPLICAS": Trouble.REPLICAS,
}
_BUGS = frozenset(
    ("ERR", "WRONGTYPE", "CROSSSLOT", "EXECABORT", "BUSYGROUP", "BUSYKEY", "NOGROUP", "NOTBUSY", "NOPROTO")
)
"""Codes of errors that no waiting mends; others that are not known here are conditions of the server."""
_WORDS = (
    ("max number of clients", Trouble.CLIENTS),
    ("Script killed by user", Trouble.BUSY),
    ("command not allowed when used memory", Trouble.MEMORY),
    ("ACL failure in script", Trouble.RIGHTS),
    ("The user executing the script can't", Trouble.RIGHTS),  # Redis 6.2
    ("without any password configured", Trouble.LOGIN),
    ("invalid password", Trouble.LOGIN),
    ("Protocol error: unauthenticated", Trouble.LOGIN),  # of a long command, before it is read
    ("Protocol error: ", Trouble.PROTOCOL),
    ("DB index is out of range", Trouble.DATABASE),
    ("SELECT is not allowed in cluster mode", Trouble.DATABASE),
)
_CODE = re.compile(r"^[A-Z][A-Z0-9]+(?= )")
_IN_SCRIPT = re.compile(r"-([A-Z][A-Z0-9]+) ")  # Redis 6.2 wraps the error of a command in that of its script
_TLS = ("certificate", "SSL", "TLS")


def trouble_of(error: Exception) -> Trouble | None:
    """Why Redis does not serve for now; None for an error that waiting does not mend, such as a wrong command."""
    text = str(error)
    for words, trouble in _WORDS:
        if words in text:
            return trouble
    if isinstance(error, (rx.AuthenticationError, rx.AuthorizationError, rx.AuthenticationWrongNumberOfArgsError)):
        return Trouble.LOGIN
    if isinstance(error, rx.ResponseError):
        return _refusal(error, text)
    if isinstance(error, (rx.ConnectionError, rx.TimeoutError, OSError, UnicodeError)):
        return Trouble.TLS if any(word in text for word in _TLS) else Trouble.AWAY
    if isinstance(error, rx.RedisError) and not isinstance(error, rx.InvalidResponse):
        return None
    return Trouble.PROTOCOL if isinstance(error, FAILURES) else None


class Outage:
    """Says once that a Redis does not serve, for each kind of trouble, and once that it serves again.

    It is over when every command that failed has come through, or when none has failed for some time: while writes
    are refused, reads go on. Thread-safe; the executors of one process share one for each server.
    """

    def __init__(self, url: str) -> None:
        self._where = redacted(url)
        self._lock = threading.Lock()
        self._failing: set[str] = set()
        self._said: set[Trouble] = set()
        self._tail: set[Trouble] = set()  # kinds that have only just ended: late replies may still tell of them
        self._since_s = 0.0
        self._last_s = 0.0
        self._over_s = -math.inf

    def met(self, trouble: Trouble, text: str, names: Iterable[str]) -> None:
        """Commands of these names have failed."""
        now_s = time.monotonic()
        with self._lock:
            if not self._failing:
                self._since_s = now_s
                self._tail = self._tail if now_s - self._over_s < _BRIEF_S else set()
            self._failing.update(names)
            self._last_s = now_s
            is_news = trouble not in self._said
            if trouble.is_brief:  # connections also break by a refusal, which has said more
                is_news = not self._said
            if trouble.is_brief or trouble in self._tail:
                is_news = is_news and now_s - self._since_s >= _BRIEF_S
            if is_news:
                self._said.add(trouble)
        if is_news:
            log.warning(
                "Redis at %s %s. Waiting for it, what runs goes on",
                self._where,
                trouble.tell(text),
                extra={"trouble": trouble.value},
            )

    @property
    def is_open(self) -> bool:
        """Whether commands have failed that have not come through since."""
        return bool(self._failing)

    def passed(self, names: Iterable[str]) -> None:
        """Commands of these names have come through."""
        if not self._failing:
            return
        with self._lock:
            self._failing.difference_update(names)
            if self._failing and time.monotonic() - self._last_s < _FORGOTTEN_S:
                return
            self._failing.clear()
            self._over_s = time.monotonic()
            lasted_s, was_said = self._over_s - self._since_s, bool(self._said)
            if was_said:
                self._tail, self._said = self._said, set()
        if was_said:
            log.warning("Redis at %s serves again after %.0f s", self._where, lasted_s)


_outages: dict[str, Outage] = {}


def outage_of(url: str) -> Outage:
    """The one of this process for a server."""
    return _outages.setdefault(url, Outage(url))


def _refusal(error: rx.ResponseError, text: str) -> Trouble | None:
    first = _CODE.match(text)
    code = error.status_code or (first.group() if first else "ERR")
    inner = _IN_SCRIPT.search(text) if code == "ERR" else None
    code = inner.group(1) if inner else code
    if code in _CODES:
        return _CODES[code]
    if isinstance(error, (rx.ClusterDownError, rx.AskError, rx.TryAgainError)):
        return Trouble.CLUSTER
    if isinstance(error, rx.NoScriptError) or code == "NOSCRIPT":
        return Trouble.AWAY  # flushed once more while scripts were loaded
    return None if code in _BUGS or not _CODE.match(f"{code} ") else Trouble.OTHER
