"""Blocks that a worker believes its engine's prefix cache to hold: those of what it ran, the latest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from l4queue.policy.prefix_blocks import num_leading

__all__ = ("BlockNews", "HeldBlocks")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockNews:
    """What others are to learn. `is_all`: `added` is all there is."""

    added: tuple[bytes, ...]
    removed: tuple[bytes, ...]
    is_all: bool


class HeldBlocks:
    """The blocks that were used last, at most `capacity` of them; those before a block are used whenever it is.

    So a block that is here has all those before it beside it.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = max(0, capacity)
        self._blocks: dict[bytes, None] = {}  # the longest unused first
        self._told: frozenset[bytes] | None = None

    def __len__(self) -> int:
        return len(self._blocks)

    def num_leading(self, keys: Sequence[bytes]) -> int:
        """How many of these blocks are here, up to the first that is not."""
        return num_leading(keys, self._blocks)

    def use(self, keys: Sequence[bytes]) -> None:
        """These are computed, or read, now."""
        for key in reversed(keys):
            self._blocks.pop(key, None)
            self._blocks[key] = None
        while len(self._blocks) > self._capacity:
            del self._blocks[next(iter(self._blocks))]

    def news(self) -> BlockNews | None:
        """What has changed since `told`; None for nothing."""
        if self._told is None:
            return BlockNews(added=tuple(self._blocks), removed=(), is_all=True)
        added = tuple(key for key in self._blocks if key not in self._told)
        removed = tuple(key for key in self._told if key not in self._blocks)
        return BlockNews(added=added, removed=removed, is_all=False) if added or removed else None

    def told(self, news: BlockNews) -> None:
        """The others know this."""
        before = frozenset[bytes]() if news.is_all or self._told is None else self._told
        self._told = before.union(news.added).difference(news.removed)

    def forgotten(self) -> None:
        """The others know nothing, as under a new lease: all is to be told again."""
        self._told = None
