"""The stage that a new worker joins until the next plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from l4queue.models import Plan, WorkerLoad
from l4queue.policy.loads import StageLoad

__all__ = ("Newcomer", "stage_for_newcomer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Newcomer:
    """The stage a new worker joins until the next plan."""

    stage: int
    reason: str


def stage_for_newcomer(plan: Plan, loads: Sequence[WorkerLoad], *, queues: Sequence[StageLoad] = ()) -> Newcomer:
    """The stage that lacks most of its planned workers; if none lacks any, the one with the longest drain.

    Ties go to the lower stage. Draining workers do not count as present.
    """
    if len(plan.stages) == 1:
        return Newcomer(stage=0, reason="one stage")
    present = [0] * len(plan.stages)
    for load in loads:
        if not load.is_draining and 0 <= load.stage < len(present):
            present[load.stage] += 1
    lack = [
        (s.num_workers - n) / max(1, s.num_workers) if s.num_workers else 0.0
        for s, n in zip(plan.stages, present, strict=True)
    ]
    worst = max(range(len(lack)), key=lambda i: (lack[i], -i))
    if lack[worst] > 0.0:
        return Newcomer(stage=worst, reason="short of planned workers")
    known = [q for q in queues if 0 <= q.stage < len(present) and q.drain_ms is not None]
    if known:
        longest = max(known, key=lambda q: (q.drain_ms or 0.0, -q.stage))
        return Newcomer(stage=longest.stage, reason="longest drain")
    fewest = min(range(len(present)), key=lambda i: (present[i] / max(1, plan.stages[i].num_workers), i))
    return Newcomer(stage=fewest, reason="all stages staffed")
