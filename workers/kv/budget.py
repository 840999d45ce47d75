"""Budget of a host for KV caches on their way: what the moves of its engines need, within its memory."""

from __future__ import annotations

import os
from pathlib import Path

from l4queue.hardware import memory_limit_bytes
from l4queue.policy.steal import StealLimits

__all__ = ("affordable_bytes", "needed_bytes")

_MEMORY_SHARE = 0.25
"""Most of the memory of the host, or of the container, that segments take. Chosen: the rest is for engines and for
the system; memory is taken by the segments that there are, for the seconds of a move."""
_FILE_SYSTEM_SHARE = 0.5  # of the file system that segments lie in. Chosen: others use shared memory, too


def needed_bytes(*, longest_tokens: int, kv_bytes_per_token: int) -> int:
    """KV of one engine's moves: as many as may be in motion at once, each of the longest request."""
    return StealLimits().max_moves * longest_tokens * kv_bytes_per_token


def affordable_bytes(directory: Path) -> int:
    """A quarter of the memory, half of the file system. The same for all processes of a host."""
    found = os.statvfs(directory)
    return int(min(_MEMORY_SHARE * memory_limit_bytes(), _FILE_SYSTEM_SHARE * found.f_blocks * found.f_frsize))
