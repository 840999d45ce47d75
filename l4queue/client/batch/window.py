"""Window of a batch: enough requests in flight to keep the workers busy, and no more. Pure."""

from __future__ import annotations

from math import ceil

__all__ = ("SubmissionWindow",)

_START = 256  # requests, the first chunk
_LEAST = 16  # requests, so that waits can still be measured
_FIRST_GROWTH, _GROWTH, _SHRINK = 2.0, 1.1, 0.9  # factors of a round; see BatchWindow


class SubmissionWindow:
    """Grows while requests are taken soon, shrinks while they wait for longer than `target_wait_s`.

    What waits in a queue for long gains nothing: the workers are busy anyway. It ages, though, and the age of a
    request counts against the head start of interactive ones; and it fills the backlog for everybody. The
    window changes once in a round trip: after as many ended as were in flight when it last changed. It doubles
    until it was too large for the first time, then it moves by a tenth.
    """

    def __init__(self, *, most: int, target_wait_s: float = 20.0) -> None:
        self._most = most
        self._target_wait_s = target_wait_s
        self.size = min(_START, most)
        self._left_in_round = self.size
        self._waits_s: list[float] = []
        self._growth = _FIRST_GROWTH

    def ended(self, wait_s: float, *, in_flight: int) -> None:
        """One request has ended that had waited so long for a worker."""
        self._waits_s.append(wait_s)
        self._left_in_round -= 1
        if self._left_in_round > 0:
            return
        mean_s = sum(self._waits_s) / len(self._waits_s)
        if mean_s > self._target_wait_s:
            self.size = max(min(_LEAST, self._most), int(self.size * _SHRINK))
            self._growth = _GROWTH
        elif mean_s < self._target_wait_s / 2:
            self.size = min(self._most, ceil(self.size * self._growth))
        self._left_in_round = max(1, min(in_flight, self.size))
        self._waits_s.clear()
