"""Replay of the last minutes of real traffic under given plans, by which the planner compares them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost
from l4queue.models import Plan
from l4queue.planning.planner import Replay
from l4queue.planning.steady_state import LONG_BOUND, P99_BOUND, Objective
from l4queue.policy.prefix_blocks import BLOCK_TOKENS
from l4queue.sim.engine.instance import Instance
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.policies.l4 import L4, L4Options
from l4queue.sim.policies.l4_prefixes import PrefixL4
from l4queue.sim.records import MAX_ARRIVALS, Changed, RecordedArrival, chains_of, record_of
from l4queue.sim.results import Measured
from l4queue.sim.runner import RunConfig, run_policy
from l4queue.sim.traces.trace import Trace

_Key: TypeAlias = tuple[bool, tuple[tuple[int, int], ...]]
Rows: TypeAlias = NDArray[np.int64] | slice

__all__ = ("make_replay",)

_OVERRUN_POWER = 2.0
"""A plan beyond a bound is charged with this power of the overrun: chance in a short record does not throw a good
plan out at once, and no plan far beyond wins."""
_NUM_CHECKS, _FIRST_CHECK = 16, 6
"""A replay is held against the best so far at sixteen points of the record, from three eighths of it on."""
_CLEARLY_WORSE = 1.25
"""Factor on the latency that would make a plan equal to the best: beyond it a replay ends early. Chosen: a smaller
one ends plans that would have caught up, a larger one saves less time."""
_WORSE_THAN_AFFINITY = 1.08
"""The same where the best is prefix affinity. Chosen: on 16 records with content, at five of the checks each, no
plan that was better in the end was more than 1.06 times as dear; 1.25 ends hardly any that lost."""
_FEWEST_BLOCKS, _MOST_BLOCKS = 8, 32
"""Blocks of a record. Chosen: fewer than eight tell little of how much they vary, more than 32 hardly more."""
_NUM_RECORDS, _CHANCE = 300, 0.01
"""Records drawn, and the share of them that may gain nothing. Chosen: with one in twenty a worse plan replaced the
best in a quarter of the runs of docs/planner.md, since the best of some ten is judged; with one in a hundred
in none."""


def make_replay(
    recent: Sequence[RecordedArrival],
    *,
    cost: StepCost,
    num_instances: int,
    price: MovePrice | None = None,
    options: L4Options | None = None,
    changed: Changed | None = None,
    max_requests: int = MAX_ARRIVALS,
    needs_content: bool = False,
) -> Replay | None:
    """Replays for the planner; None where they could not tell.

    The latest `max_requests` arrivals since the last change are replayed under the plan as it stands, without
    replanning. Where a change has left few, as many are drawn: at the rate since, from all that have come since
    the mix of lengths changed, or, where these are too few, from all that are known, with the rate of each length.
    Where the content of prompts is told, engines have prefix caches, empty at first. With `needs_content` there is
    no replay of requests that were drawn without theirs. What is minimised is said by the objective:

    - `mean`: the mean end-to-end latency, s. `balanced`, the default: that times the square of how far the mean of
      the longest 5 % exceeds 1.25 times, or the 99th percentile 1.1 times, what one stage gives.
    - `normalized`: the mean over requests of latency per output token, s.
    - `goodput`: the share of requests that miss the service level.

    Under the first two a replay clearly worse than the best so far is not played to its end: its score is then
    where it was heading.
    """
    if num_instances < 2:
        return None
    record = record_of(recent, changed=changed, max_requests=max_requests, needs_content=needs_content)
    if record is None:
        return None
    known = record if changed is None else [a for a in recent if a.arrival_s >= changed.mix_begun_s]
    trace = Trace(
        name="recent",
        arrival_s=np.array([a.arrival_s - record[0].arrival_s for a in record]),
        input_tokens=np.array([max(1, a.input_tokens) for a in record], dtype=np.int64),
        output_tokens=np.array([max(1, a.output_tokens) for a in record], dtype=np.int64),
        chains=chains_of(record),
    )
    setting = RunConfig(cost=cost, num_instances=num_instances, price=price or MovePrice())
    if trace.chains is not None:
        setting = replace(setting, block_tokens=BLOCK_TOKENS)
    return _Replays(trace, setting, options or L4Options(), evidence=min(1.0, len(known) / len(record)))


class _Replays:
    """Plans on one record, each replayed once. `evidence` is the part of it that came since the last change."""

    def __init__(self, trace: Trace, setting: RunConfig, options: L4Options, *, evidence: float) -> None:
        self._trace, self._setting, self._options = trace, setting, options
        self._evidence = evidence
        self._known: dict[_Key, float] = {}
        self._measured: dict[_Key, Measured] = {}
        self._one: Measured | None = None
        self._is_long: NDArray[np.bool_] = np.zeros(0, dtype=bool)
        self._best_s = self._best_mean_s = float("inf")
        self._limits: list[float] | None = None
        self._best_curve: list[float] = []

    @property
    def tells_content(self) -> bool:
        """Whether it knows what prompts have in common."""
        return self._trace.chains is not None

    def score(self, candidate: Plan, /) -> float:
        """The objective of a plan."""
        if self._one is None:
            one = Plan.one_stage(num_workers=self._setting.num_instances)
            self._known[_key(one)] = self._replayed(one)
        key = _key(candidate)
        if key not in self._known:
            self._known[key] = self._replayed(candidate)
        return self._known[key]

    def sure_gain(self, candidate: Plan, against: Plan, /) -> float:
        """Share of the other's objective that `candidate` saves at least, in 99 of 100 records like this one.

        Such records are drawn from blocks of consecutive arrivals, with replacement: a block bootstrap (Künsch,
        1989). Both plans are judged on the same ones. A block lasts as long as the slowest request, at least:
        latencies of an episode belong together. With fewer than `_FEWEST_BLOCKS` nothing is sure. Records are as
        long as what has been seen since the last change: one drawn from a few requests proves no more than these.
        """
        self.score(against)  # all are held against one stage, which is replayed first
        ours, theirs = self._whole(candidate), self._whole(against)
        slowest_s = max(float(plan.e2e_s.max()) for plan in (ours, theirs))
        num_blocks = min(_MOST_BLOCKS, int(self._trace.arrival_s[-1] / slowest_s))
        num_drawn = round(self._evidence * num_blocks)
        if num_drawn < _FEWEST_BLOCKS:
            return -float("inf")
        blocks = np.array_split(np.arange(len(self._trace)), num_blocks)
        gains = []
        for draw in np.random.default_rng(len(self._trace)).integers(num_blocks, size=(_NUM_RECORDS, num_drawn)):
            rows = np.concatenate([blocks[i] for i in draw])
            gains.append(_saved(self._value(ours, rows), self._value(theirs, rows)))
        return float(np.quantile(gains, _CHANCE))

    def _replayed(self, candidate: Plan) -> float:
        watched = _WatchedPrefixes if candidate.prefix_affinity else _Watched
        policy = watched(self._options, fixed=candidate, num_requests=len(self._trace), limits=self._limits)
        try:
            found = run_policy(policy, self._trace, self._setting).measured
        except _ClearlyWorseError:
            at = len(policy.curve) - 1
            heading_s = self._best_mean_s * policy.curve[at] / self._best_curve[at]
            return max(heading_s, policy.spent_s / len(self._trace))
        self._measured[_key(candidate)] = found
        if self._one is None:
            self._one, self._is_long = found, found.is_long
        value = self._value(found)
        if self._is_latency and value < self._best_s:
            mean_s = float(found.e2e_s.mean())
            self._best_s, self._best_mean_s, self._best_curve = value, mean_s, policy.curve
            # one without an overrun of its own is better as soon as its latencies are below the best one's score
            allowed = _WORSE_THAN_AFFINITY if candidate.prefix_affinity else _CLEARLY_WORSE
            at_checks = (allowed * value / mean_s * area for area in policy.curve)
            self._limits = [*at_checks, allowed * value * len(self._trace)]
        return value

    def _whole(self, candidate: Plan) -> Measured:
        """Measures of a replay to the end."""
        key = _key(candidate)
        if key not in self._measured:
            policy = (PrefixL4 if candidate.prefix_affinity else L4)(self._options, fixed=candidate)
            self._measured[key] = run_policy(policy, self._trace, self._setting).measured
        return self._measured[key]

    @property
    def _is_latency(self) -> bool:
        """Whether the score is a latency, by which a replay can be judged before its end."""
        return self._options.objective in (Objective.MEAN, Objective.BALANCED)

    def _value(self, found: Measured, rows: Rows = slice(None)) -> float:
        """The objective over these rows of the record."""
        options, e2e_s = self._options, found.e2e_s[rows]
        if options.objective == Objective.NORMALIZED:
            return float((e2e_s / found.output_tokens[rows]).mean())
        if options.objective == Objective.GOODPUT:
            is_missed = found.missed(ttft_ms=options.slo_ttft_ms, tpot_ms=options.slo_tpot_ms)
            return float(is_missed[rows].mean())
        if options.objective == Objective.MEAN:
            return float(e2e_s.mean())
        assert self._one is not None
        one_s, is_long = self._one.e2e_s[rows], self._is_long[rows]
        overrun = max(
            1.0,
            float(e2e_s[is_long].sum() / one_s[is_long].sum()) / LONG_BOUND if is_long.any() else 1.0,
            float(np.quantile(e2e_s, 0.99) / np.quantile(one_s, 0.99)) / P99_BOUND,
        )
        return float(e2e_s.mean() * overrun**_OVERRUN_POWER)


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


class _WatchedPrefixes(_Watched, PrefixL4):
    """The same of prefix affinity."""


def _saved(value: float, against: float) -> float:
    """Share saved; nothing where there is nothing to save, as with no missed request."""
    return 1.0 - value / against if against > 0.0 else -value


def _key(candidate: Plan) -> _Key:
    return candidate.prefix_affinity, tuple((stage.low_tokens, stage.num_workers) for stage in candidate.stages)
