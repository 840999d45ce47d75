"""Limits of lines: a batch asks before it sends lines, and reports the lines that have ended."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from l4queue.client.batch.flight import Ended, Submission

__all__ = ("AdmittedLines", "LineGate", "LineLimits", "NoLimits")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmittedLines:
    """How many lines may be sent, from the first on.

    Where that is not all, `full` names the limit, `notice` tells of it, and `wait_s` is when there may be room.
    """

    num_lines: int
    full: str = ""
    notice: str = ""
    wait_s: float = 0.0


class LineLimits(Protocol):
    """Limits of who owns a batch. Calls may be repeated; ServiceUnavailable where trying again may help."""

    def charge(self, submissions: Sequence[Submission]) -> AdmittedLines:
        """Count lines that are about to be sent, in order, until one finds no room."""
        ...

    def settle(self, used_tokens: Mapping[str, int]) -> bool:
        """Count what lines have used by their keys' ids, before their answers are durable.

        Whether that may have made room for others.
        """
        ...


class NoLimits:
    """Every line may be sent."""

    def charge(self, submissions: Sequence[Submission]) -> AdmittedLines:
        """See `LineLimits.charge`."""
        return AdmittedLines(num_lines=len(submissions))

    def settle(self, used_tokens: Mapping[str, int]) -> bool:
        """See `LineLimits.settle`."""
        return False


class LineGate:
    """The lines that limits let through, and when these are asked again: when they say, or once lines end."""

    def __init__(self, limits: LineLimits) -> None:
        self._limits = limits
        self.limited_by = self.notice = ""
        self.closed_until_s = 0.0

    def admit(self, submissions: Sequence[Submission]) -> Sequence[Submission]:
        """The first of these lines, which are charged now."""
        admitted = self._limits.charge(submissions)
        self.limited_by, self.notice = admitted.full, admitted.notice
        if admitted.full:
            self.closed_until_s = time.monotonic() + admitted.wait_s
        return submissions[: admitted.num_lines]

    def settle(self, ended: Sequence[Ended], *, is_over: bool = False) -> None:
        """Count what lines have used. One without a record stays charged and is sent again, unless `is_over`."""
        used_tokens = {}
        for one in ended:
            if one.record is not None:
                used_tokens[one.ticket.key_id] = (one.record.prompt_tokens or 0) + one.record.offset
            elif is_over:
                used_tokens[one.ticket.key_id] = 0
        if self._limits.settle(used_tokens):
            self.closed_until_s = 0.0
