"""The window of requests in flight, against a fleet with a given rate."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4queue.client.batch.window import SubmissionWindow


def settled(window: SubmissionWindow, *, rate_per_s: float, run_s: float, rounds: int = 25) -> float:
    """The wait, s, once the window has settled before servers that finish so many a second at most."""
    wait_s = 0.0
    for _ in range(rounds):
        wait_s = max(0.0, window.size / rate_per_s - run_s)  # Little's law, always full
        for _ in range(window.size):
            window.ended(wait_s, in_flight=window.size)
    return max(0.0, window.size / rate_per_s - run_s)


@settings(deadline=None, max_examples=30)
@given(st.floats(1.0, 500.0), st.floats(0.01, 60.0))
def test_it_keeps_the_servers_busy_and_the_queue_short(rate_per_s: float, run_s: float) -> None:
    """Unless a bound is in the way: as many as run, and a wait of about the target."""
    window = SubmissionWindow(most=2000)
    wait_s = settled(window, rate_per_s=rate_per_s, run_s=run_s)

    assert window.size >= min(2000 / 2, 0.95 * rate_per_s * run_s)
    assert wait_s <= 30.0 + run_s or window.size <= 16


@pytest.mark.parametrize("most", [1, 7, 300])
def test_it_never_exceeds_its_bound(most: int) -> None:
    """Nor falls to nothing."""
    window = SubmissionWindow(most=most)
    for wait_s in (0.0, 1000.0, 0.0):
        for _ in range(5000):
            window.ended(wait_s, in_flight=window.size)
            assert 1 <= window.size <= most
    assert window.size == most
