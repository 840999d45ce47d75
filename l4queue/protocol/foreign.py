"""Unreadable values under our names: an alarm, a dead letter, and the service goes on.

Anybody who can write to Redis can write anything, and a newer release may write what this one does not know.
Readers leave it out and report it here; the executor then puts it among the dead letters, with its bytes,
once a day.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from l4queue.protocol.calls import MAX_DEAD_LETTER_BYTES, Call

__all__ = (
    "UNREADABLE",
    "Finding",
    "burial",
    "each",
    "finding",
    "gathered",
    "or_else",
    "report",
    "set_aside",
    "text",
)

T = TypeVar("T")

log = logging.getLogger("l4queue.foreign")

UNREADABLE = (ValueError, KeyError, TypeError, IndexError, OverflowError, AttributeError, RecursionError)
"""Errors of reading a value that is not what it should be."""
_MAX_KNOWN = 10_000  # findings remembered; then each may be logged once more
_MAX_WHY_CHARS = 300  # of a reason in the log


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that cannot be read: the key that it is under, why, and its first bytes."""

    key: str
    why: str
    raw: bytes

    @property
    def digest(self) -> str:
        """The same for the same bytes under the same key."""
        return hashlib.blake2b(self.key.encode(errors="replace") + b"\0" + self.raw, digest_size=12).hexdigest()


_known: set[str] = set()
_pending: deque[Finding] = deque(maxlen=100)  # reported between two replies
_gathering: ContextVar[list[Finding] | None] = ContextVar("gathering", default=None)


def finding(key: str, why: object, raw: object) -> Finding | None:
    """Log what was found, once in the life of a process; None where it was known already."""
    data = raw if isinstance(raw, bytes) else repr(raw).encode(errors="replace")
    found = Finding(key=key, why=str(why)[:_MAX_WHY_CHARS], raw=data[:MAX_DEAD_LETTER_BYTES])
    if found.digest in _known:
        return None
    if len(_known) >= _MAX_KNOWN:
        _known.clear()
    _known.add(found.digest)
    log.error("unreadable: %s: %s", key, found.why, extra={"key": key, "why": found.why})
    return found


def report(key: str, why: object, raw: object) -> None:
    """The same, for the executor to bury: at once while it reads replies, else with the next ones."""
    found, gathering = finding(key, why, raw), _gathering.get()
    if found is not None:
        (_pending if gathering is None else gathering).append(found)


@contextmanager
def gathered() -> Iterator[list[Finding]]:
    """Collects what is reported meanwhile, and what was since the last time."""
    found: list[Finding] = []
    with suppress(IndexError):  # until it is empty, even where another task takes from it
        while True:
            found.append(_pending.popleft())
    token = _gathering.set(found)
    try:
        yield found
    finally:
        _gathering.reset(token)


def or_else(key: str, parse: Callable[[Any], T], default: Callable[[], T]) -> Callable[[Any], T]:
    """The parse function that reports what it cannot read, and gives the default."""

    def tolerant(reply: Any) -> T:
        try:
            return parse(reply)
        except UNREADABLE as error:
            report(key, _words(error), reply)
            return default()

    return tolerant


def each(
    key: str,
    entries: Iterable[tuple[bytes, Mapping[bytes, bytes]]],
    parse: Callable[[bytes, Mapping[bytes, bytes]], T],
) -> list[T]:
    """The readable entries of a stream, or fields of a hash; the rest is reported."""
    found = []
    for name, values in entries:
        try:
            found.append(parse(name, values))
        except UNREADABLE as error:
            report(key, f"{text(name)}: {_words(error)}", (name, values))
    return found


def text(raw: bytes) -> str:
    """For names that need not be ours: what is no UTF-8 becomes a question mark, and names nothing of ours."""
    return raw.decode(errors="replace")


def burial(found: Finding) -> Call[int] | None:
    """The call that puts it among the dead letters of its namespace."""
    prefix, brace, name = found.key.partition("}:")
    if not brace:
        return None
    keys = tuple(f"{prefix}}}:{suffix}" for suffix in ("dead", "counts", f"buried:{found.digest}"))
    return Call("bury", keys, (name, found.why, found.raw), int)


def set_aside(keys: Iterable[str]) -> Call[int]:
    """Rename those of our keys that are of a type which is not ours; how many they were."""
    return Call("aside", tuple(keys), (), int)


def _words(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
