"""Full disks: recognised in errors, in the last words of a Redis, and by the room that is left."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable
from pathlib import Path

__all__ = ("full_disk", "is_full")

_LITTLE_BYTES = 64 << 10  # chosen: less than one write of a log or of Redis's file
_WORDS = ("No space left on device", "Disk quota exceeded")


def is_full(error: OSError) -> bool:
    """Whether this is the error of a full disk or of a quota that is used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def full_disk(directory: Path, lines: Iterable[str]) -> str | None:
    """What to tell where these lines, or the room in `directory`, show that its disk is full; None if not."""
    try:
        free_bytes = shutil.disk_usage(directory).free
    except OSError:
        return None
    if free_bytes >= _LITTLE_BYTES and not any(word in line for line in lines for word in _WORDS):
        return None
    return f"the disk of {directory} is full ({free_bytes / 1e6:.1f} MB left): make room"
