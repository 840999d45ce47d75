"""Routing: the stage of a request by its length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from l4queue.models import Plan
from l4queue.policy.loads import StageLoad

__all__ = ("Route", "route")


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The stage to queue in, and the other stages with workers in the order in which they come next."""

    stage: int
    alternatives: tuple[int, ...]
    reason: str


def route(length_tokens: int, plan: Plan, *, loads: Sequence[StageLoad] | None = None) -> Route:
    """The stage whose range holds the length; a boundary belongs to the upper stage. Total.

    Lengths below zero count as zero; the last stage has no upper end. A stage without workers is passed over:
    the next stage above that has some, else the next below; if none has any, the request waits in its own.
    Alternatives are ordered by predicted drain time when loads are given, else by distance, upper before lower.
    """
    own = plan.stage_of(max(0, length_tokens))
    count = len(plan.stages)
    if count == 1:
        return Route(stage=0, alternatives=(), reason="one stage")
    if loads is None:
        staffed = {i for i, s in enumerate(plan.stages) if s.num_workers > 0}
        drain = dict.fromkeys(range(count), 0.0)
    else:
        staffed = {load.stage for load in loads if load.num_workers > 0}
        drain = {load.stage: load.drain_ms or 0.0 for load in loads}
    others = [i for i in staffed if i != own and i < count]
    if own in staffed or not others:
        others.sort(key=lambda i: (drain.get(i, 0.0), abs(i - own), -i))
        return Route(stage=own, alternatives=tuple(others), reason="length in range")
    chosen = min(others, key=lambda i: (i < own, abs(i - own)))
    others.remove(chosen)
    others.sort(key=lambda i: (drain.get(i, 0.0), abs(i - own), -i))
    return Route(stage=chosen, alternatives=tuple(others), reason=f"stage {own} has no workers")
