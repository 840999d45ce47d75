"""Replies of the scripts, as values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from l4queue.protocol.records import Grant
from l4queue.value_class import value_class

__all__ = (
    "Migrated",
    "Reaped",
    "SubmitReply",
    "Taken",
    "Verdict",
    "parse_cancelled",
    "parse_migrated",
    "parse_reaped",
    "parse_submitted",
    "parse_taken",
    "parse_verdict",
)

_READY = b"READY"


class Verdict(StrEnum):
    """Answer of a script to a writer."""

    OK = "OK"
    DUP = "DUP"  # already done by this very call: fine
    FENCED = "FENCED"  # no longer the owner: stop working on it
    HAVE = "HAVE"  # the server has some of these tokens already
    GAP = "GAP"  # the server lacks earlier tokens
    LOST = "LOST"  # the incarnation's lease was reaped
    STALE = "STALE"  # another plan was published first
    UNKNOWN = "UNKNOWN"  # no such request
    IS = "IS"  # terminal already
    CONFLICT = "CONFLICT"  # same id, different request
    FULL = "FULL"  # the bounded backlog is full


@value_class(kw_only=True)
class SubmitReply:
    """Answer to `submit`. `at_ms` is set for OK; the backlog for FULL; the state for DUP and CONFLICT.

    `request_id` is set but for FULL. It is not the one that was sent where that one had been given before.
    """

    verdict: Verdict
    request_id: str | None = None
    at_ms: int | None = None
    state: str | None = None
    live_tokens: int = 0
    drain_tokens_per_s: float = 0.0


@value_class(kw_only=True)
class Taken:
    """Answer to `take`: OK with grants, or LOST. A taker that is ready is woken when something comes."""

    verdict: Verdict
    grants: tuple[Grant, ...] = ()
    is_ready: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Migrated:
    """Answer to `migrate`: how many left the queue, of how many looked at."""

    num_moved: int
    num_seen: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reaped:
    """Answer to `reap`."""

    num_requeued: int
    num_dead: int
    was_graced: bool


def parse_verdict(reply: bytes) -> Verdict:
    """The verdict, without what follows a colon."""
    return Verdict(reply.partition(b":")[0].decode())


def parse_cancelled(reply: bytes) -> tuple[Verdict, str | None]:
    """The verdict of `cancel`, and the terminal state that comes with IS."""
    head, _, tail = reply.decode(errors="replace").partition(":")  # anybody may have written the state
    return Verdict(head), tail or None


def parse_submitted(reply: list[bytes]) -> SubmitReply:
    """The reply of `submit`."""
    verdict = Verdict(reply[0].decode())
    if verdict is Verdict.OK:
        return SubmitReply(verdict=verdict, at_ms=int(reply[1]), request_id=reply[2].decode())
    if verdict is Verdict.FULL:
        return SubmitReply(verdict=verdict, live_tokens=int(reply[1]), drain_tokens_per_s=float(reply[2]))
    return SubmitReply(verdict=verdict, state=reply[1].decode(), request_id=reply[2].decode())


def parse_taken(reply: list[Any]) -> Taken:
    """The reply of `take`."""
    grants, is_ready = tuple(Grant.parse(row) for row in reply[1:]), reply[0] == _READY
    return Taken(verdict=Verdict.OK if is_ready else Verdict(reply[0].decode()), grants=grants, is_ready=is_ready)


def parse_migrated(reply: list[int]) -> Migrated:
    """The reply of `migrate`."""
    return Migrated(num_moved=reply[0], num_seen=reply[1])


def parse_reaped(reply: list[int]) -> Reaped:
    """The reply of `reap`."""
    return Reaped(num_requeued=reply[0], num_dead=reply[1], was_graced=bool(reply[2]))
