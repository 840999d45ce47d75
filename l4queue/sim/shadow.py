"""Shadow scoring: what would this plan have done to the last minutes of real traffic?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from l4queue.models import Plan
from l4queue.planner import Decision, PlannerSettings, Snapshot, plan
from l4queue.policy.cost import StepCost
from l4queue.sim.cluster import Transfer
from l4queue.sim.l4 import L4, L4Options
from l4queue.sim.metrics import SimResult
from l4queue.sim.runner import Setting, run_policy
from l4queue.sim.trace import Trace

__all__ = ("Arrival", "decide", "make_scorer", "prove_recent")

MIN_ARRIVALS = 100
"""Fewer tell more about chance than about a plan."""
MIN_LATENCIES = 4.0
"""A replay shorter than so many mean latencies ends before its queues are what they would become."""
MIN_UNPROVEN_GAIN = 0.10
"""What the closed form must promise for classes where no replay can tell yet."""
_LONG_BOUND = 1.25
_P99_BOUND = 1.10
_OVERRUN_POWER = 2.0
"""A plan beyond a bound is charged with this power of the overrun: chance in a short record does not throw a good
plan out at once, and no plan far beyond wins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A finished request as the recorder knows it; `e2e_s` is how long it took."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    e2e_s: float = 0.0


def make_scorer(
    recent: Sequence[Arrival],
    *,
    cost: StepCost,
    num_instances: int,
    transfer: Transfer | None = None,
    options: L4Options | None = None,
    max_requests: int = 1500,
) -> Callable[[Plan], float] | None:
    """A function from a plan to its predicted objective, for `l4queue.planner.plan`; None where it could not tell.

    The latest `max_requests` arrivals are replayed under the plan as it stands, without replanning. The
    objective is the mean end-to-end latency, s; under the default objective times the square of how far the
    mean of the longest 5 % exceeds 1.25 times, or the 99th percentile 1.1 times, what one stage gives.
    """
    if len(recent) < MIN_ARRIVALS or num_instances < 2:
        return None
    ordered = _complete(recent)[-max_requests:]
    if len(ordered) < MIN_ARRIVALS:
        return None
    mean_e2e_s = sum(a.e2e_s for a in ordered) / len(ordered)
    if ordered[-1].arrival_s - ordered[0].arrival_s < MIN_LATENCIES * mean_e2e_s:
        return None
    trace = Trace(
        name="recent",
        arrival_s=np.array([a.arrival_s - ordered[0].arrival_s for a in ordered]),
        input_tokens=np.array([max(1, a.input_tokens) for a in ordered], dtype=np.int64),
        output_tokens=np.array([max(1, a.output_tokens) for a in ordered], dtype=np.int64),
    )
    setting = Setting(cost=cost, num_instances=num_instances, transfer=transfer or Transfer())
    base = options or L4Options()
    known: dict[tuple[tuple[int, int], ...], SimResult] = {}

    def simulated(candidate: Plan) -> SimResult:
        key = tuple((stage.low_tokens, stage.num_workers) for stage in candidate.stages)
        if key not in known:
            known[key] = run_policy(L4(base, fixed=candidate), trace, setting).result
        return known[key]

    def score(candidate: Plan) -> float:
        one = simulated(Plan.one_stage(num_workers=num_instances))
        found = simulated(candidate)
        if base.objective != "balanced":
            return found.mean_e2e_s
        overrun = max(
            1.0,
            _ratio(found.long.mean_e2e_s, one.long.mean_e2e_s) / _LONG_BOUND,
            found.p99_e2e_s / one.p99_e2e_s / _P99_BOUND,
        )
        return float(found.mean_e2e_s * overrun**_OVERRUN_POWER)

    return score


def _complete(recent: Sequence[Arrival]) -> list[Arrival]:
    """By arrival, without those that came within the slowest latency: of these only the quick ones have finished.

    While a system fills up, latencies grow; with a lesser cut the long requests were missing, and with them the
    reason for classes.
    """
    slowest_s = max(a.e2e_s for a in recent)
    end_s = max(a.arrival_s + a.e2e_s for a in recent) - slowest_s
    return sorted((a for a in recent if a.arrival_s <= end_s), key=lambda a: a.arrival_s)


def decide(snapshot: Snapshot, settings: PlannerSettings, score: Callable[[Plan], float] | None) -> Decision:
    """The planner's decision, proved by replay; without one, classes must promise MIN_UNPROVEN_GAIN."""
    if score is not None:
        return plan(snapshot, settings, score=score)
    known = {load.worker_id for load in snapshot.loads}
    has_changed = known != {i for stage in snapshot.plan.stages for i in stage.worker_ids}
    if snapshot.plan.details.get("is_proven") and not has_changed:
        return Decision(publish=False, plan=snapshot.plan, reason="proven by replay: kept until the next one")
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
        return plan(snapshot, replace(settings, partition=replace(settings.partition, max_stages=1)))
    reason = f"gain {gain:.1%} of classes is too little to try them unproven"
    return replace(decision, publish=False, plan=snapshot.plan, reason=reason)


def prove_recent(policy: L4, snapshot: Snapshot, settings: PlannerSettings) -> tuple[Decision, bool]:
    """`decide` for a running simulation, on what it has seen finish; and whether a replay was possible."""
    recent = [
        Arrival(
            arrival_s=r.arrival_s,
            input_tokens=r.prompt_tokens,
            output_tokens=r.generated,
            e2e_s=(r.finish_s or r.arrival_s) - r.arrival_s,
        )
        for r in policy.traffic.recent
    ]
    cluster = policy.cluster
    score = make_scorer(
        recent,
        cost=cluster.cost,
        num_instances=len(cluster.instances),
        transfer=cluster.transfer,
        options=policy.options,
    )
    return decide(snapshot, settings, score), score is not None


def _ratio(value: float | None, reference: float | None) -> float:
    return value / reference if value is not None and reference else 1.0
