"""Readiness: a worker with room waits for an arrival, and the lightest that does is woken for it.

One that runs nothing gets a short request with the wake-up: it is leased to it by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from l4queue.protocol.records import Grant

__all__ = ("LeasedArrival", "Readiness")


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """How a worker waits for the next arrival in its stage: the one with the least work before it is woken.

    `request_ms` and `token_ms` are what a request and a token of it add to `backlog_ms`. By choice it waits though
    there is something left that it might take.
    """

    backlog_ms: float
    request_ms: float
    token_ms: float
    may_steal: bool
    is_by_choice: bool = False

    def args(self) -> tuple[str, ...]:
        """Arguments of `take`."""
        sums = (f"{self.backlog_ms:.3f}", repr(self.request_ms), repr(self.token_ms))
        return (*sums, str(int(self.may_steal)), str(int(self.is_by_choice)))


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasedArrival:
    """A request that came with a wake-up, leased to this incarnation; whether the worker is ready for another."""

    incarnation: str
    grant: Grant
    is_ready: bool

    @classmethod
    def parse(cls, values: Mapping[bytes, bytes]) -> LeasedArrival:
        """From an entry of a worker's wake-ups that has an epoch (`e`)."""
        grant = Grant(
            request_id=values[b"i"].decode(),
            epoch=int(values[b"e"]),
            body=values[b"y"],
            packed_ids=values[b"b"],
            offset=0,
            prompt_tokens=int(values[b"p"]),
            crashes=0,
            score=float(values[b"c"]),
            submitted_ms=int(values[b"m"]),
            deadline_ms=int(values[b"d"]) or None,
            stage=values[b"s"].decode(),
        )
        return cls(incarnation=values[b"n"].decode(), grant=grant, is_ready=values[b"r"] == b"1")
