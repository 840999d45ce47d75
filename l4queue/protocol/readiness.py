"""Readiness: a worker with room waits for an arrival, and the lightest that does is woken for it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ("Readiness",)


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
