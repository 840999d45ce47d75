"""Who takes an arrival: the lightest where workers are punctual, anyone where they are not."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4queue.cost.step import StepCost
from l4queue.sim.engine.instance import Instance
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.wake import WakeRace, backlog_of

COST = StepCost(alpha_ms=7.0, beta_ms=0.02, gamma_ms=0.0, pi_ms=0.01, psi_ms=0.0)


def _engines(*pending_tokens: int) -> list[Instance]:
    """With prompts of these lengths before them: 10 ms for each 1,000 tokens."""
    engines = [Instance(index, cost=COST) for index in range(len(pending_tokens))]
    for engine, tokens in zip(engines, pending_tokens, strict=True):
        if tokens:
            engine.push(SimRequest(engine.index, 0.0, prompt_tokens=tokens, output_tokens=1))
    return engines


def _shares(engines: list[Instance], *, jitter_ms: float, draws: int = 4000) -> list[float]:
    race = WakeRace(np.random.default_rng(5), jitter_ms=jitter_ms)
    winners = [race.first(engines, has_room=lambda engine: True) for _ in range(draws)]
    found = Counter(winner.index for winner in winners if winner is not None)
    return [found[engine.index] / draws for engine in engines]


def test_without_delay_the_lightest_is_always_the_first() -> None:
    engines = _engines(3000, 1000, 2000)
    assert min(engines, key=backlog_of).index == 1
    assert _shares(engines, jitter_ms=0.0) == [0.0, 1.0, 0.0]
    assert _shares(_engines(1000, 1000), jitter_ms=0.0) == [1.0, 0.0]


@pytest.mark.parametrize("jitter_ms", [1.0, 10.0, 100.0])
def test_of_two_the_heavier_is_the_first_as_often_as_exponential_delays_say(jitter_ms: float) -> None:
    """It must wake earlier by the difference of 10 ms: half of exp(−10 / jitter) of the time."""
    expected = 0.5 * np.exp(-10.0 / jitter_ms)
    assert _shares(_engines(1000, 2000), jitter_ms=jitter_ms)[1] == pytest.approx(expected, abs=0.03)


def test_delays_much_longer_than_the_differences_make_all_alike() -> None:
    assert _shares(_engines(0, 1000, 4000), jitter_ms=1e6) == pytest.approx([1 / 3] * 3, abs=0.03)


def test_one_alone_is_the_first() -> None:
    assert _shares(_engines(5000), jitter_ms=10.0, draws=3) == [1.0]


@given(st.lists(st.tuples(st.integers(0, 4000), st.booleans()), max_size=8), st.sampled_from([0.0, 1.0, 50.0]))
def test_only_one_with_room_is_the_first(given_engines: list[tuple[int, bool]], jitter_ms: float) -> None:
    """None where none has room; without delay the lightest of those that have."""
    engines = _engines(*(tokens for tokens, _ in given_engines))
    able = [engine for engine, (_, has_room) in zip(engines, given_engines, strict=True) if has_room]

    race = WakeRace(np.random.default_rng(5), jitter_ms=jitter_ms)
    first = race.first(engines, has_room=lambda engine: engine in able)

    assert (first in able) if able else (first is None)
    if able and not jitter_ms:
        assert first is min(able, key=backlog_of)
