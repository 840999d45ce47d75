"""Shadow scoring: a replay of recent traffic proves a plan before it is published."""

from __future__ import annotations

from dataclasses import replace

from l4queue.planning.planner import Decision, PlannerSettings, Replay, Snapshot, is_young, plan
from l4queue.planning.traffic_change import Learned, is_due, work_ms

__all__ = ("decide", "why_settled")

MIN_UNPROVEN_GAIN = 0.10
"""Gain that the closed form must promise for classes where no replay can tell yet."""


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


def decide(snapshot: Snapshot, settings: PlannerSettings, replay: Replay | None, *, learned: Learned) -> Decision:
    """The planner's decision, proved by replay; without one, classes must promise MIN_UNPROVEN_GAIN.

    Prefix affinity comes and goes by a replay only.
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
