"""Histograms: mass is kept, merging is a sum, forgetting composes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4queue.errors import ConfigError
from l4queue.planning.histogram import (
    Buckets,
    Counts,
    Demand,
    counts_of,
    difference,
    growth_fields,
    merge,
    with_backlog,
)

BUCKETS = Buckets.log_spaced(4096)
REQUESTS = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 5000)), max_size=20)


def _counts(requests: list[tuple[int, int]], observed_s: float = 0.0) -> Counts:
    return counts_of(BUCKETS, [p for p, _ in requests], [o for _, o in requests], observed_s=observed_s)


def _same(a: Counts, b: Counts) -> bool:
    fields = ("arrivals", "prompt_tokens", "decode_steps", "context_tokens")
    return all(np.allclose(getattr(a, f), getattr(b, f)) for f in fields) and a.observed_s == pytest.approx(
        b.observed_s
    )


@given(st.integers(0, 10**7))
def test_every_length_has_one_bucket_and_an_edge_belongs_to_the_upper(length: int) -> None:
    """The bucket's edges enclose the length."""
    i = BUCKETS.index(length)

    assert BUCKETS.edges[i] <= length
    assert i + 1 == len(BUCKETS) or length < BUCKETS.edges[i + 1]
    assert BUCKETS.index(BUCKETS.edges[i]) == i


@given(st.integers(1, 2**21), st.integers(1, 2**21))
def test_an_index_means_the_same_range_whatever_the_longest_length(a: int, b: int) -> None:
    """Edges of a shorter scale are the first edges of a longer one."""
    short, long = sorted((Buckets.log_spaced(a).edges, Buckets.log_spaced(b).edges), key=len)

    assert long[: len(short)] == short


@given(REQUESTS)
def test_mass_is_conserved(requests: list[tuple[int, int]]) -> None:
    """Arrivals, prompt tokens, steps and context add up to those of the requests."""
    counts = _counts(requests)

    assert counts.arrivals.sum() == len(requests)
    assert counts.prompt_tokens.sum() == sum(p for p, _ in requests)
    assert counts.decode_steps.sum() == pytest.approx(sum(o for _, o in requests))
    assert counts.context_tokens.sum() == pytest.approx(sum(p * o + o * (o - 1) / 2 for p, o in requests))


@given(REQUESTS)
def test_live_increments_add_up_to_the_counts_of_whole_requests(requests: list[tuple[int, int]]) -> None:
    """Workers that count growth piece by piece arrive at the same histogram as a list of requests."""
    fields: dict[str, int] = {}
    for prompt, output in requests:
        bucket = BUCKETS.index(prompt)
        parts = [{f"a:{bucket}": 1, f"p:{bucket}": prompt}]
        middle = prompt + output // 3
        parts.append(growth_fields(BUCKETS, from_tokens=prompt, to_tokens=middle))
        parts.append(growth_fields(BUCKETS, from_tokens=middle, to_tokens=prompt + output))
        for part in parts:
            for name, value in part.items():
                fields[name] = fields.get(name, 0) + value

    assert _same(Counts.from_fields(BUCKETS, fields), _counts(requests))
    assert _same(Counts.from_fields(BUCKETS, _counts(requests).to_fields()), _counts(requests))


@given(REQUESTS, REQUESTS, REQUESTS)
def test_merging_is_associative_and_commutative(a, b, c) -> None:
    """The order of merging does not matter."""
    x, y, z = _counts(a, 1.0), _counts(b, 2.0), _counts(c, 3.0)

    assert _same(merge(merge(x, y), z), merge(x, merge(y, z)))
    assert _same(merge(x, y), merge(y, x))
    assert _same(merge(x, y, z), _counts(a + b + c, 6.0))


@given(REQUESTS, st.floats(0, 100), st.floats(0, 100))
def test_forgetting_twice_is_forgetting_for_the_sum(requests, a: float, b: float) -> None:
    """decay(a + b) = decay(b) after decay(a), and the rates do not change by it."""
    counts = _counts(requests, 10.0)

    twice = counts.decay(a, half_life_s=30.0).decay(b, half_life_s=30.0)

    assert _same(twice, counts.decay(a + b, half_life_s=30.0))
    assert np.allclose(twice.demand().arrivals_per_s, counts.demand().arrivals_per_s)


@given(REQUESTS, st.floats(0, 1), st.floats(0, 1))
def test_quantiles_rise(requests, a: float, b: float) -> None:
    """A larger share has a larger quantile; the quantile lies above that share of the prompts."""
    counts = _counts(requests)
    low, high = sorted((a, b))

    assert counts.quantile(low, BUCKETS) <= counts.quantile(high, BUCKETS)
    if requests and max(p for p, _ in requests) < 4096:
        below = sum(p < counts.quantile(high, BUCKETS) for p, _ in requests)
        assert below >= high * len(requests) - 1e-6


@given(REQUESTS, REQUESTS)
def test_the_difference_of_two_readings_is_what_was_added(before, added) -> None:
    """Counters that only grow: later less earlier; after a reset the later reading counts whole."""
    earlier, later = _counts(before), _counts(before + added)

    assert _same(difference(later, earlier, elapsed_s=5.0), _counts(added, 5.0))
    assert difference(_counts([]), earlier, elapsed_s=5.0).arrivals.sum() == 0.0


