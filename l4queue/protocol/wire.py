"""What the two executors share: commands from calls, replies to values, errors to ours, when to retry."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import redis.exceptions as rx

from l4queue.errors import ServiceUnavailable
from l4queue.protocol.calls import Arg, Call
from l4queue.protocol.scripts import script

__all__ = (
    "RETRYABLE",
    "ServerFull",
    "backoff_s",
    "command",
    "confirmation",
    "confirmed",
    "explain",
    "first_missing",
    "is_passing",
    "parse_replies",
    "redacted",
)

RETRYABLE = (
    rx.ConnectionError,
    rx.TimeoutError,
    rx.BusyLoadingError,
    rx.ReadOnlyError,
    rx.ClusterDownError,  # and MASTERDOWN
    rx.TryAgainError,
    rx.AskError,  # the slot is on its way to another node
)
_OUT_OF_MEMORY = "command not allowed when used memory"  # Redis 6.2 wraps it in the text of a script's error
_PASSING = ("LOADING", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "READONLY", "NOREPLICAS", "UNBLOCKED", "BUSY ")
_IN_SCRIPT = ("-READONLY ", "-NOREPLICAS ")  # Redis 6.2 wraps these, too
_CONFIRM_MS = 1000
_NO_TRANSITION = frozenset({"follow", "unfollow"})  # nothing depends on them: a client reads without replicas
_PASSWORD = re.compile(r"(password=)[^&]*")


class ServerFull(ServiceUnavailable):
    """Redis has reached its memory limit and refuses new writes; draining goes on."""


def command(call: Call[Any]) -> tuple[Arg, ...]:
    """The Redis command of a call."""
    if call.script is None:
        return call.args
    return ("EVALSHA", script(call.script).sha, len(call.keys), *call.keys, *call.args)


def confirmation(calls: Sequence[Call[Any]], replicas: int) -> tuple[Arg, ...] | None:
    """The command that waits until replicas have what these calls write; None where none is wanted."""
    if replicas and any(call.script is not None and call.script not in _NO_TRANSITION for call in calls):
        return ("WAIT", replicas, _CONFIRM_MS)
    return None


def confirmed(replies: list[Any], replicas: int) -> list[Any]:
    """The replies without that of `confirmation`, which is the last; an error that passes when too few have it.

    The calls have run then, and running them again is harmless.
    """
    found = replies.pop()
    if isinstance(found, Exception):
        raise found
    if found < replicas:
        raise rx.TimeoutError(f"{found} of {replicas} replicas have what was written")
    return replies


def first_missing(replies: Sequence[Any]) -> int | None:
    """Index of the first reply that says NOSCRIPT: the server has restarted or flushed its scripts.

    All calls from there on are sent again, also those that found their script meanwhile: order matters.
    """
    return next((i for i, reply in enumerate(replies) if isinstance(reply, rx.NoScriptError)), None)


def is_passing(error: Exception) -> bool:
    """Whether trying again later can help: connection trouble, loading, failover, scripts flushed again."""
    if isinstance(error, (*RETRYABLE, rx.NoScriptError)):
        return True
    text = str(error)
    return isinstance(error, rx.ResponseError) and (
        text.startswith(_PASSING) or any(word in text for word in _IN_SCRIPT)
    )


def parse_replies(calls: Sequence[Call[Any]], replies: Sequence[Any]) -> list[Any]:
    """Values of the replies; the first error among them is raised as ours."""
    values = []
    for call, reply in zip(calls, replies, strict=True):
        if isinstance(reply, Exception):
            raise reply
        values.append(call.parse(reply))
    return values


def explain(error: Exception, url: str) -> ServiceUnavailable:
    """Our error for one of the library's, saying where and what to do."""
    text = str(error)
    where = redacted(url)
    if isinstance(error, rx.OutOfMemoryError) or _OUT_OF_MEMORY in text:
        return ServerFull(f"Redis at {where} is at its memory limit; raise maxmemory or let the queue drain")
    if "MISCONF" in text:
        return ServiceUnavailable(f"Redis at {where} cannot write its AOF (disk full?): {text}")
    if "NOREPLICAS" in text:
        return ServiceUnavailable(f"Redis at {where} lacks the replicas of min-replicas-to-write")
    if isinstance(error, rx.AuthenticationError):
        return ServiceUnavailable(f"Redis at {where} refuses the credentials in L4_REDIS_URL")
    if is_passing(error):
        return ServiceUnavailable(f"Redis at {where} cannot be reached ({text}); try `l4queue doctor`")
    return ServiceUnavailable(f"Redis at {where} refused a command: {text}")


def redacted(url: str) -> str:
    """The URL without its passwords."""
    parts = urlsplit(url)
    credentials, at, hosts = parts.netloc.rpartition("@")
    shown = f"***{at}{hosts}" if ":" in credentials else parts.netloc
    return parts._replace(netloc=shown, query=_PASSWORD.sub(r"\1***", parts.query)).geturl()


def backoff_s() -> Iterator[float]:
    """Pauses between tries, s: 20 ms doubling to 1 s."""
    pause = 0.02
    while True:
        yield pause
        pause = min(1.0, pause * 2)
