"""KV tickets of the emulated engine: no bytes are stored, the ticket itself states its tokens."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from zlib import crc32

__all__ = ("covered_tokens", "make_ticket")

_TICKET = re.compile(r"emulated-(\d{1,9})-(\d{1,9})-([0-9a-f]{8})")


def make_ticket(token_ids: Sequence[int], *, num_tokens: int) -> str:
    """A ticket for `num_tokens` tokens of a request that its engine got with these ids; "" for none."""
    return f"emulated-{num_tokens}-{len(token_ids)}-{_check(token_ids)}" if num_tokens > 0 else ""


def covered_tokens(ticket: str, token_ids: Sequence[int]) -> int:
    """How many of these tokens need no prefill, never the last one; 0 for a ticket of something else."""
    found = _TICKET.fullmatch(ticket)
    if found is None:
        return 0
    num_tokens, num_given, check = int(found[1]), int(found[2]), found[3]
    if num_given > len(token_ids) or _check(token_ids[:num_given]) != check:
        return 0
    return min(num_tokens, len(token_ids) - 1)


def _check(token_ids: Sequence[int]) -> str:
    return f"{crc32(array('q', token_ids).tobytes()):08x}"
