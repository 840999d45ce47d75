"""Refinement: one bucket at a time, only down in cost, and it settles."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from l4queue.cost.coefficients import load_coefficients
from l4queue.models import Plan, StagePlan
from l4queue.planning.histogram import Buckets, Demand
from l4queue.planning.partition import PartitionProblem, partition
from l4queue.planning.refine import refine
from l4queue.planning.steady_state import Objective, PartitionSettings

COST = load_coefficients("h100", "llama-3.1-8b")
BUCKETS = Buckets.log_spaced(65_536)
WANTED = PartitionSettings(objective=Objective.MEAN)


def _problem(shift: float = 1.0) -> PartitionProblem:
    """Prompts from 100 to 25,000 tokens, evenly on a logarithmic scale, times `shift`."""
    prompts = [round(100 * 250 ** (i / 150) * shift) for i in range(150)]
    demand = Demand.of_requests(BUCKETS, prompts, [300] * len(prompts), duration_s=8.0)
    return PartitionProblem(demand, 8, buckets=BUCKETS, cost=COST, settings=WANTED)


def _plan(boundaries: list[int], workers: list[int]) -> Plan:
    lows = [0, *boundaries]
    highs: list[int | None] = [*boundaries, None]
    rows = zip(lows, highs, workers, strict=True)
    return Plan(version=4, stages=tuple(StagePlan(low_tokens=a, high_tokens=b, num_workers=n) for a, b, n in rows))


def _objective(plan: Plan, problem: PartitionProblem) -> float:
    return problem.judge([s.low_tokens for s in plan.stages[1:]], [s.num_workers for s in plan.stages]).objective


def _strain(plan: Plan, problem: PartitionProblem) -> float:
    bounds = [*(BUCKETS.index(s.low_tokens) for s in plan.stages), len(BUCKETS)]
    return problem.strain(bounds, [s.num_workers for s in plan.stages])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(2, len(BUCKETS) - 2), min_size=1, max_size=3, unique=True),
    st.floats(0.5, 2.0),
)
def test_each_use_moves_by_a_bucket_at_most_lowers_the_objective_and_settles(places, shift) -> None:
    """Order is kept, workers stay, the objective falls strictly until nothing moves."""
    problem = _problem(shift)
    share = 8 // (len(places) + 1)
    workers = [8 - share * len(places), *[share] * len(places)]
    plan = _plan([BUCKETS.edges[p] for p in sorted(places)], workers)

    for _ in range(200):
        before = _objective(plan, problem)
        result = refine(plan, problem)
        if result.plan is None:
            assert result.reason == "balanced"
            break
        moved = [
            abs(BUCKETS.index(a.low_tokens) - BUCKETS.index(b.low_tokens))
            for a, b in zip(plan.stages, result.plan.stages, strict=True)
        ]
        lows = [s.low_tokens for s in result.plan.stages]
        assert max(moved) == 1
        assert lows == sorted(set(lows))
        assert [s.num_workers for s in result.plan.stages] == workers
        assert result.plan.version == plan.version + 1
        assert _objective(result.plan, problem) < before or before == float("inf")
        assert _strain(result.plan, problem) <= max(1.0, _strain(plan, problem))
        plan = result.plan
    else:
        raise AssertionError("did not settle")


def test_the_best_partition_is_a_fixed_point() -> None:
    """What the search found is left alone on the same demand."""
    problem = _problem()
    best = partition(problem.demand, 8, buckets=BUCKETS, cost=COST, settings=WANTED)
    plan = _plan([s.low_tokens for s in best.stages[1:]], [s.num_workers for s in best.stages])

    assert len(best.stages) > 1
    assert refine(plan, problem).plan is None


def test_a_drift_of_lengths_is_followed() -> None:
    """When all lengths grow the boundary goes up; when they shrink, down."""
    best = partition(_problem().demand, 8, buckets=BUCKETS, cost=COST, settings=replace(WANTED, max_stages=2))
    boundary = best.stages[1].low_tokens
    plan = _plan([boundary], [s.num_workers for s in best.stages])

    longer = refine(plan, _problem(1.5), min_gain=0.001)
    shorter = refine(plan, _problem(0.6), min_gain=0.001)

    assert longer.plan is not None
    assert longer.plan.stages[1].low_tokens > boundary
    assert shorter.plan is not None
    assert shorter.plan.stages[1].low_tokens < boundary


def test_a_plan_without_a_boundary_or_with_an_empty_stage_is_left_alone() -> None:
    """One stage; a stage without workers; boundaries that share a bucket."""
    problem = _problem()

    for plan in (_plan([], [8]), _plan([1024], [8, 0]), _plan([1024, 1025], [4, 2, 2])):
        assert refine(plan, problem).reason == "nothing to refine"
