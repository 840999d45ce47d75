"""What is known of every line of a batch, in 17 bytes a line: finished, duplicate or still to do. Pure."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

__all__ = ("LineIndex", "LineState")

_Words = NDArray[np.uint64]


class LineState(IntEnum):
    """What is to be done with a line."""

    OPEN = 0
    SUCCEEDED = 1  # in the output file
    FAILED = 2  # in the error file
    INVALID = 3  # to be reported, cannot be sent
    DUPLICATE = 4  # to be reported, an earlier line has its custom_id
    EMPTY = 5  # no line at all


class LineIndex:
    """Filled by `add` in the order of the lines, then `resolve`d once with what is finished.

    A custom_id is kept as 128 bits of its hash: two different ones count as the same once in 10^26 batches
    of a million lines.
    """

    def __init__(self) -> None:
        self._high, self._low = array("Q"), array("Q")
        self._states = bytearray()
        self._repeats = self._firsts = np.empty(0, dtype=np.int64)
        self._finished = {state: (array("Q"), array("Q")) for state in (LineState.FAILED, LineState.SUCCEEDED)}

    def __len__(self) -> int:
        """Lines of the file, empty ones included."""
        return len(self._states)

    def add(self, custom_id: str | None, *, is_empty: bool = False) -> None:
        """The next line of the input; None when it has no usable custom_id."""
        state = LineState.EMPTY if is_empty else LineState.INVALID if custom_id is None else LineState.OPEN
        number = len(self._states)
        high, low = (number, 0) if custom_id is None else _hash(custom_id)
        self._high.append(high)
        self._low.append(low)
        self._states.append(state)

    def add_finished(self, custom_id: str, state: LineState) -> None:
        """A custom_id that is in the output file (SUCCEEDED) or in the error file (FAILED)."""
        words = _hash(custom_id)
        for column, word in zip(self._finished[state], words, strict=True):
            column.append(word)

    def resolve(self, *, reported: Iterable[int] = ()) -> None:
        """Mark duplicates and finished lines, then forget the hashes.

        `reported` are numbers of invalid and duplicate lines that the error file has.
        """
        states = np.frombuffer(self._states, dtype=np.uint8)
        is_open = np.flatnonzero(states == LineState.OPEN)
        high, low = _words(self._high)[is_open], _words(self._low)[is_open]
        order = np.lexsort((low, high))  # stable: of equal ones the first line comes first
        lines, high, low = is_open[order], high[order], low[order]
        is_first = np.ones(len(lines), dtype=bool)
        is_first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        firsts = lines[np.maximum.accumulate(np.where(is_first, np.arange(len(lines)), 0))]
        for state, (finished_high, finished_low) in self._finished.items():
            found = _positions(high, low, _words(finished_high), _words(finished_low))
            states[lines[found]] = state
        states[lines[~is_first]] = LineState.DUPLICATE
        in_order = np.argsort(lines[~is_first])
        self._repeats, self._firsts = lines[~is_first][in_order], firsts[~is_first][in_order]
        for number in reported:
            if 1 <= number <= len(states) and states[number - 1] in (LineState.INVALID, LineState.DUPLICATE):
                states[number - 1] = LineState.FAILED
        self._high, self._low, self._finished = array("Q"), array("Q"), {}

    def first_of(self, number: int) -> int:
        """The line whose custom_id the duplicate line `number` repeats. Numbers start at 1."""
        return int(self._firsts[np.searchsorted(self._repeats, number - 1)]) + 1

    def mark(self, number: int, state: LineState) -> None:
        """Line `number` is in this state now."""
        self._states[number - 1] = state

    def state(self, number: int) -> LineState:
        """Of line `number`, from 1."""
        return LineState(self._states[number - 1])

    def count(self, state: LineState) -> int:
        """Lines in this state."""
        return self._states.count(state)


def _positions(high: _Words, low: _Words, wanted_high: _Words, wanted_low: _Words) -> NDArray[np.intp]:
    """Where the wanted words are among sorted ones, of equal ones the first; unknown ones are left out."""
    if not len(high) or not len(wanted_high):
        return np.empty(0, dtype=np.intp)
    places = np.minimum(np.searchsorted(high, wanted_high), len(high) - 1)
    found: NDArray[np.intp] = places[(high[places] == wanted_high) & (low[places] == wanted_low)]
    return found


def _hash(custom_id: str) -> tuple[int, int]:
    digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def _words(values: array[int]) -> _Words:
    return np.frombuffer(values, dtype=np.uint64) if values else np.empty(0, dtype=np.uint64)
