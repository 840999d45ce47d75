"""Limits of callers, kept in Redis: every gateway counts in the same buckets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from l4queue.protocol.calls import Arg, Call
from l4queue.protocol.keys import Keys

__all__ = ("Allowance", "Bucket", "Charge", "Limits")


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """How much a caller may ask for; 0 is no limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    backlog_tokens: int = 0

    def __bool__(self) -> bool:
        return bool(self.requests_per_minute or self.tokens_per_minute or self.backlog_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """How much a bucket takes now, and when it is empty again."""

    room: int
    empty_in_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """What came of a charge. `full` names the limit that refused it: requests, tokens or backlog; empty: none."""

    full: str
    retry_after_ms: int
    requests: Bucket
    tokens: Bucket


class Limits:
    """Builders of the calls that count. A bucket holds the limit of a minute, and leaks it in a minute."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def charge(
        self,
        caller: str,
        allowance: Allowance,
        *,
        request_ids: Sequence[str],
        tokens_each: int,
        num_requests: int = 1,
    ) -> Call[Charge]:
        """Count requests of the queue that are about to be enqueued, with the tokens that each may use.

        All or none is counted; the same ids again change nothing. One larger than a limit is taken where nothing
        else of its caller is counted.
        """
        most = (allowance.requests_per_minute, allowance.tokens_per_minute, allowance.backlog_tokens)
        args: tuple[Arg, ...] = (*most, num_requests, tokens_each, *request_ids)
        return Call("charge", self._names(caller), args, _charge)

    def refund(
        self, caller: str, allowance: Allowance, *, request_ids: Sequence[str], used_tokens: int
    ) -> Call[int]:
        """Count what they have used in all, in place of what they might: the difference, which may be negative."""
        args: tuple[Arg, ...] = (allowance.tokens_per_minute, used_tokens, *request_ids)
        return Call("refund", self._names(caller), args, int)

    def _names(self, caller: str) -> tuple[str, str]:
        return self._keys.limit(caller), self._keys.charged(caller)


def _charge(reply: Any) -> Charge:
    full, *numbers = reply
    retry_after_ms, requests, requests_ms, tokens, tokens_ms = map(int, numbers)
    return Charge(
        full=full.decode(),
        retry_after_ms=retry_after_ms,
        requests=Bucket(room=requests, empty_in_ms=requests_ms),
        tokens=Bucket(room=tokens, empty_in_ms=tokens_ms),
    )
