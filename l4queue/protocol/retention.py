"""Retention of finished requests: packed, within a bound, until they expire or their client has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from l4queue.compat import MAX_NUMBER
from l4queue.protocol.calls import Arg, Call
from l4queue.protocol.keys import Keys

__all__ = ("PACK_AGE_MS", "Evicted", "Packed", "Retention")

PACK_AGE_MS = 15_000
"""Age at which an ended request is packed. A reader of an earlier release that is then in the middle of an output
that it did not submit has to begin again: it knows no bounds within an entry."""
_UNBOUNDED_BYTES = MAX_NUMBER
"""No bound, bytes: results go because they are named, not for want of room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Answer to `pack`: requests packed, and whether more are due."""

    num_packed: int
    has_more: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Evicted:
    """Answer to `evict`: results and keys that went early, bytes of what is kept, whether more is due."""

    num_dropped: int
    num_forgotten: int
    kept_bytes: int
    has_more: bool


class Retention:
    """Builders of the calls that concern what has ended. Pure."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys

    def pack(self, *, min_age_ms: int, max_requests: int, max_entries: int) -> Call[Packed]:
        """Store what ended at least `min_age_ms` ago in little memory, and count that memory."""
        k = self.keys
        args = (min_age_ms, max_requests, max_entries)
        return Call("pack", (k.finished, k.packed, k.results), args, _packed)

    def evict(self, *, max_bytes: int, limit: int) -> Call[Evicted]:
        """Remove results early while all together take more than `max_bytes`."""
        return Call("evict", (self.keys.results, self.keys.keyed), (max_bytes, limit), _evicted)

    def mark_read(self, request_ids: Sequence[str]) -> Call[int]:
        """Note that clients have these results, so that they go first for want of room; how many were noted."""
        return Call("mark_read", (self.keys.read,), tuple(request_ids), int)

    def discard(self, request_ids: Sequence[str]) -> Call[int]:
        """Delete requests that have ended, their output and their idempotency keys; how many were there."""
        args: tuple[Arg, ...] = (_UNBOUNDED_BYTES, 0, *request_ids)
        return Call("evict", (self.keys.results, self.keys.keyed), args, lambda reply: int(reply[4]))


def _packed(reply: list[int]) -> Packed:
    return Packed(num_packed=reply[0], has_more=bool(reply[1]))


def _evicted(reply: list[int]) -> Evicted:
    return Evicted(num_dropped=reply[0], num_forgotten=reply[1], kept_bytes=reply[2], has_more=bool(reply[3]))
