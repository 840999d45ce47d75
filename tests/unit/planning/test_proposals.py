"""What a replay is given to try besides the closed form's own plans, and what becomes of a plan it has proven."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from l4queue.cost.step import StepCost
from l4queue.models import Plan, StagePlan, WorkerLoad
from l4queue.planning.histogram import Buckets, Demand, with_unfinished
from l4queue.planning.partition import PartitionProblem
from l4queue.planning.planner import PlannerSettings, Snapshot, expected_demand, plan
from l4queue.planning.proposals import MOST_WORKERS, proposals
from l4queue.planning.refine import refine
from l4queue.planning.shadow import decide
from l4queue.planning.steady_state import PartitionSettings
from l4queue.planning.traffic_change import Learned, with_decision
from tests.unit.planning.told_replay import ToldReplay

BUCKETS = Buckets.log_spaced(16_384)
COST = StepCost(alpha_ms=3.0, beta_ms=0.6, gamma_ms=2.2e-4, pi_ms=0.33, psi_ms=1e-4, kv_capacity_tokens=524_288)
NOTHING = Learned.nothing(BUCKETS, now_s=0.0)


def _bimodal(rate: float) -> Demand:
    """Nine in ten prompts below 256 tokens, one of 3,000 to 6,000 that brings most of the work."""
    rng = np.random.default_rng(3)
    is_long = rng.random(3000) < 0.1
    prompts = np.where(is_long, rng.integers(3000, 6001, 3000), rng.integers(16, 257, 3000))
    return Demand.of_requests(BUCKETS, prompts, np.where(is_long, 64, 32), duration_s=3000 / rate)


def _problem(workers: int, *, rate: float = 2.5) -> PartitionProblem:
    return PartitionProblem(_bimodal(rate), workers, buckets=BUCKETS, cost=COST, settings=PartitionSettings())


def _snapshot(**changes: object) -> Snapshot:
    loads = tuple(WorkerLoad(worker_id=f"w{i}") for i in range(2))
    first = Plan.one_stage(num_workers=2)
    one = replace(first, version=1, stages=(replace(first.stages[0], worker_ids=("w0", "w1")),))
    values: dict[str, object] = {"now_ms": 10**6, "plan": one, "loads": loads, "demand": _bimodal(2.5)}
    return Snapshot(**{**values, "cost": COST, "buckets": BUCKETS, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [2, 3, 5, MOST_WORKERS])
def test_small_fleets_get_a_few_splits_that_use_all_workers(workers: int) -> None:
    """At most eight, all different, two stages each; one of them parts the two kinds of prompts."""
    found = proposals(_problem(workers))

    assert 1 <= len(found) <= 8
    assert len({(s.stages[0].high_tokens, s.stages[0].num_workers) for s in found}) == len(found)
    assert all(sum(s.num_workers for s in p.stages) == workers and len(p.stages) == 2 for p in found)
    assert any(256 <= (p.stages[0].high_tokens or 0) <= 3000 for p in found)


@pytest.mark.parametrize("workers", [1, MOST_WORKERS + 1])
def test_one_worker_and_large_fleets_get_none(workers: int) -> None:
    """Nothing to divide, or too much to replay."""
    assert proposals(_problem(workers)) == ()


def test_a_replay_may_publish_what_the_closed_form_refuses() -> None:
    """The long stage is more than full, yet the replay says that it is best: published, and marked as proven."""
    snapshot = _snapshot(demand=_bimodal(3.2))

    decision = plan(snapshot, PlannerSettings(), replay=ToldReplay.by_stages(2.0, 1.0))

    assert decision.publish
    assert len(decision.plan.stages) == 2
    assert decision.plan.details["is_proven"]
    assert decision.plan.objective is None


def test_what_a_replay_has_proven_only_a_replay_takes_back() -> None:
    """Without a record the plan stays and is not refined; a replay that finds it bad replaces it."""
    proven = plan(_snapshot(demand=_bimodal(3.2)), PlannerSettings(), replay=ToldReplay.by_stages(2.0, 1.0)).plan
    later = _snapshot(demand=_bimodal(3.2), plan=proven, now_ms=2 * 10**6)

    kept = decide(later, PlannerSettings(), None, learned=NOTHING)
    judged = decide(later, PlannerSettings(), ToldReplay.by_stages(1.0, 2.0), learned=NOTHING)

    assert not kept.publish
    assert refine(proven, _problem(2, rate=3.2)).plan is None
    assert judged.publish
    assert len(judged.plan.stages) == 1


def test_the_first_replay_may_replace_a_young_plan_and_no_later_one_may() -> None:
    """A plan of a second ago was made without a replay; after one it lives its time."""
    young = replace(_snapshot().plan, created_ms=10**6 - 1000)
    snapshot = _snapshot(demand=_bimodal(3.2), plan=young)
    replay = ToldReplay.by_stages(2.0, 1.0)

    first = decide(snapshot, PlannerSettings(), replay, learned=NOTHING)
    later = decide(snapshot, PlannerSettings(), replay, learned=with_decision(NOTHING))

    assert first.publish
    assert len(first.plan.stages) == 2
    assert not later.publish
    assert "1000 ms old" in later.reason


@pytest.mark.parametrize(
    ("chance", "is_replayed", "is_published"), [(0.49, True, True), (0.5, True, False), (0.5, False, True)]
)
def test_a_gain_that_may_be_chance_changes_no_plan_that_a_replay_chose(
    chance: float, is_replayed: bool, is_published: bool
) -> None:
    """Half of the latency saved, by the record: such a plan stays unless some of it is beyond chance."""
    replay = ToldReplay.by_stages(2.0, 1.0, chance=chance)
    present = replace(_snapshot().plan, details={"is_replayed": is_replayed})

    decision = decide(_snapshot(demand=_bimodal(3.2), plan=present), PlannerSettings(), replay, learned=NOTHING)

    assert decision.publish == is_published
    assert decision.plan.details["is_replayed"]
    assert is_published or decision.reason == "gain 50.0% may be chance"


def test_a_proven_plan_does_not_outlive_its_workers() -> None:
    """A worker that comes gets a place at once, replay or not."""
    stages = (
        StagePlan(low_tokens=0, high_tokens=1024, num_workers=1, worker_ids=("w0",)),
        StagePlan(low_tokens=1024, high_tokens=None, num_workers=1, worker_ids=("w1",)),
    )
    proven = Plan(version=4, stages=stages, details={"is_proven": True})
    loads = tuple(WorkerLoad(worker_id=f"w{i}") for i in range(3))

    decision = decide(_snapshot(plan=proven, loads=loads), PlannerSettings(), None, learned=NOTHING)

    assert decision.publish
    assert {i for s in decision.plan.stages for i in s.worker_ids} == {"w0", "w1", "w2"}


def test_a_filling_system_shows_the_steps_that_are_still_to_come() -> None:
    """A hundred arrived, twenty of them run and are half done: the steps seen are those of ninety."""
    seen = Demand.of_requests(BUCKETS, [100] * 100, [90] * 100, duration_s=10.0)
    loads = tuple(WorkerLoad(worker_id=f"w{i}", num_running=10) for i in range(2))

    expected = expected_demand(_snapshot(demand=seen, loads=loads))

    factor = expected.decode_steps_per_s.sum() / seen.decode_steps_per_s.sum()
    assert factor == pytest.approx(1.0 / 0.9)
    assert expected.arrivals_per_s.sum() == pytest.approx(10.0)
    assert with_unfinished(seen, 10_000).decode_steps_per_s.sum() == pytest.approx(
        2.0 * seen.decode_steps_per_s.sum()
    )
