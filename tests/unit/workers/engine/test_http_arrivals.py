"""Steps as the arrival of tokens tells of them, on a clock that is set by hand."""

from __future__ import annotations

import pytest

from workers.engine.base import StepRecord
from workers.engine.http.arrivals import ArrivalWatch


class Hand:
    """A clock in seconds, moved by milliseconds."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def later(self, ms: float) -> None:
        """Let time pass."""
        self.now_s += ms / 1000


@pytest.fixture
def hand() -> Hand:
    return Hand()


@pytest.fixture
def watch(hand: Hand) -> ArrivalWatch:
    return ArrivalWatch(max_batched_tokens=100, clock=hand)


def step(elapsed_ms: float, **work: float) -> StepRecord:
    """A record of a step; what is not named is 0."""
    shape = dict.fromkeys(("num_decodes", "context_tokens", "prefill_tokens", "prefill_pairs", "skew_tokens"), 0.0)
    return StepRecord(elapsed_ms=pytest.approx(elapsed_ms), **(shape | work))  # type: ignore[arg-type]


def test_tokens_that_come_together_are_one_step(watch: ArrivalWatch, hand: Hand) -> None:
    """Two prompts in one step, then steps with a token each; the last is recorded when the next tokens come."""
    hand.later(500)  # idle: no part of a step
    watch.sent("a", num_tokens=10)
    watch.sent("b", num_tokens=30)
    hand.later(20)
    watch.came("a", num_tokens=1)
    hand.later(1)
    watch.came("b", num_tokens=1)
    for _ in range(2):
        hand.later(10)
        watch.came("b", num_tokens=1)
        watch.came("a", num_tokens=1)
    hand.later(10)
    watch.came("a", num_tokens=1)

    assert watch.take_records() == [
        step(20, prefill_tokens=40, prefill_pairs=10**2 / 2 + 30**2 / 2),
        step(11, num_decodes=2, context_tokens=11 + 31, skew_tokens=20),
        step(10, num_decodes=2, context_tokens=12 + 32, skew_tokens=20),
    ]
    assert (watch.num_steps, watch.last_step_ms) == (3, pytest.approx(10))
    assert watch.take_records() == []


def test_a_long_prompt_alone_took_as_many_steps_as_it_needs(watch: ArrivalWatch, hand: Hand) -> None:
    """They share their time alike; tokens and pairs are all accounted for."""
    watch.sent("a", num_tokens=250)
    hand.later(60)
    watch.came("a", num_tokens=1)
    hand.later(10)
    watch.came("a", num_tokens=1)
    records = watch.take_records()
    assert [(r.prefill_tokens, round(r.elapsed_ms)) for r in records] == [(100, 20), (100, 20), (50, 20)]
    assert sum(r.prefill_pairs for r in records) == 250**2 / 2


def test_a_long_prompt_beside_others_is_spread_over_their_steps(watch: ArrivalWatch, hand: Hand) -> None:
    """What it has left when its first token comes is of that step, as far as it fits."""
    watch.sent("a", num_tokens=5)
    hand.later(10)
    watch.came("a", num_tokens=1)
    watch.sent("long", num_tokens=180)
    for _ in range(3):
        hand.later(30)
        watch.came("a", num_tokens=1)
    watch.came("long", num_tokens=1)
    hand.later(10)
    watch.came("a", num_tokens=1)
    assert [r.prefill_tokens for r in watch.take_records()] == [5, 99, 81, 0]


@pytest.mark.parametrize(
    ("is_speculating", "records"),
    [
        (False, [step(10, num_decodes=1, context_tokens=11)] * 3),
        (True, [step(30, num_decodes=1, context_tokens=11, tokens_per_decode=3)]),
    ],
)
def test_several_tokens_at_once_are_steps_unless_the_engine_guesses(
    watch: ArrivalWatch, hand: Hand, is_speculating: bool, records: list[StepRecord]
) -> None:
    """A late event loop hands over several steps in one piece."""
    watch.is_speculating = is_speculating
    watch.sent("a", num_tokens=10)
    hand.later(10)
    watch.came("a", num_tokens=1)
    hand.later(30)
    watch.came("a", num_tokens=3)
    hand.later(10)
    watch.came("a", num_tokens=1)
    assert watch.take_records()[1:] == records


def test_a_pause_is_no_step_and_those_that_left_hold_nothing(watch: ArrivalWatch, hand: Hand) -> None:
    """Neither ended nor aborted requests count; an id may come again, and tokens of strangers change nothing."""
    watch.sent("a", num_tokens=10)
    hand.later(10)
    watch.came("a", num_tokens=1)
    assert watch.held_tokens == 11
    watch.left("a")
    watch.left("unknown")
    watch.came("a", num_tokens=1)
    hand.later(5000)
    watch.sent("a", num_tokens=20)
    assert watch.held_tokens == 20
    hand.later(7)
    watch.came("a", num_tokens=1)
    hand.later(3)
    watch.came("a", num_tokens=1)
    assert [round(r.elapsed_ms) for r in watch.take_records() if r.prefill_tokens] == [10, 7]
