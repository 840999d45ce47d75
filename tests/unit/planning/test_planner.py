"""The planner: keep or publish, and why."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4queue.config import load_settings
from l4queue.cost.coefficients import load_coefficients
from l4queue.models import Plan, StagePlan, WorkerLoad
from l4queue.plan_json import plan_from_json, plan_to_json
from l4queue.planning.histogram import Buckets, Demand
from l4queue.planning.partition import PartitionProblem
from l4queue.planning.planner import Decision, PlannerSettings, Snapshot, expected_demand, is_young, plan
from l4queue.planning.steady_state import Objective, PartitionSettings
from tests.unit.planning.told_replay import ToldReplay

COST = load_coefficients("h100", "llama-3.1-8b")
BUCKETS = Buckets.log_spaced(131_072)
SETTINGS = PlannerSettings()


def _demand(rate: float, *, long_share: float = 0.1, seed: int = 0) -> Demand:
    """Mixed traffic: short chats and some prompts of 10k to 60k tokens."""
    rng = np.random.default_rng(seed)
    n = 4000
    is_long = rng.random(n) < long_share
    prompts = np.where(is_long, rng.integers(10_000, 60_000, n), rng.integers(50, 2000, n))
    outputs = rng.integers(20, 500, n)
    return Demand.of_requests(BUCKETS, prompts, outputs, duration_s=n / rate)


def _loads(n: int) -> tuple[WorkerLoad, ...]:
    return tuple(WorkerLoad(worker_id=f"w{i:02d}", kv_capacity_tokens=445_000) for i in range(n))


def _snapshot(**changes: object) -> Snapshot:
    values: dict[str, object] = {
        "now_ms": 1_000_000,
        "plan": Plan.one_stage(),
        "loads": _loads(16),
        "demand": _demand(60.0),
        "cost": COST,
        "buckets": BUCKETS,
    }
    return Snapshot(**{**values, **changes})  # type: ignore[arg-type]  # test data by name


def _published() -> Plan:
    decision = plan(_snapshot(), SETTINGS)
    assert decision.publish
    return decision.plan


def _later(**changes: object) -> Snapshot:
    return _snapshot(**{"now_ms": 1_100_000, "plan": _published(), **changes})


def _score_by_model(snapshot: Snapshot, settings: PlannerSettings) -> Callable[[Plan], float]:
    """The closed form as a scoring function: the objective of any plan on the snapshot's demand."""
    demand = expected_demand(snapshot)

    def score(candidate: Plan) -> float:
        counts = [s.num_workers for s in candidate.stages]
        problem = PartitionProblem(
            demand, sum(counts), buckets=snapshot.buckets, cost=snapshot.cost, settings=settings.partition
        )
        return problem.judge([s.low_tokens for s in candidate.stages[1:]], counts).objective

    return score


def test_mixed_traffic_gets_classes_and_every_worker_a_place() -> None:
    """The first plan has several stages, lists all workers once, and says what it expects."""
    decision = plan(_snapshot(), SETTINGS)

    new = decision.plan
    assert decision.publish
    assert new.version == 1
    assert len(new.stages) >= 2
    assert sorted(i for s in new.stages for i in s.worker_ids) == [w.worker_id for w in _loads(16)]
    assert new.objective is not None
    assert new.objective_one_stage is not None
    assert new.objective < new.objective_one_stage
    assert new.created_ms == 1_000_000
    assert plan_from_json(plan_to_json(new)) == new
    assert len(new.details["stages"]) == len(new.stages)
    assert {len(c.stages) for c in decision.candidates} == {1, 2, 3, 4}


def test_the_same_snapshot_gives_the_same_bytes() -> None:
    """Whatever the order in which the loads are listed."""
    first = plan(_snapshot(), SETTINGS)
    again = plan(_snapshot(loads=tuple(reversed(_loads(16)))), SETTINGS)

    assert plan_to_json(first.plan) == plan_to_json(again.plan)
    assert first == again


def test_the_best_plan_is_kept() -> None:
    """On the same demand nothing is published again."""
    decision = plan(_later(), SETTINGS)

    assert not decision.publish
    assert decision.reason == "the present plan is best"
    assert any(c.is_current for c in decision.candidates)


