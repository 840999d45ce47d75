"""Replay of the last minutes of real traffic under a given plan: the planner's scoring function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost
from l4queue.models import Plan
from l4queue.planning.histogram import Buckets, Demand
from l4queue.planning.steady_state import LONG_BOUND, P99_BOUND, Objective
from l4queue.sim.engine.instance import Instance
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.policies.l4 import L4, L4Options
from l4queue.sim.results import SimResult, missed_share
from l4queue.sim.runner import Run, RunConfig, run_policy
from l4queue.sim.traces.trace import Trace

__all__ = ("MAX_ARRIVALS", "Changed", "RecordedArrival", "make_scorer")

MIN_ARRIVALS = 100
"""Fewer tell more about chance than about a plan."""
MIN_LATENCIES = 4.0
"""Mean latencies. A shorter replay ends before its queues are what they would become."""
MAX_ARRIVALS = 1500
"""Most arrivals in a replay. Chosen: more tell plans apart more surely, and take the planner longer."""
_DRAWN = 400
"""Arrivals that are drawn where a change has left too few. Chosen: they are drawn from what is known already, so
more of them tell little more."""
_OVERRUN_POWER = 2.0
"""A plan beyond a bound is charged with this power of the overrun: chance in a short record does not throw a good
plan out at once, and no plan far beyond wins."""
_NUM_CHECKS, _FIRST_CHECK = 16, 6
"""A replay is held against the best so far at sixteen points of the record, from three eighths of it on."""
_CLEARLY_WORSE = 1.25
"""Factor on the latency that would make a plan equal to the best: beyond it a replay ends early. Chosen: a smaller
one ends plans that would have caught up, a larger one saves less time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedArrival:
    """A finished request as the recorder knows it; `e2e_s` is how long it took."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    e2e_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """Traffic has changed at `begun_s`: what came before is no example of it; `demand` is what it is since."""

    begun_s: float
    demand: Demand
    buckets: Buckets


def make_scorer(
    recent: Sequence[RecordedArrival],
    *,
    cost: StepCost,
    num_instances: int,
    price: MovePrice | None = None,
    options: L4Options | None = None,
    changed: Changed | None = None,
    max_requests: int = MAX_ARRIVALS,
) -> Callable[[Plan], float] | None:
    """A function from a plan to its predicted objective, for the planner; None where it could not tell.

    The latest `max_requests` arrivals since the last change are replayed under the plan as it stands, without
    replanning; where a change has left too few, as many are drawn from all that are known, with the rates of each
    length since. What is minimised is said by the objective:

    - `mean`: the mean end-to-end latency, s. `balanced`, the default: that times the square of how far the mean of
      the longest 5 % exceeds 1.25 times, or the 99th percentile 1.1 times, what one stage gives.
    - `normalized`: the mean over requests of latency per output token, s.
    - `goodput`: the share of requests that miss the service level.

    Under the first two a replay clearly worse than the best so far is not played to its end: its score is then
    where it was heading.
    """
    if num_instances < 2:
        return None
    record = _record(recent, changed=changed, max_requests=max_requests)
    if record is None:
        return None
    trace = Trace(
        name="recent",
        arrival_s=np.array([a.arrival_s - record[0].arrival_s for a in record]),
        input_tokens=np.array([max(1, a.input_tokens) for a in record], dtype=np.int64),
        output_tokens=np.array([max(1, a.output_tokens) for a in record], dtype=np.int64),
    )
    setting = RunConfig(cost=cost, num_instances=num_instances, price=price or MovePrice())
    return _Replays(trace, setting, options or L4Options()).score


class _Replays:
    """Plans on one record, each replayed once."""

    def __init__(self, trace: Trace, setting: RunConfig, options: L4Options) -> None:
        self._trace, self._setting, self._options = trace, setting, options
        self._known: dict[tuple[tuple[int, int], ...], float] = {}
        self._one: SimResult | None = None
        self._best_s = self._best_mean_s = float("inf")
        self._limits: list[float] | None = None
        self._best_curve: list[float] = []

    def score(self, candidate: Plan) -> float:
        """The objective of a plan."""
        if self._one is None:
            one = Plan.one_stage(num_workers=self._setting.num_instances)
            self._known[_key(one)] = self._replayed(one)
        key = _key(candidate)
        if key not in self._known:
            self._known[key] = self._replayed(candidate)
        return self._known[key]

    def _replayed(self, candidate: Plan) -> float:
        policy = _Watched(self._options, fixed=candidate, num_requests=len(self._trace), limits=self._limits)
        try:
            run = run_policy(policy, self._trace, self._setting)
        except _ClearlyWorseError:
            at = len(policy.curve) - 1
            heading_s = self._best_mean_s * policy.curve[at] / self._best_curve[at]
            return max(heading_s, policy.spent_s / len(self._trace))
        found = run.result
        if self._one is None:
            self._one = found
        value = self._value(run, self._one)
        if self._is_latency and value < self._best_s:
            self._best_s, self._best_mean_s, self._best_curve = value, found.mean_e2e_s, policy.curve
            # one without an overrun of its own is better as soon as its latencies are below the best one's score
            allowed = _CLEARLY_WORSE * value / found.mean_e2e_s
            self._limits = [*(allowed * area for area in policy.curve), _CLEARLY_WORSE * value * len(self._trace)]
        return value

    @property
    def _is_latency(self) -> bool:
        """Whether the score is a latency, by which a replay can be judged before its end."""
        return self._options.objective in (Objective.MEAN, Objective.BALANCED)

    def _value(self, run: Run, one: SimResult) -> float:
        found, options = run.result, self._options
        if options.objective == Objective.NORMALIZED:
            return found.mean_normalized_latency_s
        if options.objective == Objective.GOODPUT:
            return missed_share(run.measured, ttft_ms=options.slo_ttft_ms, tpot_ms=options.slo_tpot_ms)
        if options.objective == Objective.MEAN:
            return found.mean_e2e_s
        overrun = max(
            1.0,
            _ratio(found.long.mean_e2e_s, one.long.mean_e2e_s) / LONG_BOUND,
            found.p99_e2e_s / one.p99_e2e_s / P99_BOUND,
        )
        return float(found.mean_e2e_s * overrun**_OVERRUN_POWER)


class _ClearlyWorseError(Exception):
    """The replay has spent far more latency by now than the best plan had."""


class _Watched(L4):
    """L4 on a fixed plan that counts the latency spent so far: the time integral of requests in the system."""

    def __init__(
        self, options: L4Options, *, fixed: Plan, num_requests: int, limits: Sequence[float] | None
    ) -> None:
        super().__init__(options, fixed=fixed)
        self.spent_s = 0.0
        self.curve: list[float] = []
        self._limits = limits
        self._every = max(1, num_requests // _NUM_CHECKS)
        self._arrived = self._inside = 0
        self._ended_s = self._came_s = 0.0

    def on_arrival(self, request: SimRequest, now_s: float) -> None:
        """Every sixteenth of the record: what has been spent, and whether that is too much by now."""
        self._arrived += 1
        self._inside += 1
        self._came_s += now_s
        if self._arrived % self._every == 0:
            self.spent_s = self._ended_s + self._inside * now_s - self._came_s
            self.curve.append(self.spent_s)
            at = len(self.curve)
            if self._limits is not None and at >= _FIRST_CHECK and self.spent_s > self._limits[at - 1]:
                raise _ClearlyWorseError
        super().on_arrival(request, now_s)

    def on_finished(self, instance: Instance, requests: Sequence[SimRequest], now_s: float) -> None:
        """These spend no more; whether all have spent too much already."""
        for request in requests:
            self._inside -= 1
            self._came_s -= request.arrival_s
            self._ended_s += now_s - request.arrival_s
        self.spent_s = self._ended_s + self._inside * now_s - self._came_s
        if self._limits is not None and len(self.curve) >= _FIRST_CHECK and self.spent_s > self._limits[-1]:
            raise _ClearlyWorseError
        super().on_finished(instance, requests, now_s)


def _record(
    recent: Sequence[RecordedArrival], *, changed: Changed | None, max_requests: int
) -> Sequence[RecordedArrival] | None:
    """Requests to replay, in order of arrival; None where too little is known."""
    if len(recent) < MIN_ARRIVALS:
        return None
    complete = _complete(recent)
    latest = complete[-max_requests:]
    if changed is not None:
        latest = [a for a in latest if a.arrival_s >= changed.begun_s]
    if _is_long_enough(latest):
        return latest
    if changed is None or len(complete) < MIN_ARRIVALS or latest == complete[-max_requests:]:
        return None
    drawn = _drawn_anew(complete, changed, number=min(_DRAWN, max_requests))
    return drawn if _is_long_enough(drawn) else None


def _is_long_enough(record: Sequence[RecordedArrival]) -> bool:
    if len(record) < MIN_ARRIVALS:
        return False
    mean_e2e_s = sum(a.e2e_s for a in record) / len(record)
    return record[-1].arrival_s - record[0].arrival_s >= MIN_LATENCIES * mean_e2e_s


def _complete(recent: Sequence[RecordedArrival]) -> list[RecordedArrival]:
    """By arrival, without requests younger than the slowest latency: of these only the quick ones have finished.

    While a system fills up, latencies grow; with a lesser cut the long requests were missing, and with them the
    reason for classes.
    """
    slowest_s = max(a.e2e_s for a in recent)
    end_s = max(a.arrival_s + a.e2e_s for a in recent) - slowest_s
    return sorted((a for a in recent if a.arrival_s <= end_s), key=lambda a: a.arrival_s)


def _drawn_anew(known: Sequence[RecordedArrival], changed: Changed, *, number: int) -> list[RecordedArrival]:
    """Poisson arrivals at the rates since the change, each length bucket's requests drawn from those known of it.

    A bucket of which none is known gives requests of its middle length and of average output. The draw is the same
    for the same traffic.
    """
    rates = changed.demand.arrivals_per_s
    total = float(rates.sum())
    if total <= 0.0:
        return []
    rng = np.random.default_rng(number)
    by_bucket: dict[int, list[RecordedArrival]] = {}
    for arrival in known:
        by_bucket.setdefault(changed.buckets.index(arrival.input_tokens), []).append(arrival)
    output = round(sum(a.output_tokens for a in known) / len(known))
    at_s = np.cumsum(rng.exponential(1.0 / total, number))
    drawn: list[RecordedArrival] = []
    for bucket, arrival_s in zip(rng.choice(len(rates), size=number, p=rates / total), at_s, strict=True):
        some = by_bucket.get(int(bucket))
        if some is None:
            middle = round(float(changed.buckets.middle_tokens[bucket]))
            drawn.append(RecordedArrival(arrival_s=float(arrival_s), input_tokens=middle, output_tokens=output))
        else:
            drawn.append(replace(some[int(rng.integers(len(some)))], arrival_s=float(arrival_s)))
    return drawn


def _key(candidate: Plan) -> tuple[tuple[int, int], ...]:
    return tuple((stage.low_tokens, stage.num_workers) for stage in candidate.stages)


def _ratio(value: float | None, reference: float | None) -> float:
    return value / reference if value is not None and reference else 1.0
