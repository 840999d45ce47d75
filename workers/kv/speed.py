"""Speed of KV copies: measured when an engine starts, and followed with each move."""

from __future__ import annotations

__all__ = ("CopySpeed",)

_LEAST_BYTES = 1 << 20
"""Of a copy that tells a speed. Chosen: one piece of a segment; less is mostly its fixed cost."""
_SHARE = 0.2
"""Weight of the latest copy in the average. Chosen: half of it is the last three copies, so that a neighbour's
load shows after some moves and a single slow one hardly."""
_MOST_FACTOR = 4.0
"""Most that one copy counts as above or below the average, as a factor. Chosen: copies beside a prefill took up to
three times as long as between idle engines (docs/kv-handover.md)."""


class CopySpeed:
    """Seconds a byte of copies out of an engine's cache and into it, each a moving average."""

    def __init__(self) -> None:
        self._out_s = 0.0
        self._in_s = 0.0

    @property
    def bytes_per_s(self) -> float:
        """Of one move, out and in after each other; 0 before both have been measured."""
        return 1.0 / (self._out_s + self._in_s) if self._out_s and self._in_s else 0.0

    def copied_out(self, num_bytes: int, elapsed_s: float) -> None:
        """A segment was written."""
        self._out_s = _average(self._out_s, num_bytes, elapsed_s)

    def copied_in(self, num_bytes: int, elapsed_s: float) -> None:
        """A segment was read."""
        self._in_s = _average(self._in_s, num_bytes, elapsed_s)


def _average(known_s: float, num_bytes: int, elapsed_s: float) -> float:
    if num_bytes < _LEAST_BYTES or elapsed_s <= 0.0:
        return known_s
    found_s = elapsed_s / num_bytes
    if not known_s:
        return found_s
    found_s = min(max(found_s, known_s / _MOST_FACTOR), known_s * _MOST_FACTOR)
    return known_s + _SHARE * (found_s - known_s)