def test_a_small_gain_is_not_worth_a_change() -> None:
    """A slightly different demand has another optimum, but the present plan is near it."""
    decision = plan(_later(demand=_demand(61.5, seed=3)), SETTINGS)

    assert not decision.publish
    assert "does not exceed" in decision.reason or decision.reason == "the present plan is best"


def test_a_young_plan_is_left_its_time() -> None:
    """The gain is there, but the plan must live its least time first."""
    changed = _demand(80.0, long_share=0.02, seed=1)

    young = plan(_later(demand=changed, now_ms=1_010_000), SETTINGS)
    grown = plan(_later(demand=changed), SETTINGS)

    assert not young.publish
    assert "ms old" in young.reason
    assert grown.publish
    assert grown.plan.version == 2


def test_a_plan_made_before_a_change_of_traffic_may_go_at_once() -> None:
    """However young it is; one made after the change is left its time."""
    changed = _demand(80.0, long_share=0.02, seed=1)
    made_ms = _later().plan.created_ms

    before = plan(_later(demand=changed, now_ms=made_ms + 1, changed_ms=made_ms), SETTINGS)
    after = plan(_later(demand=changed, now_ms=made_ms + 1, changed_ms=made_ms - 1), SETTINGS)

    assert before.publish
    assert not after.publish


def test_narrow_traffic_falls_back_to_one_stage() -> None:
    """Where all requests are alike classes do not pay."""
    same = Demand.of_requests(BUCKETS, [1000] * 500, [100] * 500, duration_s=6.0)

    decision = plan(_later(demand=same), SETTINGS)

    assert decision.publish
    assert len(decision.plan.stages) == 1


@pytest.mark.parametrize(("workers", "stages"), [(1, 1), (2, 2), (3, 3)])
def test_few_workers_mean_few_stages(workers: int, stages: int) -> None:
    """Never more stages than workers; one worker is one stage."""
    decision = plan(_snapshot(loads=_loads(workers), demand=_demand(4.0 * workers)), SETTINGS)

    assert decision.publish
    assert len(decision.plan.stages) <= stages
    assert all(s.num_workers >= 1 for s in decision.plan.stages)


def test_without_workers_the_plan_is_kept() -> None:
    """Nobody there, or all of them draining."""
    gone = tuple(replace(w, is_draining=True) for w in _loads(3))

    for loads in ((), gone):
        decision = plan(_snapshot(loads=loads), SETTINGS)
        assert (decision.publish, decision.reason) == (False, "no workers")
        assert decision.plan == Plan.one_stage()


def test_without_traffic_the_ranges_stay_and_workers_are_fitted_in() -> None:
    """An empty histogram changes nothing; a worker that came gets a place; a lone one serves everything."""
    nothing = Demand.of_requests(BUCKETS, [], [], duration_s=10.0)

    kept = plan(_later(demand=nothing), SETTINGS)
    more = plan(_later(demand=nothing, loads=_loads(17)), SETTINGS)
    alone = plan(_later(demand=nothing, loads=_loads(1)), SETTINGS)
    first = plan(_snapshot(demand=nothing), SETTINGS)

    assert (kept.publish, kept.reason) == (False, "no traffic")
    assert more.publish
    assert [s.low_tokens for s in more.plan.stages] == [s.low_tokens for s in _published().stages]
    assert sum(s.num_workers for s in more.plan.stages) == 17
    assert len(alone.plan.stages) == 1
    assert alone.plan.stages[0].worker_ids == ("w00",)
    assert first.publish
    assert first.plan.stages[0].num_workers == 16


def test_a_worker_that_left_is_replaced_at_once() -> None:
    """Membership does not wait for the least life; the ranges stay unless new ones gain enough."""
    decision = plan(_later(now_ms=1_000_001, loads=_loads(15)), SETTINGS)

    assert decision.publish
    assert decision.reason.startswith("workers changed")
    assert sorted(i for s in decision.plan.stages for i in s.worker_ids) == [w.worker_id for w in _loads(15)]


