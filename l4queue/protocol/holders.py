"""Holders of prompts: what workers tell of their prefix caches, and the head of a queue with its holders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from l4queue.compat import object_of
from l4queue.errors import UnreadableValue
from l4queue.policy.prefix_affinity import QueuedPrompt
from l4queue.policy.prefix_blocks import KEY_BYTES
from l4queue.protocol.calls import Call, Verdict
from l4queue.protocol.keys import Keys
from l4queue.protocol.replies import parse_verdict

__all__ = ("BLOCKS_TTL_MS", "hold", "look")

BLOCKS_TTL_MS = 600_000
"""How long blocks are known without news of their worker. Chosen: ten times the longest pause between two."""


def hold(
    keys: Keys, incarnation: str, *, added: Sequence[bytes], removed: Sequence[bytes], is_all: bool
) -> Call[Verdict]:
    """Note blocks that a worker's prefix cache holds, and others that it no longer does; `is_all`: nothing else.

    UNKNOWN where nothing is known of it: all is to be told. LOST when its lease was reaped.
    """
    args = (incarnation, b"".join(added), b"".join(removed), KEY_BYTES, int(is_all), BLOCKS_TTL_MS)
    return Call("hold", (keys.workers, keys.blocks(incarnation)), args, parse_verdict)


def look(keys: Keys, stage: str, *, limit: int, overdue_ms: float) -> Call[list[QueuedPrompt]]:
    """The first waiting requests of a stage in serving order. Changes nothing.

    A background request is among them once it has waited `overdue_ms` longer than its place in the order says.
    """
    args = (limit, round(overdue_ms))
    return Call("look", (keys.queue(stage),), args, lambda rows: [_waiting(row) for row in rows])


def _waiting(row: Sequence[bytes]) -> QueuedPrompt:
    request_id, length_tokens, waited_ms, held = row
    return QueuedPrompt(
        request_id=request_id.decode(errors="replace"),
        length_tokens=int(length_tokens),
        waited_ms=float(waited_ms),
        held_tokens=_held(held),
    )


def _held(told: bytes) -> Mapping[str, int]:
    """Tokens by worker. Nothing of what cannot be read: it would only have saved time."""
    if not told:
        return {}
    try:
        found: dict[str, Any] = object_of(told, what="held")
    except UnreadableValue:
        return {}
    return {worker: tokens for worker, tokens in found.items() if type(tokens) is int and tokens > 0}
