"""Early binding: each request is pushed to one worker's private queue as it arrives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from l4queue.models import Plan, Routing

__all__ = ("PUSHING", "Outstanding", "Push", "push")

PUSHING = frozenset({Routing.ROUND_ROBIN, Routing.LEAST_LOADED, Routing.TWO_POOL})
"""Routings that choose a worker at arrival. The others let a worker take when it has room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outstanding:
    """Work of a worker as its router knows it: requests pushed to it and not finished, and their tokens."""

    worker_id: str
    num_requests: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """The worker to push to; None: there is none."""

    worker_id: str | None
    reason: str


def push(prompt_tokens: int, plan: Plan, workers: Sequence[Outstanding], *, turn: int) -> Push:
    """Choose by the plan's routing; `turn` counts the requests pushed so far. Ties go to the first worker by id.

    `round-robin` takes the workers in turn. `least-loaded` takes the one with fewest outstanding requests, of
    equals with fewest tokens. `two-pool` does that among the workers of the stage that the prompt's length
    belongs to, or among all when that stage has none.
    """
    able = sorted(workers, key=lambda w: w.worker_id)
    if not able:
        return Push(worker_id=None, reason="no workers")
    if plan.routing is Routing.ROUND_ROBIN:
        return Push(worker_id=able[turn % len(able)].worker_id, reason="its turn")
    if plan.routing is Routing.TWO_POOL:
        pool = plan.stages[plan.stage_of(prompt_tokens)].worker_ids
        able = [w for w in able if w.worker_id in pool] or able
    least = min(able, key=lambda w: (w.num_requests, w.tokens, w.worker_id))
    return Push(worker_id=least.worker_id, reason=f"{least.num_requests} requests outstanding")
