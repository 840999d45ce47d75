"""Wait of a client that has met a full backlog."""

from __future__ import annotations

__all__ = ("retry_after_s",)

_DRAINED_SHARE = 0.05
"""Share of the backlog that is to have drained first. Chosen: with a smaller one clients meet a full backlog
again; with a larger one engines may run out of work meanwhile."""
_LEAST_S, _MOST_S = 0.5, 60.0
"""Bounds of the wait, s. Chosen: no storm of retries, and no client that sleeps on when workers have come."""
_BLIND_S = 1.0
"""The wait where nothing has drained lately, s. Chosen: nothing can be predicted, so near the lower bound."""


def retry_after_s(live_tokens: int, *, drain_tokens_per_s: float) -> float:
    """Time until a twentieth of the backlog has drained, s, within bounds."""
    wait_s = live_tokens * _DRAINED_SHARE / drain_tokens_per_s if drain_tokens_per_s > 0 else _BLIND_S
    return min(_MOST_S, max(_LEAST_S, wait_s))
