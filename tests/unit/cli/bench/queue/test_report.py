"""Medians, spreads and ratios of rounds."""

from __future__ import annotations

from typing import Any

import pytest

from l4queue.cli.bench.queue.measure import QueueRound
from l4queue.cli.bench.queue.report import ratios, summaries


def one(entrant: str, number: int, rate: float, cpu_s: float, **more: Any) -> QueueRound:
    """A round with these figures."""
    return QueueRound(
        entrant=entrant,
        round=number,
        durability="fast",
        prompt_bytes=200,
        num_requests=10,
        requests_per_s=rate,
        enqueued_per_s=2 * rate,
        cpu_s_per_1000={"total": cpu_s, "redis": cpu_s / 4},
        foreign_cores=0.1,
        fixed_work_ms=1.0,
        redis_commands=50.0,
        bytes_in=1000.0,
        bytes_out=500.0,
        kept_bytes=900.0,
        **more,
    )


ROUNDS = [
    one("ours", 0, 1000.0, 0.8, sent_commands=5.0, alone_ms={"result": [1.0, 2.0]}),
    one("peer", 0, 500.0, 1.6),
    one("ours", 1, 300.0, 0.9, alone_ms={"result": [3.0, 4.0]}),
    one("peer", 1, 200.0, 1.8),
    one("ours", 2, 1200.0, 0.7, alone_ms={"result": [5.0]}),
    one("peer", 2, 300.0, 1.4),
]


def test_ratios_are_of_the_same_round() -> None:
    """2, 1.5 and 4: not the ratio of the medians, which a slow round would bend."""
    (found,) = ratios(ROUNDS, ours="ours")
    assert (found["entrant"], found["to"]) == ("ours", "peer")
    assert found["requests_per_s"] == {"median": 2.0, "min": 1.5, "max": 4.0}
    assert found["cpu_s"]["median"] == pytest.approx(0.5)


def test_a_summary_has_the_spread_of_the_rounds_and_all_latencies_together() -> None:
    """Commands are counted in the first round only."""
    ours, peer = summaries(ROUNDS)
    assert ours["requests_per_s"] == {"median": 1000.0, "min": 300.0, "max": 1200.0}
    assert ours["cpu_s_per_1000"]["redis"]["median"] == pytest.approx(0.2)
    assert ours["num_requests"] == 30
    assert ours["sent_commands"] == 5.0
    assert ours["alone_ms"]["result"]["num"] == 5
    assert ours["alone_ms"]["result"]["p50"] == 3.0
    assert (peer["alone_ms"], peer["half_rate_per_s"]["median"], peer["sent_commands"]) == ({}, None, None)
