"""Shadow scoring: what would this plan have done to the last minutes of real traffic?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from l4queue.models import Plan
from l4queue.policy.cost import StepCost
from l4queue.sim.cluster import Transfer
from l4queue.sim.l4 import L4, L4Options
from l4queue.sim.metrics import SimResult
from l4queue.sim.runner import Setting, run_policy
from l4queue.sim.trace import Trace

__all__ = ("Arrival", "make_scorer", "score_recent")

MIN_ARRIVALS = 100
"""Fewer tell more about chance than about a plan."""
_LONG_BOUND = 1.25
_P99_BOUND = 1.10


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A finished request as the recorder knows it."""

    arrival_s: float
    input_tokens: int
    output_tokens: int


def make_scorer(
    recent: Sequence[Arrival],
    *,
    cost: StepCost,
    num_instances: int,
    transfer: Transfer | None = None,
    options: L4Options | None = None,
    max_requests: int = 600,
) -> Callable[[Plan], float] | None:
    """A function from a plan to its predicted objective, for `l4queue.planner.plan`; None with too few arrivals.

    The latest `max_requests` arrivals are replayed under the plan as it stands, without replanning. The
    objective is the mean end-to-end latency, s; infinite where the longest 5 % would take more than 1.25 times,
    or the 99th percentile more than 1.1 times, of what one stage gives (the default objective's bounds).
    """
    if len(recent) < MIN_ARRIVALS or num_instances < 2:
        return None
    ordered = sorted(recent, key=lambda a: a.arrival_s)[-max_requests:]
    trace = Trace(
        name="recent",
        arrival_s=np.array([a.arrival_s - ordered[0].arrival_s for a in ordered]),
        input_tokens=np.array([max(1, a.input_tokens) for a in ordered], dtype=np.int64),
        output_tokens=np.array([max(1, a.output_tokens) for a in ordered], dtype=np.int64),
    )
    setting = Setting(cost=cost, num_instances=num_instances, transfer=transfer or Transfer())
    base = options or L4Options()
    known: dict[tuple[tuple[int, int], ...], SimResult] = {}

    def simulated(plan: Plan) -> SimResult:
        key = tuple((stage.low_tokens, stage.num_workers) for stage in plan.stages)
        if key not in known:
            known[key] = run_policy(L4(base, fixed=plan), trace, setting).result
        return known[key]

    def score(plan: Plan) -> float:
        one = simulated(Plan.one_stage(num_workers=num_instances))
        found = simulated(plan)
        keeps_long = _at_most(found.long.mean_e2e_s, one.long.mean_e2e_s, _LONG_BOUND)
        if base.objective == "balanced" and not (
            keeps_long and _at_most(found.p99_e2e_s, one.p99_e2e_s, _P99_BOUND)
        ):
            return float("inf")
        return found.mean_e2e_s

    return score


def score_recent(policy: L4) -> Callable[[Plan], float] | None:
    """A scorer from what a running simulation has seen finish."""
    recent = [
        Arrival(arrival_s=r.arrival_s, input_tokens=r.prompt_tokens, output_tokens=r.generated)
        for r in policy.recent
    ]
    cluster = policy.cluster
    return make_scorer(
        recent,
        cost=cluster.cost,
        num_instances=len(cluster.instances),
        transfer=cluster.transfer,
        options=policy.options,
    )


def _at_most(value: float | None, reference: float | None, bound: float) -> bool:
    return value is None or reference is None or value <= bound * reference
