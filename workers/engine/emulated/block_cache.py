"""Prefix cache of an emulated engine: full blocks by content, the least recently freed evicted first.

The rules are those of `l4queue.sim.engine.prefix_cache`, which knows the blocks of a trace by number. Here a block
is known by the key of its tokens and everything before them (`l4queue.policy.prefix_blocks.next_key`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from l4queue.policy.prefix_blocks import num_leading

__all__ = ("BlockCache",)


class BlockCache:
    """Known blocks: held by requests, or free and still there."""

    def __init__(self) -> None:
        self._holders: dict[bytes, int] = {}
        self._free: dict[bytes, None] = {}  # in the order in which they were freed
        self._num_copies = 0

    def num_leading(self, keys: Sequence[bytes]) -> int:
        """How many of these blocks are known, up to the first that is not."""
        return num_leading(keys, self._holders, self._free)

    def num_held(self, keys: Iterable[bytes]) -> int:
        """How many of these others hold: they need no space."""
        return sum(key in self._holders for key in keys)

    def take(self, keys: Iterable[bytes]) -> None:
        """Hold known blocks."""
        for key in keys:
            self._free.pop(key, None)
            self._holders[key] = self._holders.get(key, 0) + 1

    def add(self, key: bytes) -> bytes:
        """Hold a block that was computed; what is known already is a copy, under a key that nobody finds."""
        if key in self._holders or key in self._free:
            self._num_copies += 1
            key = b"copy %d" % self._num_copies
        self._holders[key] = 1
        return key

    def release(self, keys: Sequence[bytes]) -> int:
        """Free blocks, the last first. Returns how many of them others still hold."""
        num_shared = 0
        for key in reversed(keys):
            others = self._holders.pop(key) - 1
            if others:
                self._holders[key] = others
                num_shared += 1
            else:
                self._free[key] = None
        return num_shared

    def trim(self, num_blocks: int) -> None:
        """Forget free blocks, the longest free first, until no more than this many are left."""
        while len(self._free) > max(0, num_blocks):
            del self._free[next(iter(self._free))]