@given(REQUESTS, st.lists(st.tuples(st.integers(0, 40), st.integers(0, 50)), max_size=6))
def test_a_backlog_adds_arrivals_and_never_takes_demand_away(requests, queued) -> None:
    """Arrivals rise by queued/window; nothing falls; without a backlog nothing changes."""
    demand = _counts(requests, 10.0).demand()

    raised = with_backlog(demand, queued, buckets=BUCKETS)

    total = sum(n for _, n in queued)
    assert raised.arrivals_per_s.sum() == pytest.approx(demand.arrivals_per_s.sum() + total / 10.0)
    assert (raised.decode_steps_per_s >= demand.decode_steps_per_s - 1e-9).all()
    assert (raised.context_tokens_per_s >= demand.context_tokens_per_s - 1e-6).all()
    assert with_backlog(demand, [], buckets=BUCKETS) is demand


@given(REQUESTS)
def test_steps_counted_by_arrival_are_the_same_steps(requests) -> None:
    """Moving steps to the bucket of arrival keeps their number and their context."""
    demand = _counts(requests, 10.0).demand()

    moved = demand.by_arrival(BUCKETS)

    assert np.allclose(demand.origins(BUCKETS).sum(axis=1), 1.0)
    assert moved.decode_steps_per_s.sum() == pytest.approx(demand.decode_steps_per_s.sum())
    assert moved.context_tokens_per_s.sum() == pytest.approx(demand.context_tokens_per_s.sum())


def test_a_saturated_bucket_is_raised_where_its_requests_go() -> None:
    """Requests that arrive short and grow raise the buckets that they grow into, not those of others."""
    demand = Demand.of_requests(BUCKETS, [20] * 10 + [3000] * 10, [500] * 10 + [10] * 10, duration_s=10.0)

    raised = with_backlog(demand, [(BUCKETS.index(20), 10)], buckets=BUCKETS)

    factor = raised.decode_steps_per_s / np.maximum(demand.decode_steps_per_s, 1e-12)
    assert factor[BUCKETS.index(300)] == pytest.approx(2.0)
    assert factor[BUCKETS.index(3000)] == pytest.approx(1.0, abs=0.1)


def test_a_backlog_of_lengths_never_seen_counts_as_average_output() -> None:
    """Waiting requests in a bucket without arrivals bring their prompt and a mean output."""
    demand = Demand.of_requests(BUCKETS, [20] * 10, [100] * 10, duration_s=10.0)

    raised = with_backlog(demand, [(BUCKETS.index(2048), 5)], buckets=BUCKETS)

    i = BUCKETS.index(2048)
    assert raised.arrivals_per_s[i] == pytest.approx(0.5)
    assert raised.decode_steps_per_s[i] == pytest.approx(50.0)
    assert raised.prompt_tokens_per_s[i] == pytest.approx(0.5 * BUCKETS.middle_tokens[i])


def test_crossings_are_the_rate_of_requests_that_pass_a_length() -> None:
    """Ten requests a second that grow from 100 to 4000 pass 1024 ten times a second."""
    demand = Demand.of_requests(BUCKETS, [100] * 10, [3900] * 10, duration_s=1.0)

    crossings = demand.crossings_per_s(BUCKETS)

    assert crossings[0] == 0.0
    assert crossings[BUCKETS.index(1024)] == pytest.approx(10.0)
    assert demand.reach_per_s(BUCKETS)[BUCKETS.index(1024)] == pytest.approx(10.0)


def test_fields_of_other_kinds_and_of_higher_buckets_do_not_break_reading() -> None:
    """Unknown fields are ignored, buckets beyond the last are added to it, values may be text."""
    counts = Counts.from_fields(BUCKETS, {"a:0": "3", "a:500": 2, "z:1": 9, "a:x": 1, "odd": 1})

    assert counts.arrivals[0] == 3.0
    assert counts.arrivals[-1] == 2.0
    assert counts.arrivals.sum() == 5.0


def test_edges_that_do_not_rise_from_zero_are_refused() -> None:
    """Buckets must start at zero and rise."""
    for edges in ((), (1, 2), (0, 5, 5), (0, 7, 3)):
        with pytest.raises(ConfigError, match="edges"):
            Buckets(edges=edges)
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge()


def test_nothing_seen_is_no_demand() -> None:
    """Zero counts, or no time observed, give zero rates and a zero quantile."""
    zero = Counts.zero(BUCKETS)

    assert zero.demand().is_empty
    assert zero.quantile(0.9, BUCKETS) == 0
    assert _counts([(5, 5)]).demand().is_empty


def test_the_nearest_edge_is_by_ratio() -> None:
    """Between 512 and 609 the middle is 558; below the first edges and above the last there is one choice."""
    assert BUCKETS.edges[BUCKETS.edge_near(550)] == 512
    assert BUCKETS.edges[BUCKETS.edge_near(565)] == 609
    assert BUCKETS.edge_near(10**9) == len(BUCKETS) - 1
    assert BUCKETS.edge_near(0) == 0
    assert Buckets(edges=(0,)).width_tokens.tolist() == [1.0]
