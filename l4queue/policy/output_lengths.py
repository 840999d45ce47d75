"""Output lengths: the expected remaining output of a request that has come this far."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable
from itertools import accumulate

from l4queue.sampling import DEFAULT_MAX_TOKENS

__all__ = ("FIRST_GUESS_TOKENS", "KNOWN_OUTPUTS", "OutputLengths")

FIRST_GUESS_TOKENS = float(DEFAULT_MAX_TOKENS)
"""Mean output before the first one is known, tokens: the bound of a request that names none."""
KNOWN_OUTPUTS = 3000
"""Latest outputs that are remembered: enough for the tail above the 99th percentile, 30 of them. More would follow
a change of traffic later."""


class OutputLengths:
    """The latest `size` output lengths seen, tokens; older ones are forgotten."""

    def __init__(self, *, size: int = KNOWN_OUTPUTS) -> None:
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []
        self._total = 0
        self._sums: list[int] | None = None
        self._size = size

    def __len__(self) -> int:
        return len(self._recent)

    def add(self, lengths: Iterable[int]) -> None:
        """Learn from requests that have finished."""
        for length in lengths:
            self._recent.append(length)
            insort(self._sorted, length)
            self._total += length
            if len(self._recent) > self._size:
                oldest = self._recent.popleft()
                del self._sorted[bisect_right(self._sorted, oldest) - 1]
                self._total -= oldest
            self._sums = None

    @property
    def mean_tokens(self) -> float:
        """Mean output; a guess before the first."""
        return self._total / len(self._sorted) if self._sorted else FIRST_GUESS_TOKENS

    def expected_remaining(self, generated: int, *, limit: int | None = None) -> float:
        """Mean tokens that requests generated beyond `generated`, at most `limit`.

        Zero when none got further: nothing is known to be won by moving such a request. Before the first
        output is known: the guess.
        """
        if not self._sorted:
            expected = FIRST_GUESS_TOKENS
        else:
            longer = len(self._sorted) - bisect_right(self._sorted, generated)
            expected = self._longest_together()[longer - 1] / longer - generated if longer else 0.0
        return expected if limit is None else min(expected, float(limit))

    def _longest_together(self) -> list[int]:
        """Sum of the longest output, of the two longest, and so on."""
        if self._sums is None:
            self._sums = list(accumulate(reversed(self._sorted)))
        return self._sums
