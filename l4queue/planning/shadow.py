"""Shadow scoring: a replay of recent traffic proves a plan before it is published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from l4queue.models import Plan, StagePlan, WorkerLoad
from l4queue.planning.assign import assign
from l4queue.planning.planner import Decision, PlannerSettings, Replay, Snapshot, is_young, plan
from l4queue.planning.traffic_change import Learned, is_due, work_ms

__all__ = ("decide", "first_guess", "may_guess", "why_settled")

MIN_UNPROVEN_GAIN = 0.10
"""Gain that the closed form must promise for classes where no replay can tell yet."""

GUESSED_SHARE = 0.2
"""Share of prompt tokens seen before from which prefix affinity is the guess where no replay can tell yet. In
simulation it is better than one stage on all traces with content, by 4 to 54 % of the mean. Where less comes
again, as at first in Mooncake's conversations, a replay may find stages far better."""


def why_settled(snapshot: Snapshot, settings: PlannerSettings, learned: Learned) -> str | None:
    """Why this round needs no decision; None where it needs one.

    Nothing could be published as yet, or nothing is known that the last replay did not know. Without a replay
    since the last change, and when workers came or went, there is always something to decide.
    """
    if learned.decided is None or _has_changed(snapshot):
        return None
    if is_young(snapshot, settings):
        return "the plan is too young to be replaced"
    work = work_ms(learned.counts, buckets=snapshot.buckets, cost=snapshot.cost)
    return None if is_due(learned, work=work) else "nothing new since the last replay"


def may_guess(present: Plan, loads: Sequence[WorkerLoad], learned: Learned) -> bool:
    """Whether prefix affinity may be guessed: one stage for all, and no replay has told of this traffic.

    Traffic whose rate alone has changed is no new one.
    """
    is_new = learned.decided is None and learned.begun_s <= learned.mix_begun_s
    is_open = len(present.stages) == 1 and not present.prefix_affinity and not present.details.get("is_replayed")
    return is_new and is_open and sum(not load.is_draining for load in loads) > 1


def first_guess(
    present: Plan, loads: Sequence[WorkerLoad], learned: Learned, *, repeated_share: float, now_ms: int
) -> Decision | None:
    """Prefix affinity until a replay can tell, where so much of the prompt tokens came again; None: no guess.

    The first replay judges it as it would one stage: nothing has proven it.
    """
    if repeated_share < GUESSED_SHARE or not may_guess(present, loads, learned):
        return None
    workers = tuple(load for load in loads if not load.is_draining)
    stage = StagePlan(low_tokens=0, high_tokens=None, num_workers=len(workers))
    reason = f"prefix affinity: {repeated_share:.0%} of the prompt tokens came again; no replay can tell yet"
    guess = Plan(
        version=present.version + 1,
        stages=assign([stage], workers, current=present).stages,
        reason=reason,
        created_ms=now_ms,
        prefix_affinity=True,
    )
    return Decision(publish=True, plan=guess, reason=reason)


def decide(snapshot: Snapshot, settings: PlannerSettings, replay: Replay | None, *, learned: Learned) -> Decision:
    """The planner's decision, proved by replay; without one, classes must promise MIN_UNPROVEN_GAIN.

    Prefix affinity comes and goes by a replay only; `first_guess` is beside it.
    The first replay since the traffic changed may replace a young plan: that one was made without any.
    """
    if replay is not None:
        is_first = learned.decided is None
        return plan(snapshot, replace(settings, min_life_ms=0) if is_first else settings, replay=replay)
    has_changed = _has_changed(snapshot)
    if snapshot.plan.details.get("is_proven") and not has_changed:
        return Decision(publish=False, plan=snapshot.plan, reason="proven by replay: kept until the next one")
    single = replace(settings, partition=replace(settings.partition, max_stages=1))
    if snapshot.plan.prefix_affinity:  # the closed form cannot tell what it is worth
        return plan(snapshot, single)
    decision = plan(snapshot, settings)
    proposed = decision.plan
    if not decision.publish or len(proposed.stages) == 1 or len(snapshot.plan.stages) > 1:
        return decision
    if proposed.objective is None or not proposed.objective_one_stage:
        return decision
    gain = 1.0 - proposed.objective / proposed.objective_one_stage
    if gain >= MIN_UNPROVEN_GAIN or len(snapshot.loads) < 2:
        return decision
    if has_changed:
        return plan(snapshot, single)
    reason = f"gain {gain:.1%} of classes is too little to try them unproven"
    return replace(decision, publish=False, plan=snapshot.plan, reason=reason)


def _has_changed(snapshot: Snapshot) -> bool:
    """Whether workers came or went."""
    known = {load.worker_id for load in snapshot.loads}
    return known != {i for stage in snapshot.plan.stages for i in stage.worker_ids}
