"""Change of traffic: rare alarms on what is steady, bursts included; a turn of the mix is seen in two rounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4queue.cost.coefficients import load_coefficients
from l4queue.planning.histogram import Buckets, Counts, counts_of
from l4queue.planning.traffic_change import (
    Learned,
    Noise,
    difference_of,
    is_due,
    is_early_round,
    learn,
    with_decision,
    work_ms,
)

BUCKETS = Buckets.log_spaced(131_072)
COST = load_coefficients("h100", "llama-3.1-8b")
PERIOD_S = 10.0


def round_of(rng: np.random.Generator, *, rate: float, share_long: float, burst: float = 1.0) -> Counts:
    """Ten seconds of short and long prompts; `burst` requests of a kind come at a time, on average."""
    number = int(rng.poisson(rate * PERIOD_S / burst))
    sizes = rng.geometric(1.0 / burst, number)
    is_long = np.repeat(rng.random(number) < share_long, sizes)
    total = len(is_long)
    short, long = rng.lognormal(5.0, 0.8, total), rng.lognormal(8.5, 0.5, total)
    prompts = np.minimum(np.where(is_long, long, short).astype(int) + 1, 100_000)
    return counts_of(BUCKETS, prompts, np.full(total, 60), observed_s=PERIOD_S)


def fed(rounds: list[Counts], *, half_life_s: float = 120.0) -> list[Learned]:
    """What is known after each round."""
    learned, known = Learned.nothing(BUCKETS, now_s=0.0), []
    for index, gained in enumerate(rounds):
        work = work_ms(gained, buckets=BUCKETS, cost=COST)
        learned = learn(learned, gained, now_s=(index + 1) * PERIOD_S, half_life_s=half_life_s, work=work)
        known.append(learned)
    return known


def alarms(known: list[Learned]) -> int:
    """How often all but the latest round was forgotten."""
    return len({k.begun_s for k in known}) - 1


def turns(known: list[Learned]) -> int:
    """How often the lengths were forgotten, too."""
    return len({k.mix_begun_s for k in known}) - 1


@pytest.mark.parametrize("rate", [0.5, 3.0, 30.0, 300.0])
@pytest.mark.parametrize("burst", [1.0, 5.0])
@pytest.mark.parametrize("share_long", [0.03, 0.1, 0.5])
def test_steady_traffic_raises_hardly_an_alarm(rate: float, burst: float, share_long: float) -> None:
    """Two hours, six seeds: at most one alarm where requests come singly, five where five of a kind do."""
    total = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        total += alarms(fed([round_of(rng, rate=rate, share_long=share_long, burst=burst) for _ in range(120)]))

    assert total <= (1 if burst == 1.0 else 5)


@pytest.mark.parametrize(("rate", "bursts"), [(10.0, 1.0), (30.0, 1.0), (30.0, 4.0), (300.0, 4.0)])
def test_a_turn_of_the_mix_is_seen_in_two_rounds_and_the_old_is_forgotten(rate: float, bursts: float) -> None:
    """3 % long prompts, 25 % at a quarter of the rate, and back: one turn in twenty is late, three in bursts."""
    parts = [(rate, 0.03), (rate / 4.6, 0.25), (rate, 0.03)]
    late = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        known = fed([round_of(rng, rate=r, share_long=s, burst=bursts) for r, s in parts for _ in range(8)])
        late += sum(known[t + 1].mix_begun_s not in (t * PERIOD_S, (t + 1) * PERIOD_S) for t in (8, 16))

    assert late <= (1 if bursts == 1.0 else 3)


@pytest.mark.parametrize("burst", [1.0, 5.0])
@pytest.mark.parametrize("share_long", [0.03, 0.1, 0.5])
def test_another_rate_leaves_the_lengths_known(burst: float, share_long: float) -> None:
    """The rate triples and falls back, six times: it is known after two rounds, and the mix is forgotten once."""
    forgotten = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        parts = [(30.0, 8), (100.0, 8), (30.0, 8)]
        known = fed(
            [
                round_of(rng, rate=r, share_long=share_long, burst=burst)
                for r, number in parts
                for _ in range(number)
            ]
        )
        forgotten += turns(known)
        rates = [k.counts.demand().arrivals_per_s.sum() for k in (known[9], known[17])]
        assert rates == pytest.approx([100.0, 30.0], rel=0.1 * burst)

    assert forgotten <= 1


def test_a_pause_says_nothing_of_the_traffic() -> None:
    """A minute without requests: rate and lengths stay known, fade by half in two minutes, and nothing is new."""
    rng = np.random.default_rng(0)
    before = [round_of(rng, rate=30.0, share_long=0.1) for _ in range(8)]
    pause = [counts_of(BUCKETS, [], [], observed_s=PERIOD_S) for _ in range(6)]

    known = fed([*before, *pause, round_of(rng, rate=30.0, share_long=0.1)])

    last, paused = known[7], known[13]
    rates = [k.counts.demand().arrivals_per_s.sum() for k in (last, paused, known[14])]
    assert rates == pytest.approx([30.0] * 3, rel=0.1)
    assert paused.counts.arrivals.sum() == pytest.approx(last.counts.arrivals.sum() * 0.5**0.5)
    assert alarms(known) == 0
    assert not is_due(with_decision(paused), work=work_ms(before[0], buckets=BUCKETS, cost=COST))


@given(st.integers(0, 10_000), st.floats(0.1, 500.0), st.floats(0.0, 1.0))
def test_the_same_again_is_nothing_new(seed: int, rate: float, share_long: float) -> None:
    """Equal counts in equal time: no difference, no alarm, nothing to decide until as much has come again."""
    gained = round_of(np.random.default_rng(seed), rate=rate, share_long=share_long)
    known = fed([gained] * 4)
    work = work_ms(gained, buckets=BUCKETS, cost=COST)
    decided = with_decision(known[-1])

    assert alarms(known) == 0
    assert difference_of(gained, gained, work=work) == 0.0
    if gained.arrivals.sum():
        after = learn(decided, gained, now_s=5 * PERIOD_S, half_life_s=120.0, work=work)
        assert is_due(known[-1], work=work)
        assert not is_due(decided, work=work)
        assert not is_due(after, work=work)
        for index in range(4):
            after = learn(after, gained, now_s=(6 + index) * PERIOD_S, half_life_s=120.0, work=work)
        assert is_due(after, work=work)


def test_a_silence_is_forgotten_with_the_first_arrivals() -> None:
    """Traffic, an hour without any, then thirty a second: the rate is thirty, not thirty in an hour."""
    rng = np.random.default_rng(0)
    first = round_of(rng, rate=30.0, share_long=0.1)
    silence = [counts_of(BUCKETS, [], [], observed_s=PERIOD_S) for _ in range(360)]

    known = fed([first, *silence, round_of(rng, rate=30.0, share_long=0.1)])[-1]

    assert known.counts.demand().arrivals_per_s.sum() == pytest.approx(30.0, rel=0.3)
    assert known.begun_s == 3610.0


def test_planning_is_early_only_before_anything_is_known_and_when_enough_came() -> None:
    """A few prompts, or one that is all the work, do not tell enough; nor while most are still there."""
    nothing = Learned.nothing(BUCKETS, now_s=0.0)
    few = counts_of(BUCKETS, [200] * 5, [10] * 5, observed_s=1.0)
    many = counts_of(BUCKETS, [200] * 500, [10] * 500, observed_s=1.0)
    one = counts_of(BUCKETS, [10] * 50 + [100_000], [1] * 51, observed_s=1.0)

    def is_early(before: Learned, gained: Counts, num_unfinished: int = 0) -> bool:
        work = work_ms(gained, buckets=BUCKETS, cost=COST)
        return is_early_round(before, gained, num_unfinished=num_unfinished, work=work)

    assert is_early(nothing, many)
    assert is_early(nothing, many, 250)
    assert not is_early(nothing, many, 251)
    assert not is_early(nothing, few)
    assert not is_early(nothing, one)
    assert not is_early(nothing, Counts.zero(BUCKETS))
    known = learn(nothing, few, now_s=1.0, half_life_s=120.0, work=work_ms(few, buckets=BUCKETS, cost=COST))
    assert not is_early(known, many)


def test_how_much_traffic_varies_is_at_least_as_much_as_chance() -> None:
    """Ten degrees of Poisson arrivals are taken for granted."""
    assert Noise().factor == 1.0
    assert Noise(statistic=1.0, degrees=10.0).factor == 1.0
    assert Noise(statistic=90.0, degrees=10.0).factor == 5.0
