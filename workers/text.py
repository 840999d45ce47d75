"""Text from token ids, piece by piece: a pure function of the ids, so that any worker can go on with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ("Piece", "TextStream", "TokenDecoder")


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that became certain, from the first `num_tokens` of the ids given; the rest came after a stop."""

    text: str
    num_tokens: int
    stopped: bool


class TokenDecoder(Protocol):
    """Turns ids into text as far as it is certain; keeps back bytes of an unfinished character."""

    def step(self, token_id: int) -> str:
        """Text that this token completes; may be empty."""

    def rest(self) -> str:
        """Text that no further token can change any more."""


class TextStream:
    """The text of one output, with its stop strings.

    What might be the beginning of a stop string is held back until the next tokens decide. At a stop
    string the text ends before it; the tokens up to the one that completed it are kept.
    """

    def __init__(self, decoder: TokenDecoder | None, *, stop: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def feed(self, token_ids: Sequence[int]) -> Piece:
        """Take in further ids."""
        if self._decoder is None:
            return Piece("", len(token_ids), False)
        step = self._decoder.step
        if not self._stop:
            return Piece("".join([step(token_id) for token_id in token_ids]), len(token_ids), False)
        out: list[str] = []
        for number, token_id in enumerate(token_ids, start=1):
            self._held += step(token_id)
            found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
            if found:
                out.append(self._held[: min(found)])
                self._held, self.stopped = "", True
                return Piece("".join(out), number, True)
            keep = self._undecided()
            cut = len(self._held) - keep
            out.append(self._held[:cut])
            self._held = self._held[cut:]
        return Piece("".join(out), len(token_ids), False)

    def replay(self, token_ids: Sequence[int]) -> bool:
        """Take in ids whose text was written before; true when they end with a stop string."""
        return self.feed(token_ids).stopped

    def flush(self) -> str:
        """The text held back, once no more tokens come."""
        rest, self._held = self._held + (self._decoder.rest() if self._decoder else ""), ""
        return rest

    def _undecided(self) -> int:
        """Length of the longest end of the held text that may begin a stop string."""
        for size in range(min(len(self._held), max(map(len, self._stop)) - 1), 0, -1):
            tail = self._held[-size:]
            if any(s.startswith(tail) for s in self._stop):
                return size
        return 0
