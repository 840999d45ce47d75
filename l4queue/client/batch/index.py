"""Progress index of a batch: 17 bytes a line that say finished, duplicate or still to do. Pure.

A line takes 17 bytes, and 8 more for each of its proofs while there are answers to be matched with them.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

__all__ = ("LineIndex", "LineState", "Strays", "word_of")

_Words = NDArray[np.uint64]


class LineState(IntEnum):
    """State of a line: what is left to do with it."""

    OPEN = 0
    SUCCEEDED = 1  # in the output file
    FAILED = 2  # in the error file
    INVALID = 3  # to be reported, cannot be sent
    DUPLICATE = 4  # to be reported, an earlier line has its custom_id
    EMPTY = 5  # no line at all


@dataclass(frozen=True, slots=True, kw_only=True)
class Strays:
    """Answers that belong to no line, by the order in which they were added; `reported` are numbers of lines."""

    succeeded: tuple[int, ...]
    failed: tuple[int, ...]
    reported: tuple[int, ...]


class LineIndex:
    """Filled by `add` in the order of the lines, then `resolve`d once with what is finished.

    A custom_id is kept as 128 bits of its hash: two different ones count as the same once in 10^26 batches
    of a million lines.
    """

    def __init__(self, *, num_proofs: int = 0) -> None:
        self._proofs = [array("Q") for _ in range(num_proofs)]
        self._high, self._low = array("Q"), array("Q")
        self._states = bytearray()
        self._repeats = self._firsts = np.empty(0, dtype=np.int64)
        self._finished = {
            state: (array("Q"), array("Q"), array("Q")) for state in (LineState.FAILED, LineState.SUCCEEDED)
        }

    def __len__(self) -> int:
        """Lines of the file, empty ones included."""
        return len(self._states)

    def add(self, custom_id: str | None, *, is_empty: bool = False, proofs: Sequence[int] = ()) -> None:
        """The next line of the input; None when it has no usable custom_id.

        `proofs` are words of which an answer of this line shows one; as many as the index was made for, or none.
        """
        state = LineState.EMPTY if is_empty else LineState.INVALID if custom_id is None else LineState.OPEN
        number = len(self._states)
        high, low = (number, 0) if custom_id is None else _hash(custom_id)
        self._high.append(high)
        self._low.append(low)
        self._states.append(state)
        for column, proof in zip(self._proofs, proofs or (0,) * len(self._proofs), strict=True):
            column.append(proof)

    def has_proof(self, number: int, proof: int) -> bool:
        """Whether line `number` is the one that shows this proof. Before `resolve`."""
        return 1 <= number <= len(self) and any(column[number - 1] == proof for column in self._proofs)

    def add_finished(self, custom_id: str, state: LineState, *, proof: int = 0) -> None:
        """A custom_id that is in the output file (SUCCEEDED) or in the error file (FAILED)."""
        for column, word in zip(self._finished[state], (*_hash(custom_id), proof), strict=True):
            column.append(word)

    def resolve(self, *, reported: Iterable[int] = ()) -> Strays:
        """Mark duplicates and finished lines, then forget the hashes; returns the answers of no line.

        `reported` are numbers of invalid and duplicate lines that the error file has. An answer whose proof its
        line does not have finishes nothing.
        """
        states = np.frombuffer(self._states, dtype=np.uint8)
        is_open = np.flatnonzero(states == LineState.OPEN)
        high, low = _words(self._high)[is_open], _words(self._low)[is_open]
        order = np.lexsort((low, high))  # stable: of equal ones the first line comes first
        lines, high, low = is_open[order], high[order], low[order]
        is_first = np.ones(len(lines), dtype=bool)
        is_first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        firsts = lines[np.maximum.accumulate(np.where(is_first, np.arange(len(lines)), 0))]
        strays: dict[LineState, tuple[int, ...]] = {}
        for state, (finished_high, finished_low, proof) in self._finished.items():
            is_right = np.zeros(len(proof), dtype=bool)
            if len(lines):
                places, is_found = _positions(high, low, _words(finished_high), _words(finished_low))
                is_right = is_found & self._is_proved(lines[places], _words(proof))
                states[lines[places[is_right]]] = state
            strays[state] = tuple(np.flatnonzero(~is_right).tolist())
        states[lines[~is_first]] = LineState.DUPLICATE
        in_order = np.argsort(lines[~is_first])
        self._repeats, self._firsts = lines[~is_first][in_order], firsts[~is_first][in_order]
        unknown = []
        for number in reported:
            if 1 <= number <= len(states) and states[number - 1] in (LineState.INVALID, LineState.DUPLICATE):
                states[number - 1] = LineState.FAILED
            else:
                unknown.append(number)
        self._high, self._low, self._finished, self._proofs = array("Q"), array("Q"), {}, []
        return Strays(
            succeeded=strays[LineState.SUCCEEDED], failed=strays[LineState.FAILED], reported=tuple(unknown)
        )

    def _is_proved(self, lines: NDArray[np.int64], proof: _Words) -> NDArray[np.bool_]:
        """Whether each of these lines has the proof that stands beside it; without proofs all have."""
        if not self._proofs:
            return np.ones(len(lines), dtype=bool)
        is_right = np.zeros(len(lines), dtype=bool)
        for column in self._proofs:
            is_right |= _words(column)[lines] == proof
        return is_right

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


def word_of(text: str) -> int:
    """64 bits of the hash of a text, as a proof."""
    return _hash(text)[0]


def _positions(
    high: _Words, low: _Words, wanted_high: _Words, wanted_low: _Words
) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Where the wanted words are among sorted ones, of equal ones the first, and whether they are there at all."""
    places = np.minimum(np.searchsorted(high, wanted_high), len(high) - 1)
    return places, (high[places] == wanted_high) & (low[places] == wanted_low)


def _hash(custom_id: str) -> tuple[int, int]:
    digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def _words(values: array[int]) -> _Words:
    return np.frombuffer(values, dtype=np.uint64) if values else np.empty(0, dtype=np.uint64)
