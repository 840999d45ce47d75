"""The serving order: static, shortest first with ageing, nobody starves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4queue.cost.coefficients import load_coefficients
from l4queue.cost.step import StepCost
from l4queue.policy.queue_order import (
    BACKGROUND,
    ageing_tokens_per_s,
    background_overdue_ms,
    in_class,
    score,
)

TIMES = st.integers(0, 10**7)
PROMPTS = st.integers(0, 200_000)
RATE = 2000.0
RATES = st.floats(1.0, 1e6)


@given(TIMES, PROMPTS, TIMES, PROMPTS, st.integers(0, 10**7))
def test_the_static_score_orders_as_ageing_does_at_any_time(a_ms, a_tokens, b_ms, b_tokens, later_ms) -> None:
    """prompt - rate·waiting at any common instant gives the same order as the score."""
    now_ms = max(a_ms, b_ms) + later_ms

    aged_a = a_tokens - RATE * (now_ms - a_ms) / 1000.0
    aged_b = b_tokens - RATE * (now_ms - b_ms) / 1000.0
    first = score(a_ms, a_tokens, ageing_tokens_per_s=RATE) < score(b_ms, b_tokens, ageing_tokens_per_s=RATE)

    if abs(aged_a - aged_b) > 1e-3:
        assert first == (aged_a < aged_b)


@given(TIMES, PROMPTS, PROMPTS, st.integers(-3, 3), st.integers(-3, 3), st.integers(1, 10**6))
def test_nobody_is_overtaken_by_what_arrives_after_the_bound(arrival, prompt, other, p, q, after) -> None:
    """A request that arrives later than the bound is served later, whatever its prompt."""
    best = score(0, 0, ageing_tokens_per_s=RATE, priority=min(p, q))
    bound = score(0, prompt, ageing_tokens_per_s=RATE, priority=p) - best

    mine = score(arrival, prompt, ageing_tokens_per_s=RATE, priority=p)
    late = score(arrival + bound + after, other, ageing_tokens_per_s=RATE, priority=q)

    assert late > mine


def test_priority_comes_first_then_the_prompt_then_the_arrival() -> None:
    """A class is worth its head start; lower values are served first."""
    urgent = score(0, 50_000, ageing_tokens_per_s=RATE, priority=-1)
    short = score(0, 10, ageing_tokens_per_s=RATE)
    long = score(0, 5000, ageing_tokens_per_s=RATE)

    assert urgent < short < long
    assert score(0, 10, ageing_tokens_per_s=RATE) < score(1, 10, ageing_tokens_per_s=RATE)
    assert long - short == (5000 - 10) / 2.0


@given(TIMES, st.integers(0, 10**7), st.integers(0, 10**7), st.integers(-100, 100), st.integers(-100, 100))
def test_no_class_and_no_prompt_is_overtaken_beyond_the_starvation_bound(arrival, prompt, other, p, q) -> None:
    """The lowest class with the longest prompt included."""
    mine = score(arrival, prompt, ageing_tokens_per_s=RATE, priority=p, starvation_bound_s=60.0)
    late = score(arrival + 60_001, other, ageing_tokens_per_s=RATE, priority=q, starvation_bound_s=60.0)

    assert late > mine


@given(TIMES, PROMPTS, PROMPTS, RATES, RATES)
def test_the_bound_holds_whatever_the_rate_was_at_each_arrival(arrival, prompt, other, early, late) -> None:
    """Rates are measured anew all the time, and dispatchers may not have the same."""
    mine = score(arrival, prompt, ageing_tokens_per_s=early, priority=100, starvation_bound_s=60.0)
    other_ms = score(arrival + 60_001, other, ageing_tokens_per_s=late, priority=-100, starvation_bound_s=60.0)

    assert other_ms > mine


@given(TIMES, PROMPTS, PROMPTS, RATES, RATES, st.integers(1, 10**6))
def test_a_later_rate_overtakes_nobody_beyond_the_set_back_that_it_arrived_with(
    arrival, prompt, other, early, late, after
) -> None:
    """The set-back of its own arrival is what others may make use of, whatever the rate is by then."""
    mine = score(arrival, prompt, ageing_tokens_per_s=early)

    assert score(mine + after, other, ageing_tokens_per_s=late) > mine


def test_a_prompt_is_set_back_by_thirty_times_its_prefill_on_any_machine() -> None:
    """An engine four times as slow ages four times as slowly; one without prices has a rate, too."""
    cost = StepCost(alpha_ms=0.0, beta_ms=0.1, gamma_ms=0.0, pi_ms=0.02, psi_ms=1e-6)
    slow = StepCost(alpha_ms=0.0, beta_ms=0.1, gamma_ms=0.0, pi_ms=0.08, psi_ms=1e-6)
    free = StepCost(alpha_ms=0.0, beta_ms=0.0, gamma_ms=0.0, pi_ms=0.0, psi_ms=0.0)

    rate = ageing_tokens_per_s(cost)

    assert score(0, 1000, ageing_tokens_per_s=rate) == pytest.approx(30 * 20.0)
    assert ageing_tokens_per_s(slow) == pytest.approx(rate / 4)
    assert ageing_tokens_per_s(cost, given=5.0) == 5.0
    assert 0.0 < ageing_tokens_per_s(free) < math.inf
    assert ageing_tokens_per_s(load_coefficients("h100", "llama-3.1-8b")) == pytest.approx(1900, rel=0.05)


@given(st.integers(0, 4 * 10**12), PROMPTS, st.integers(-100, 100), st.integers(-100, 101))
def test_the_class_can_be_told_from_the_score_and_the_place_too(arrival, prompt, priority, threshold) -> None:
    """For 100 years of the clock: background lies beyond; without its mark it has its place among all others."""
    plain = score(arrival, prompt, ageing_tokens_per_s=RATE, priority=priority)

    marked = in_class(plain, priority=priority, background_priority=threshold)

    is_background = priority >= threshold
    assert (marked >= BACKGROUND - 300_000) == is_background
    assert abs(marked - (BACKGROUND if is_background else 0.0) - plain) <= 0.125


@given(TIMES, PROMPTS, PROMPTS, st.integers(-100, 100), st.floats(1.0, 3600.0))
def test_what_arrives_the_bound_later_finds_background_overdue_and_comes_after_it(
    arrival, prompt, other, p, bound_s
) -> None:
    """However long it was held back, the starvation bound is that of all others."""
    mine = score(arrival, prompt, ageing_tokens_per_s=RATE, priority=100, starvation_bound_s=bound_s)
    late_ms = arrival + bound_s * 1000.0 + 1.0
    late = score(late_ms, other, ageing_tokens_per_s=RATE, priority=p, starvation_bound_s=bound_s)

    assert mine + background_overdue_ms(bound_s) <= late_ms
    assert mine < late
