"""Placement of a counted request: its queue, its serving order and the reason, by plan and worker loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from l4queue.config import Settings
from l4queue.cost.coefficients import load_coefficients
from l4queue.cost.step import StepCost
from l4queue.models import Plan, Routing
from l4queue.observe.overview import Overview, cost_in_force, stage_loads
from l4queue.policy import queue_order
from l4queue.policy.loads import StageLoad
from l4queue.policy.output_lengths import FIRST_GUESS_TOKENS
from l4queue.policy.push_routing import PUSHING, Outstanding, push
from l4queue.policy.route import route
from l4queue.protocol.keys import private_queue
from l4queue.value_class import value_class

__all__ = ("Place", "Router")

_MAX_ALTERNATIVES = 4
"""Stages not chosen that `explain` names. Chosen: they are stored with every request."""

_BY_PREFIX = '{"stage":0,"reason":"prefix affinity"}'


@value_class(kw_only=True)
class Place:
    """A queue, the place in it (lower is served first), and what `explain` is to say of it (JSON, or nothing)."""

    stage: str
    score: float
    why: str = ""


class Router:
    """Follows the plan in force and the loads as of the last look."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loads: list[StageLoad] | None = None
        self._workers: dict[str, Outstanding] = {}
        self._turn = 0
        self.plan = Plan.one_stage()
        self.measured(load_coefficients(settings.emulated_gpu, settings.emulated_model))

    @property
    def wants_loads(self) -> bool:
        """Whether its decisions depend on what workers have to do."""
        return len(self.plan.stages) > 1 or self.plan.routing in PUSHING

    @property
    def wants_fresh_loads(self) -> bool:
        """Whether it has to look before every round: a router knows at any time what it has not got back."""
        return self.plan.routing in PUSHING

    def follow(self, plan: Plan) -> None:
        """Route by this plan from now on."""
        self.plan, self._loads = plan, None

    def measured(self, cost: StepCost) -> None:
        """The cost model in force: later arrivals age by its prefill rate. At first that of the settings' file."""
        given = self._settings.ageing_tokens_per_s
        self.ageing_tokens_per_s = queue_order.ageing_tokens_per_s(cost, given=given)

    def see(self, overview: Overview, *, held: Mapping[str, int]) -> None:
        """Take in what the workers have to do now; `held` has the requests that each incarnation runs by now."""
        cost, counts = cost_in_force(overview, self._settings), overview.counts
        self.measured(cost)
        done = counts.get("done", 0)
        expected = counts.get("output_tokens", 0) / done if done else FIRST_GUESS_TOKENS
        if overview.plan.version == self.plan.version:
            quiet_ms = self._settings.background_quiet_s * 1000
            self._loads = stage_loads(overview, expected_output_tokens=expected, cost=cost, quiet_ms=quiet_ms)
        self._workers = {}
        for load in overview.workers:
            if load.is_open:
                queue = overview.queues.get(private_queue(load.worker_id))
                num_running = held.get(load.incarnation, load.num_running)
                self._workers[load.worker_id] = Outstanding(
                    worker_id=load.worker_id,
                    num_requests=num_running + (queue.num_requests if queue else 0),
                    tokens=load.context_tokens + (queue.tokens if queue else 0),
                )

    def place(self, prompt_tokens: int, *, submitted_ms: int, priority: int) -> Place:
        """Decide for one request."""
        if self.plan.routing in PUSHING:
            return self._pushed(prompt_tokens, submitted_ms)
        if self.plan.routing is Routing.CENTRAL:
            return Place(stage="0", score=float(submitted_ms))
        settings = self._settings
        score = queue_order.score(
            submitted_ms,
            prompt_tokens,
            priority=priority,
            ageing_tokens_per_s=self.ageing_tokens_per_s,
            priority_step_s=settings.priority_step_s,
            starvation_bound_s=settings.starvation_bound_s,
        )
        score = queue_order.in_class(score, priority=priority, background_priority=settings.background_priority)
        if len(self.plan.stages) == 1:
            is_by_prefix = self.plan.goes_by_prefix(settings.prefix_affinity)
            return Place(stage="0", score=score, why=_BY_PREFIX if is_by_prefix else "")
        chosen = route(prompt_tokens, self.plan, loads=self._loads)
        drains = {load.stage: load.drain_ms for load in self._loads or ()}
        alternatives = [_stage(s, drains) for s in chosen.alternatives[:_MAX_ALTERNATIVES]]
        why = {**_stage(chosen.stage, drains), "reason": chosen.reason, "alternatives": alternatives}
        return Place(stage=str(chosen.stage), score=score, why=json.dumps(why, separators=(",", ":")))

    def _pushed(self, prompt_tokens: int, submitted_ms: int) -> Place:
        chosen = push(prompt_tokens, self.plan, tuple(self._workers.values()), turn=self._turn)
        if chosen.worker_id is None:  # it waits in its stage until there is one
            return Place(stage=str(self.plan.stage_of(prompt_tokens)), score=float(submitted_ms))
        self._turn += 1
        known = self._workers[chosen.worker_id]
        self._workers[chosen.worker_id] = replace(
            known, num_requests=known.num_requests + 1, tokens=known.tokens + prompt_tokens
        )
        return Place(stage=private_queue(chosen.worker_id), score=float(submitted_ms))


def _stage(stage: int, drains: dict[int, float | None]) -> dict[str, Any]:
    drain_ms = drains.get(stage)
    return {"stage": stage, "drain_ms": None if drain_ms is None else round(drain_ms, 1)}
