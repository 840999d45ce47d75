"""Results that this client has read, reported in batches: they go first for want of room. Does no I/O."""

from __future__ import annotations

from collections import deque
from contextlib import suppress

from l4queue.protocol.calls import Call
from l4queue.protocol.retention import Retention

__all__ = ("ReadMarks",)

_MOST = 256  # results of one report
_INTERVAL_S = 5.0
"""Chosen well below the 15 s after which results are packed, so that a wait pays one round trip in 5 s at most."""


class ReadMarks:
    """Ids of read results that are not reported yet. Thread-safe, since a deque is."""

    def __init__(self, retention: Retention, *, now_s: float) -> None:
        self._retention = retention
        self._ids: deque[str] = deque(maxlen=4 * _MOST)  # a report that is lost costs an order, not a result
        self._reported_s = now_s

    def add(self, request_id: str, *, now_s: float) -> Call[int] | None:
        """Note one result; the report that is due, if one is."""
        self._ids.append(request_id)
        if len(self._ids) < _MOST and now_s - self._reported_s < _INTERVAL_S:
            return None
        self._reported_s = now_s
        return self.rest()

    def rest(self) -> Call[int] | None:
        """The report of all that is noted; None where nothing is."""
        ids: list[str] = []
        with suppress(IndexError):
            while len(ids) < 4 * _MOST:
                ids.append(self._ids.popleft())
        return self._retention.mark_read(ids) if ids else None
