"""Memory of one request in Redis, estimated before it is written."""

from __future__ import annotations

__all__ = ("waiting_bytes",)

_SMALL_BYTES = 64  # a hash with a longer value needs more memory for each of its fields
_SMALL_RECORD_BYTES, _RECORD_BYTES = 700, 1700  # estimates of the fields beside body and prompt


def waiting_bytes(body: str, prompt: bytes) -> int:
    """About what a waiting request takes, for admission; `submit.lua` measures what it does take."""
    is_small = max(len(body), len(prompt)) <= _SMALL_BYTES
    return len(body) + len(prompt) + (_SMALL_RECORD_BYTES if is_small else _RECORD_BYTES)
