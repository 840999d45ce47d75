"""LineRate of a batch, and the time left by it."""

from __future__ import annotations

import pytest

from l4queue.cli.batch import _span
from l4queue.client.batch.line_rate import LineRate


def test_nothing_is_promised_before_anything_ended() -> None:
    """Nor while nothing moves."""
    pace = LineRate()
    assert (pace.lines_per_s, pace.left_s(10)) == (0.0, None)
    for now_s in (1.0, 2.0, 3.0):
        pace.saw(now_s, 7)
    assert (pace.lines_per_s, pace.left_s(10)) == (0.0, None)


def test_the_rate_is_that_of_the_last_half_minute() -> None:
    """Ten points a second cost no more than one; a slow beginning is forgotten."""
    pace = LineRate(window_s=30.0)
    for tenth in range(1000):
        pace.saw(tenth / 10, tenth // 10)  # 1 a second
    assert pace.lines_per_s == pytest.approx(1.0, rel=0.05)
    for tenth in range(1000, 1400):
        pace.saw(tenth / 10, 100 + (tenth - 1000) * 4)  # 40 a second
    assert pace.lines_per_s == pytest.approx(40.0, rel=0.05)
    assert pace.left_s(400) == pytest.approx(10.0, rel=0.05)
    assert len(pace._seen) < 40


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3725, "1 h 2 min"), (9e6, "2,500 h 0 min")],
)
def test_a_time_left_has_two_units(duration_s: float, text: str) -> None:
    assert _span(duration_s) == text
