"""Limits of callers, kept in Redis: every gateway counts in the same buckets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    """The outcome of a charge. `num_counted` ids are counted now, from the first on.

    `full` names the limit that refused the next one: requests, tokens or backlog; empty: none.
    """

    num_counted: int
    full: str
    retry_after_ms: int
    requests: Bucket
    tokens: Bucket


class Limits:
    """Builders of the calls that count. A bucket holds the limit of a minute, and leaks it in a minute."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def charge(
        self, caller: str, allowance: Allowance, *, tokens: Mapping[str, int], num_requests: int = 1
    ) -> Call[Charge]:
        """Count requests of the queue that are about to be enqueued: by their ids, the tokens that each may use.

        All or none is counted; the same ids again change nothing. One larger than a limit is taken where nothing
        else of its caller is counted. One without tokens is not remembered: its repeat counts again.
        """
        return self._charge(caller, allowance, 1.0, num_requests, tokens)

    def charge_lines(
        self, caller: str, allowance: Allowance, *, tokens: Mapping[str, int], share: float
    ) -> Call[Charge]:
        """Count lines of a batch, each a request, in order until one finds no room in this share of each limit.

        A line whose request has a record was counted before, settled or not. After a refused `charge` no line is
        counted until five seconds after its caller may come again.
        """
        return self._charge(caller, allowance, share, "", tokens)

    def _charge(
        self, caller: str, allowance: Allowance, share: float, num_requests: Arg, tokens: Mapping[str, int]
    ) -> Call[Charge]:
        most = (allowance.requests_per_minute, allowance.tokens_per_minute, allowance.backlog_tokens)
        args: tuple[Arg, ...] = (*most, share, num_requests, *_pairs(tokens))
        return Call("charge", self._names(caller), args, _charge)

    def refund(self, caller: str, allowance: Allowance, *, used_tokens: Mapping[str, int]) -> Call[int]:
        """Count what each has used in place of what it might: the difference of all, which may be negative.

        One that is not counted, or no longer, changes nothing.
        """
        args: tuple[Arg, ...] = (allowance.tokens_per_minute, *_pairs(used_tokens))
        return Call("refund", self._names(caller), args, int)

    def _names(self, caller: str) -> tuple[str, str]:
        return self._keys.limit(caller), self._keys.charged(caller)


def _pairs(tokens: Mapping[str, int]) -> Iterator[Arg]:
    for request_id, number in tokens.items():
        yield request_id
        yield number


def _charge(reply: Any) -> Charge:
    num_counted, full, *numbers = reply
    retry_after_ms, requests, requests_ms, tokens, tokens_ms = map(int, numbers)
    return Charge(
        num_counted=int(num_counted),
        full=full.decode(),
        retry_after_ms=retry_after_ms,
        requests=Bucket(room=requests, empty_in_ms=requests_ms),
        tokens=Bucket(room=tokens, empty_in_ms=tokens_ms),
    )
