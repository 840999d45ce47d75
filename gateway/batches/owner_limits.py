"""Limits of the key that owns a batch: lines are charged in groups before they are sent, and settled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gateway.keys import ApiKeys
from gateway.limits import WORDS
from l4queue.client.batch.flight import BACKLOG_SHARE, Submission
from l4queue.client.batch.line_limits import AdmittedLines
from l4queue.protocol.executor import Executor
from l4queue.protocol.keys import Keys
from l4queue.protocol.limits import Limits

__all__ = ("OwnerLimits",)

_LEAST_WAIT_S = 1.0  # so that a second's room is charged at once. Chosen: a call a second costs nothing
_LONGEST_WAIT_S = 10.0  # a limit that was raised is seen within this time


class OwnerLimits:
    """See `LineLimits`. The limits are those in force at the moment; an owner without any costs no call.

    A line is charged as admission estimates it. Lines fill `BACKLOG_SHARE` of each limit, as they do of the common
    backlog. A bucket leaks as fast when it is half full, so a batch alone loses nothing by that.
    """

    def __init__(self, owner: str, *, keys: ApiKeys, names: Keys, executor: Executor) -> None:
        self._owner = owner
        self._keys = keys
        self._limits = Limits(names)
        self._executor = executor
        self._full = ""
        self._has_charged = False

    def charge(self, submissions: Sequence[Submission]) -> AdmittedLines:
        """See `LineLimits.charge`."""
        self._full = ""
        allowance = self._keys.allowance(self._owner)
        if not allowance or not submissions:
            return AdmittedLines(num_lines=len(submissions))
        tokens = {one.ticket.key_id: one.prepared.charge_tokens for one in submissions}
        call = self._limits.charge_lines(self._owner, allowance, tokens=tokens, share=BACKLOG_SHARE)
        found = self._executor.run(call)
        self._has_charged = True
        if not found.full:
            return AdmittedLines(num_lines=len(submissions))
        self._full = found.full
        return AdmittedLines(
            num_lines=found.num_counted,
            full=found.full,
            notice=f"key {self._owner} has reached its limit of {WORDS[found.full]} for batches",
            wait_s=min(_LONGEST_WAIT_S, max(_LEAST_WAIT_S, found.retry_after_ms / 1000)),
        )

    def settle(self, used_tokens: Mapping[str, int]) -> bool:
        """See `LineLimits.settle`."""
        allowance = self._keys.allowance(self._owner)
        if not used_tokens or not (allowance or self._has_charged):
            return False
        more_tokens = self._executor.run(self._limits.refund(self._owner, allowance, used_tokens=used_tokens))
        return self._full == "backlog" or (self._full == "tokens" and more_tokens < 0)