def test_a_backlog_of_long_requests_moves_workers_to_them() -> None:
    """Waiting requests count as demand, so the class that starves gets more workers."""
    demand = _demand(30.0)
    first = plan(_snapshot(demand=demand), SETTINGS).plan
    backlog = tuple((BUCKETS.index(n), 40) for n in (15_000, 25_000, 40_000, 55_000))

    decision = plan(_later(plan=first, demand=demand, backlog=backlog), SETTINGS)

    def for_long(p: Plan) -> int:
        return sum(s.num_workers for s in p.stages if s.low_tokens >= 2048)

    assert decision.publish
    assert for_long(decision.plan) > for_long(first)


def test_the_score_decides_when_there_is_one_and_every_candidate_is_on_record() -> None:
    """A simulator that finds one stage best overrules the closed form."""
    asked: list[int] = []

    def score(candidate: Plan) -> float:
        asked.append(len(candidate.stages))
        assert all(s.worker_ids for s in candidate.stages)
        return 1.0 + len(candidate.stages)

    decision = plan(_snapshot(), SETTINGS, replay=ToldReplay(score))

    assert sorted(asked) == [1, 2, 3, 4]
    assert len(decision.plan.stages) == 1
    assert [c.scored for c in decision.candidates] == [2.0, 3.0, 4.0, 5.0]
    assert [c["scored"] for c in decision.plan.details["candidates"]] == [2.0, 3.0, 4.0, 5.0]


def test_a_plan_found_by_hand_is_judged_as_any_other() -> None:
    """A silly plan with boundaries off the bucket edges is replaced; so is one that the buckets cannot hold."""
    ids = [w.worker_id for w in _loads(16)]
    silly = Plan(
        version=7,
        stages=(
            StagePlan(low_tokens=0, high_tokens=333, num_workers=12, worker_ids=tuple(ids[:12])),
            StagePlan(low_tokens=333, high_tokens=None, num_workers=4, worker_ids=tuple(ids[12:])),
        ),
    )
    tight = replace(
        silly,
        stages=(
            silly.stages[0],
            replace(silly.stages[1], high_tokens=334, worker_ids=tuple(ids[12:14]), num_workers=2),
            StagePlan(low_tokens=334, high_tokens=None, num_workers=2, worker_ids=tuple(ids[14:])),
        ),
    )

    for present in (silly, tight):
        decision = plan(_snapshot(plan=present, now_ms=10**7), SETTINGS)
        assert decision.publish
        assert decision.plan.version == 8
    assert _score_by_model(_snapshot(), SETTINGS)(silly) > _score_by_model(_snapshot(), SETTINGS)(_published())


def test_settings_come_from_the_deployment() -> None:
    """Units are converted; the objective may be chosen."""
    made = PlannerSettings.of(
        load_settings(plan_min_life_s=7.5, plan_min_gain=0.2, max_stages=2),
        partition=PartitionSettings(objective=Objective.MEAN),
    )

    assert (made.min_life_ms, made.min_gain) == (7500, 0.2)
    assert (made.partition.max_stages, made.partition.objective) == (2, Objective.MEAN)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12),
    st.floats(0.5, 90.0),
    st.floats(0.0, 0.5),
    st.sampled_from(list(Objective)),
    st.lists(st.tuples(st.integers(0, 52), st.integers(0, 40)), max_size=4),
)
def test_nothing_is_published_that_is_predicted_worse(workers, rate, long_share, objective, backlog) -> None:
    """Neither worse than one stage nor than the present plan; applying the plan again publishes nothing."""
    wanted = PlannerSettings(partition=PartitionSettings(objective=objective))
    snapshot = _snapshot(
        loads=_loads(workers), demand=_demand(rate, long_share=long_share), backlog=tuple(backlog)
    )

    first: Decision = plan(snapshot, wanted)
    again = plan(replace(snapshot, plan=first.plan, now_ms=10**8), wanted)

    score = _score_by_model(snapshot, wanted)
    one = Plan.one_stage(num_workers=workers)
    assert score(first.plan) <= score(one) * (1 + 1e-9)
    assert not again.publish
    json.loads(plan_to_json(first.plan))


def test_a_plan_from_the_future_has_lived_its_time() -> None:
    """The clock has gone back since it was made; it would stay young for as long."""
    young = _snapshot(plan=replace(Plan.one_stage(), created_ms=999_999))
    future = _snapshot(plan=replace(Plan.one_stage(), created_ms=4_600_000))

    assert is_young(young, PlannerSettings())
    assert not is_young(future, PlannerSettings())
