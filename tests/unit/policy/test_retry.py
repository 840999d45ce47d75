"""When a client tries again that has met a full backlog."""

from __future__ import annotations

import pytest

from l4queue.policy.retry import retry_after_s


@pytest.mark.parametrize(
    ("live_tokens", "drain_tokens_per_s", "wait_s"),
    [(100_000, 1000.0, 5.0), (100_000, 1e6, 0.5), (10**9, 1.0, 60.0), (100_000, 0.0, 1.0)],
)
def test_it_waits_until_a_twentieth_has_drained(
    live_tokens: int, drain_tokens_per_s: float, wait_s: float
) -> None:
    """Between half a second and a minute; a second where the rate is unknown."""
    assert retry_after_s(live_tokens, drain_tokens_per_s=drain_tokens_per_s) == wait_s
