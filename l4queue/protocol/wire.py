"""Parts that both executors share: values from replies, typed errors, the retry rule."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import redis.exceptions as rx

from l4queue.errors import ServiceUnavailable
from l4queue.protocol.calls import Arg, Call
from l4queue.protocol.trouble import Outage, Trouble, trouble_of
from l4queue.redis_url import redacted

__all__ = (
    "ServerFull",
    "Tries",
    "Waits",
    "confirmation",
    "confirmed",
    "explain",
    "first_error",
    "first_missing",
    "is_foreign",
    "keys_of",
    "names_of",
)

_CONFIRM_MS = 1000  # for replicas to confirm a write, before the caller tries again
_WAIT_PAUSE_S = 0.1  # between two tries of a client
_SERVICE_PAUSE_S = 0.5  # of many processes that wait for an outage to end
_NO_TRANSITION = frozenset(
    {"follow", "mark_read", "unfollow"}
)  # nothing depends on them: a client reads without replicas


class ServerFull(ServiceUnavailable):
    """Redis has reached its memory limit and refuses new writes; draining goes on."""


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

    All calls from there on are sent again, even if they found their script meanwhile: order matters.
    """
    return next((i for i, reply in enumerate(replies) if isinstance(reply, rx.NoScriptError)), None)


def is_foreign(error: Exception) -> bool:
    """Whether somebody else wrote under our names: a key of another type, or a stream that ends all streams."""
    text = str(error)
    return isinstance(error, rx.ResponseError) and ("WRONGTYPE" in text or "last possible ID" in text)


def keys_of(calls: Sequence[Call[Any]]) -> tuple[str, ...]:
    """The keys of plain commands; scripts see to theirs."""
    found = (call.args[1] for call in calls if call.script is None and len(call.args) > 1)
    return tuple(dict.fromkeys(key for key in found if isinstance(key, str) and "}:" in key))


def first_error(replies: list[Any]) -> list[Any]:
    """The replies themselves; the first error among them is raised."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies


def names_of(calls: Sequence[Call[Any]]) -> set[str]:
    """Names of the scripts or commands that these calls run."""
    return {call.script or str(call.args[0]) for call in calls}


def explain(error: Exception, url: str) -> ServiceUnavailable:
    """Our error for one of the library's, saying where and what to do."""
    trouble, where = trouble_of(error), redacted(url)
    if trouble is None:
        return ServiceUnavailable(f"Redis at {where} refused a command: {error}")
    kind = ServerFull if trouble is Trouble.MEMORY else ServiceUnavailable
    return kind(f"Redis at {where} {trouble.tell(str(error))}")


class Tries:
    """The tries of one exchange: how long to pause before the next, and when to give up.

    `retry_s` None is for ever. Troubles are told to `outage`, if there is one.
    """

    def __init__(
        self, names: set[str], *, url: str, retry_s: float | None, outage: Outage | None, began_s: float
    ) -> None:
        self._names = names
        self._url = url
        self._outage = outage
        self._deadline_s = None if retry_s is None else began_s + retry_s
        self._pauses_s = _backoff_s()
        self._has_cleared = False

    def may_clear(self) -> bool:
        """Whether foreign keys may be set aside once more: once in an exchange."""
        may, self._has_cleared = not self._has_cleared, True
        return may

    def failed(self, error: Exception) -> float | None:
        """Pause before the next try, s; None when time is over. Raises ours for what waiting does not mend."""
        trouble = trouble_of(error)
        if trouble is None:
            raise explain(error, self._url) from error
        if self._outage is not None:
            self._outage.met(trouble, str(error), self._names)
        pause_s = next(self._pauses_s)
        is_over = self._deadline_s is not None and time.monotonic() + pause_s > self._deadline_s
        return None if is_over else pause_s


class Waits:
    """For blocking reads, which come back empty-handed while Redis does not serve, as after a wait in vain.

    A refusal that lasts longer than `retry_s` is raised; an outage is not, since waiters look at records too.
    """

    def __init__(self, url: str, retry_s: float | None, outage: Outage | None) -> None:
        self._url = url
        self._retry_s = retry_s
        self._outage = outage
        self._since_s: float | None = None

    def failed(self, error: Exception, name: str) -> float:
        """Pause before it is tried again, s; raises ours for what waiting does not mend, or has not mended."""
        trouble, now_s = trouble_of(error), time.monotonic()
        if trouble is None:
            raise explain(error, self._url) from error
        if self._outage is not None:
            self._outage.met(trouble, str(error), (name,))
        if self._retry_s is None:
            return _SERVICE_PAUSE_S
        self._since_s = self._since_s or now_s
        if not trouble.is_brief and now_s - self._since_s > self._retry_s:
            raise explain(error, self._url) from error
        return _WAIT_PAUSE_S

    def passed(self, name: str) -> None:
        """It has come through."""
        self._since_s = None
        if self._outage is not None:
            self._outage.passed((name,))


def _backoff_s() -> Iterator[float]:
    """Pauses between tries, s: 20 ms doubling to 1 s."""
    pause = 0.02
    while True:
        yield pause
        pause = min(1.0, pause * 2)
