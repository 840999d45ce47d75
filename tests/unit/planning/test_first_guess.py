"""Prefix affinity as the guess for new traffic: where it is made, and who takes it back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from l4queue.cost.step import StepCost
from l4queue.models import Plan, StagePlan, WorkerLoad
from l4queue.planning.histogram import Buckets, Demand
from l4queue.planning.planner import Decision, PlannerSettings, Snapshot
from l4queue.planning.shadow import GUESSED_SHARE, decide, first_guess
from l4queue.planning.traffic_change import Learned, with_decision
from tests.unit.planning.told_replay import ToldReplay

BUCKETS = Buckets.log_spaced(16_384)
COST = StepCost(alpha_ms=3.0, beta_ms=0.6, gamma_ms=2.2e-4, pi_ms=0.33, psi_ms=1e-4, kv_capacity_tokens=524_288)
NEW = Learned.nothing(BUCKETS, now_s=100.0)
LONG, SHORT = (
    StagePlan(low_tokens=low, high_tokens=high, num_workers=1, worker_ids=(name,))
    for low, high, name in ((1024, None, "w1"), (0, 1024, "w0"))
)
ONE = StagePlan(low_tokens=0, high_tokens=None, num_workers=2, worker_ids=("w0", "w1"))


def snapshot(*stages: StagePlan, drains: str = "", workers: int = 2, **values: object) -> Snapshot:
    """A deployment whose plan has these stages."""
    rng = np.random.default_rng(3)
    is_long = rng.random(3000) < 0.1
    prompts = np.where(is_long, rng.integers(3000, 6001, 3000), rng.integers(16, 257, 3000))
    names = [f"w{number}" for number in range(workers)]
    return Snapshot(
        now_ms=10**6,
        plan=Plan(version=7, stages=stages or (ONE,), created_ms=10**6 - 1000, **values),  # type: ignore[arg-type]
        loads=tuple(WorkerLoad(worker_id=name, is_draining=name == drains) for name in names),
        demand=Demand.of_requests(BUCKETS, prompts, np.where(is_long, 64, 32), duration_s=1000.0),
        cost=COST,
        buckets=BUCKETS,
    )


def guessed(now: Snapshot, learned: Learned, share: float) -> Decision | None:
    """What is guessed there."""
    return first_guess(now.plan, now.loads, learned, repeated_share=share, now_ms=now.now_ms)


@pytest.mark.parametrize(("workers", "drains", "ids"), [(2, "", ("w0", "w1")), (3, "w1", ("w0", "w2"))])
def test_where_much_comes_again_one_stage_goes_by_prefix(workers: int, drains: str, ids: tuple[str, ...]) -> None:
    """However young it is, with all workers that stay, and nothing says that a replay has proven it."""
    now = snapshot(workers=workers, drains=drains)
    guess = guessed(now, NEW, GUESSED_SHARE)

    assert guess is not None
    assert guess.publish
    assert (guess.plan.version, guess.plan.created_ms, guess.plan.prefix_affinity) == (8, now.now_ms, True)
    assert [(stage.num_workers, stage.worker_ids) for stage in guess.plan.stages] == [(2, ids)]
    assert not guess.plan.details
    assert guess.reason == "prefix affinity: 20% of the prompt tokens came again; no replay can tell yet"


@pytest.mark.parametrize(
    ("now", "learned", "share"),
    [
        (snapshot(), NEW, GUESSED_SHARE - 0.01),
        (snapshot(SHORT, LONG), NEW, 1.0),  # stages for which the closed form promised much
        (snapshot(prefix_affinity=True), NEW, 1.0),
        (snapshot(details={"is_replayed": True}), NEW, 1.0),
        (snapshot(), with_decision(NEW), 1.0),
        (snapshot(), replace(NEW, begun_s=200.0), 1.0),  # its rate alone has changed
        (snapshot(workers=1), NEW, 1.0),
        (snapshot(drains="w1"), NEW, 1.0),
    ],
)
def test_it_is_no_guess_where_anything_else_is_known(now: Snapshot, learned: Learned, share: float) -> None:
    """Little comes again; stages; a replay that has told; nobody to choose among."""
    assert guessed(now, learned, share) is None


def test_the_first_replay_judges_the_guess_as_it_would_one_stage() -> None:
    """Stages replace it at once, even where their gain may be chance; without a replay it stays."""
    guess = guessed(snapshot(), NEW, 0.5)
    assert guess is not None
    later = replace(snapshot(), plan=guess.plan, now_ms=10**6 + 2000)
    stages_win = ToldReplay(lambda plan: 1.0 if len(plan.stages) == 2 else 2.0, chance=1.0, tells_content=True)
    it_wins = ToldReplay(lambda plan: 1.0 if plan.prefix_affinity else 2.0, tells_content=True)

    taken, kept = (decide(later, PlannerSettings(), told, learned=NEW) for told in (stages_win, it_wins))
    waits = decide(later, PlannerSettings(), None, learned=NEW)

    assert (taken.publish, len(taken.plan.stages), taken.plan.prefix_affinity) == (True, 2, False)
    assert [(one.publish, one.plan) for one in (kept, waits)] == [(False, guess.plan)] * 2
    more = replace(later, loads=(*later.loads, WorkerLoad(worker_id="w2")))
    grown = decide(more, PlannerSettings(), None, learned=NEW).plan
    assert (grown.prefix_affinity, grown.stages[0].num_workers) == (True, 3)
