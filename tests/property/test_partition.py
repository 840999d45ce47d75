"""The partition against brute force, and what must hold for every demand."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost
from l4queue.errors import ConfigError
from l4queue.planning.histogram import Buckets, Demand
from l4queue.planning.partition import PartitionProblem, partition
from l4queue.planning.search import best_splits
from l4queue.planning.steady_state import Objective, PartitionSettings

pytestmark = pytest.mark.timeout(600)  # brute force by the thousand, on machines that are busy otherwise

_spec = importlib.util.spec_from_file_location("partition_oracle", Path(__file__).with_name("oracle.py"))
assert _spec is not None
assert _spec.loader is not None
oracle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)

COST = StepCost(
    alpha_ms=7.0, beta_ms=0.0126, gamma_ms=4.3e-5, pi_ms=0.017, psi_ms=2.3e-6, kv_capacity_tokens=445_008
)


@st.composite
def problems(
    draw: st.DrawFn, max_workers: int = 6, max_buckets: int = 6
) -> tuple[Demand, int, Buckets, PartitionSettings]:
    """A few requests on a few buckets, at a load from light to beyond what can be served."""
    edges = sorted(
        draw(st.sets(st.sampled_from([64, 256, 1024, 2048, 4096, 16384, 65536]), max_size=max_buckets - 1))
    )
    buckets = Buckets(edges=(0, *edges))
    sizes = draw(st.lists(st.tuples(st.integers(1, 100_000), st.integers(1, 3000)), min_size=1, max_size=12))
    workers = draw(st.integers(1, max_workers))
    price = MovePrice() if draw(st.booleans()) else MovePrice(bandwidth_bytes_per_s=50e9)
    wanted = PartitionSettings(
        objective=draw(st.sampled_from(list(Objective))),
        max_stages=draw(st.integers(1, 4)),
        move_price=price,
        long_bound=draw(st.sampled_from([1.0, 1.25, 2.0])),
    )
    demand = Demand.of_requests(buckets, [p for p, _ in sizes], [o for _, o in sizes], duration_s=1.0)
    plain = PartitionProblem(demand.scaled(1e-6), workers, buckets=buckets, cost=COST, settings=wanted)
    rho = draw(st.floats(0.05, 1.3))
    scale = rho * workers / float(plain.terms.load[0, -1]) * 1e-6
    return demand.scaled(scale), workers, buckets, wanted


@settings(max_examples=1500, deadline=None)
@given(problems())
def test_the_search_finds_what_brute_force_finds(case) -> None:
    """For each number of stages the objective is the least of all boundaries and worker counts, both ways."""
    demand, workers, buckets, wanted = case

    problem = PartitionProblem(demand, workers, buckets=buckets, cost=COST, settings=wanted)
    expected = oracle.brute_force(problem.demand, workers, buckets=buckets, cost=COST, settings=wanted)

    for method in ("dense", "pruned"):
        found = {len(s.workers): s for s in best_splits(problem.terms, workers, settings=wanted, method=method)}
        for k, least in expected.items():
            if math.isinf(least):
                assert k not in found
            else:
                assert found[k].cost == pytest.approx(least, rel=1e-9, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(problems(max_workers=40, max_buckets=8))
def test_both_ways_of_searching_agree_on_larger_cases(case) -> None:
    """Dense and pruned give the same cost for every number of stages."""
    demand, workers, buckets, wanted = case

    problem = PartitionProblem(demand, workers, buckets=buckets, cost=COST, settings=wanted)
    dense = best_splits(problem.terms, workers, settings=wanted, method="dense")
    pruned = best_splits(problem.terms, workers, settings=wanted, method="pruned")

    assert [len(s.workers) for s in dense] == [len(s.workers) for s in pruned]
    for a, b in zip(dense, pruned, strict=True):
        assert b.cost == pytest.approx(a.cost, rel=1e-9, abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(problems(max_workers=12, max_buckets=8))
def test_a_partition_covers_all_lengths_once_and_uses_all_workers(case) -> None:
    """Stages are in order without gap, the last is open, workers add up, and one stage is never better."""
    demand, workers, buckets, wanted = case

    found = partition(demand, workers, buckets=buckets, cost=COST, settings=wanted)

    assert found.stages[0].low_tokens == 0
    assert found.stages[-1].high_tokens is None
    for below, above in zip(found.stages, found.stages[1:], strict=False):
        assert below.high_tokens == above.low_tokens > below.low_tokens
    assert sum(s.num_workers for s in found.stages) == workers
    assert all(s.num_workers >= 1 for s in found.stages)
    assert len(found.stages) <= wanted.max_stages
    assert found.objective <= found.objective_one_stage
    assert found == partition(demand, workers, buckets=buckets, cost=COST, settings=wanted)


@settings(max_examples=80, deadline=None)
@given(problems(max_workers=8), st.integers(2, 3))
def test_twice_the_traffic_on_twice_the_workers_is_at_most_twice_the_objective(case, factor: int) -> None:
    """The closed form is homogeneous: a plan scaled up costs so much more, and the best one not more than that."""
    demand, workers, buckets, wanted = case
    wanted = replace(wanted, objective=Objective.MEAN)

    small = partition(demand, workers, buckets=buckets, cost=COST, settings=wanted)
    large = partition(demand.scaled(factor), workers * factor, buckets=buckets, cost=COST, settings=wanted)

    assert large.demand_scale == pytest.approx(small.demand_scale, rel=1e-6)
    assert large.objective <= factor * small.objective * (1 + 1e-6)


@settings(max_examples=80, deadline=None)
@given(problems(max_workers=8))
def test_a_worker_more_never_makes_it_worse(case) -> None:
    """The objective falls with the number of workers while the demand can be served."""
    demand, workers, buckets, wanted = case
    wanted = replace(wanted, objective=Objective.MEAN)

    fewer = partition(demand, workers, buckets=buckets, cost=COST, settings=wanted)
    more = partition(demand, workers + 1, buckets=buckets, cost=COST, settings=wanted)

    if fewer.demand_scale == 1.0:
        assert more.objective <= fewer.objective * (1 + 1e-9)
    else:
        assert more.demand_scale >= fewer.demand_scale


def test_no_more_stages_than_workers_or_buckets() -> None:
    """One worker, or one bucket, means one stage."""
    buckets = Buckets.log_spaced(65_536)
    demand = Demand.of_requests(buckets, [100] * 50 + [30_000] * 5, [200] * 55, duration_s=20.0)

    alone = partition(demand, 1, buckets=buckets, cost=COST)
    single = Buckets(edges=(0,))
    merged = Demand.of_requests(single, [100] * 50, [200] * 50, duration_s=20.0)

    assert len(alone.stages) == 1
    assert len(partition(merged, 8, buckets=single, cost=COST).stages) == 1


def test_no_traffic_is_one_stage_that_costs_nothing() -> None:
    """An empty histogram gives one stage of all workers with an objective of zero."""
    buckets = Buckets.log_spaced(65_536)
    nothing = Demand.of_requests(buckets, [], [], duration_s=10.0)

    found = partition(nothing, 7, buckets=buckets, cost=COST)

    assert [(s.low_tokens, s.high_tokens, s.num_workers) for s in found.stages] == [(0, None, 7)]
    assert found.objective == 0.0
    assert found.gain == 0.0


def test_traffic_of_one_length_is_not_split() -> None:
    """All mass in one bucket: nothing to gain from a second stage."""
    buckets = Buckets.log_spaced(65_536)
    demand = Demand.of_requests(buckets, [520] * 100, [5] * 100, duration_s=10.0)

    assert len(partition(demand, 8, buckets=buckets, cost=COST).stages) == 1


def test_overload_is_scaled_to_what_can_be_served_and_said_so() -> None:
    """Ten times too much traffic still gives finite objectives and a plan."""
    buckets = Buckets.log_spaced(65_536)
    demand = Demand.of_requests(buckets, [300] * 900 + [30_000] * 100, [200] * 1000, duration_s=1.0)

    found = partition(demand, 4, buckets=buckets, cost=COST)

    assert found.demand_scale < 0.2
    assert math.isfinite(found.objective)
    assert all(s.rho < 1.0 for s in found.stages)


def test_predictions_follow_littles_law() -> None:
    """Requests that decode in a stage are its step rate times its step time."""
    buckets = Buckets.log_spaced(65_536)
    demand = Demand.of_requests(buckets, [300] * 90 + [30_000] * 10, [200] * 100, duration_s=10.0)

    found = partition(demand, 4, buckets=buckets, cost=COST)

    in_flight = sum(s.in_flight for s in found.stages)
    by_hand = 0.0
    for stage in found.stages:
        high = stage.high_tokens or 10**9
        inside = [stage.low_tokens <= e < high for e in buckets.edges]
        by_hand += float(demand.decode_steps_per_s[np.array(inside)].sum()) * stage.step_ms / 1000.0
    assert in_flight == pytest.approx(by_hand)


def test_a_given_partition_that_makes_no_sense_is_refused() -> None:
    """Boundaries that fall together, wrong numbers of workers, no workers, another bucket count."""
    buckets = Buckets.log_spaced(65_536)
    demand = Demand.of_requests(buckets, [300], [200], duration_s=10.0)
    problem = PartitionProblem(demand, 4, buckets=buckets, cost=COST, settings=PartitionSettings())

    with pytest.raises(ConfigError, match="make no partition"):
        problem.judge((1000, 1001), (1, 1, 2))
    with pytest.raises(ConfigError, match="make no partition"):
        problem.judge((1000,), (4,))
    with pytest.raises(ConfigError, match="at least one worker"):
        PartitionProblem(demand, 0, buckets=buckets, cost=COST, settings=PartitionSettings())
    with pytest.raises(ConfigError, match="buckets"):
        PartitionProblem(demand, 1, buckets=Buckets(edges=(0, 5)), cost=COST, settings=PartitionSettings())


def test_the_skew_term_favours_a_split() -> None:
    """With a penalty on unequal contexts the gain of splitting rises."""
    buckets = Buckets.log_spaced(65_536)
    demand = Demand.of_requests(buckets, [300] * 90 + [30_000] * 10, [200] * 100, duration_s=4.0)
    wanted = PartitionSettings(objective=Objective.MEAN)

    plain = partition(demand, 8, buckets=buckets, cost=COST, settings=wanted)
    skewed = partition(demand, 8, buckets=buckets, cost=replace(COST, sigma_ms=2e-5), settings=wanted)

    assert skewed.gain > plain.gain
