"""Speed of copies: as measured, followed slowly, never at the mercy of one copy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.kv.speed import CopySpeed

MB = 1_000_000


def measured(out_s: float = 0.010, in_s: float = 0.030) -> CopySpeed:
    """After a copy of 10 MB each way."""
    speed = CopySpeed()
    speed.copied_out(10 * MB, out_s)
    speed.copied_in(10 * MB, in_s)
    return speed


def test_a_move_takes_both_copies_after_each_other() -> None:
    """10 ms and 30 ms for 10 MB: 250 MB/s. One way alone tells nothing."""
    speed = CopySpeed()
    speed.copied_out(10 * MB, 0.010)

    assert speed.bytes_per_s == 0.0
    assert measured().bytes_per_s == pytest.approx(250 * MB)


def test_it_follows_what_lasts() -> None:
    """Copies that take twice as long for good halve it."""
    speed = measured()
    for _ in range(40):
        speed.copied_out(10 * MB, 0.020)
        speed.copied_in(10 * MB, 0.060)

    assert speed.bytes_per_s == pytest.approx(125 * MB, rel=0.01)


@given(st.floats(0.0, 1e6), st.integers(0, 10**12))
def test_one_copy_moves_it_by_less_than_two_thirds(elapsed_s: float, num_bytes: int) -> None:
    """However late, quick or small: a stopped process, a clock that jumps, a request of three tokens."""
    speed, known = measured(), measured().bytes_per_s
    speed.copied_out(num_bytes, elapsed_s)
    speed.copied_in(num_bytes, elapsed_s)

    assert 0.6 < speed.bytes_per_s / known < 1.2


def test_small_copies_tell_nothing() -> None:
    """They are mostly what every copy costs."""
    speed = measured()
    speed.copied_out(100_000, 0.010)

    assert speed.bytes_per_s == measured().bytes_per_s
