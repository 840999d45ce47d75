"""Rate of a batch: lines finished a second, of late, and the time that the rest will take. Pure."""

from __future__ import annotations

from collections import deque

__all__ = ("LineRate",)


class LineRate:
    """Rate over the last `window_s`; of a shorter run over all of it."""

    def __init__(self, *, window_s: float = 30.0) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, int]] = deque()

    def saw(self, now_s: float, num_finished: int) -> None:
        """So many lines are finished now. One point a second is enough."""
        if len(self._seen) > 1 and now_s - self._seen[-2][0] < 1.0:
            self._seen.pop()
        self._seen.append((now_s, num_finished))
        while len(self._seen) > 2 and now_s - self._seen[1][0] >= self._window_s:
            self._seen.popleft()

    @property
    def lines_per_s(self) -> float:
        """0 until a line has ended."""
        if len(self._seen) < 2:
            return 0.0
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0

    def left_s(self, num_left: int) -> float | None:
        """Time until that number of lines is finished, s; None while nothing moves."""
        rate = self.lines_per_s
        return num_left / rate if rate > 0 else None
