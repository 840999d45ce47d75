"""What a planner remembers between rounds: as it was, whatever has been learned; nothing of an older release."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from dispatcher.planner.rounds import _Memory
from l4queue.planning.histogram import Buckets, Counts, counts_of
from l4queue.planning.traffic_change import Learned, Noise, with_decision

BUCKETS = Buckets.log_spaced(8192)


def _learned() -> Learned:
    counts = counts_of(BUCKETS, [100, 3000, 40], [20, 60, 5], observed_s=12.5)
    since = counts_of(BUCKETS, [70], [3], observed_s=2.0)
    noise = Noise(statistic=7.25, degrees=4.0)
    return Learned(counts=counts, since=since, noise=noise, begun_s=1_700_000_000.25, mix_begun_s=1_690_000_000.5)


@pytest.mark.parametrize("learned", [_learned(), with_decision(_learned()), Learned.nothing(BUCKETS, now_s=3.0)])
def test_what_was_learned_is_read_back_as_it_was(learned: Learned) -> None:
    """Through JSON, as it is kept in Redis."""
    text = json.dumps(asdict(_Memory.of(learned, raw={"a:3": 9}, at_ms=5000)))

    memory = _Memory.parse(text)

    assert memory is not None
    assert (memory.raw, memory.at_ms) == ({"a:3": 9}, 5000)
    found = memory.learned(BUCKETS)
    _same(found.counts, learned.counts)
    _same(found.since, learned.since)
    assert (found.decided is None) == (learned.decided is None)
    if found.decided is not None and learned.decided is not None:
        _same(found.decided, learned.decided)
    assert (found.noise, found.begun_s, found.mix_begun_s) == (learned.noise, learned.begun_s, learned.mix_begun_s)


@pytest.mark.parametrize("text", [None, '{"at_ms": 1, "raw": {}, "learned": {}, "observed_s": 3.0}'])
def test_an_older_memory_is_none(text: str | None) -> None:
    """The planner begins anew."""
    assert _Memory.parse(text) is None


def _same(a: Counts, b: Counts) -> None:
    assert a.observed_s == b.observed_s
    for name in ("arrivals", "prompt_tokens", "decode_steps", "context_tokens"):
        assert np.allclose(getattr(a, name), getattr(b, name), atol=0.5)
