"""Background requests: how many a worker runs beside interactive ones, and which it gives back.

One number bounds the burden of interactive requests, the slowdown x. With n background requests of length L, a
step costs b = n·(β + γ·L) more, and their prefills take p ms of each step. In an engine whose work comes from
arrivals a step lasts t = (α + b + p) / (1 - ρ), where ρ is the load of the interactive requests. They get slower
by (b + p) / α, whatever their number. So the bound is b + p ≤ x·α: x times the step of an *empty* engine, not of
the present one. Prefills are paced by a credit that grows by x·α - b with each step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from l4queue.cost.step import StepCost
from l4queue.models import WorkerLoad
from l4queue.policy.admission import AdmissionBudget, BackgroundBudget
from l4queue.policy.loads import decode_step_ms

__all__ = (
    "BackgroundLimits",
    "Credit",
    "RunningBackground",
    "background_budget",
    "give_back",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackgroundLimits:
    """Burden of interactive requests. `slowdown` is their time with background requests over that without, less 1.

    `free_share` of slots and KV cache is kept for newcomers. `most_credit_ms` bounds the prefills that begin
    together. Running requests go back for the step's sake only beyond `tolerance` times the bound: they grow.
    """

    slowdown: float = 0.2
    free_share: float = 0.25
    most_credit_ms: float = 50.0
    tolerance: float = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningBackground:
    """One that runs. `is_fixed`: giving it back would lose what it has generated, or it is leaving anyway."""

    request_id: str
    length_tokens: int
    expected_remaining_tokens: float
    awaits_prefill: bool = False
    is_fixed: bool = False

    def step_ms(self, cost: StepCost) -> float:
        """Mean addition to each decode step from now to its end."""
        return cost.beta_ms + cost.gamma_ms * (self.length_tokens + self.expected_remaining_tokens / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """Prefill of background requests that may begin, ms of engine time as of `at_ms`; negative: used before."""

    ms: float = 0.0
    at_ms: float = 0.0

    def less(self, prefill_ms: float) -> Credit:
        """After such a prefill was begun. What lies farther back than the last one is forgotten."""
        return replace(self, ms=max(0.0, self.ms) - prefill_ms)

    def grown(
        self,
        *,
        now_ms: float,
        load: WorkerLoad,
        running: Sequence[RunningBackground],
        cost: StepCost,
        limits: BackgroundLimits,
    ) -> Credit:
        """The credit now: x·α - b more for each decode step since, up to `most_credit_ms`. It never shrinks."""
        step_ms = max(_empty_step_ms(cost), decode_step_ms(load.num_running, load.context_tokens, cost=cost))
        spare_ms = max(0.0, limits.slowdown * _empty_step_ms(cost) - _step_ms(running, cost))
        rate = spare_ms / step_ms if step_ms > 0.0 else limits.slowdown
        ms = min(max(limits.most_credit_ms, self.ms), self.ms + rate * max(0.0, now_ms - self.at_ms))
        return Credit(ms=ms, at_ms=now_ms)


def background_budget(
    load: WorkerLoad,
    room: AdmissionBudget,
    running: Sequence[RunningBackground],
    *,
    credit: Credit,
    cost: StepCost,
    limits: BackgroundLimits,
) -> BackgroundBudget:
    """How many background requests may be taken beside interactive ones, within the room for any.

    They come one at a time: while there is credit, the step stays within the bound, and slots and cache stay free.
    One may always run: a worker that has none takes one in any slot and of any length, so that they never stop,
    however busy the worker is. One that is too long beside the running ones waits to be the first, and the others
    behind it wait, too. `load.num_running` are all that the worker has, also requests that wait in the engine.
    """
    longest, number, reason = room.longest_tokens, 1, "within the bound"
    capacity = load.kv_capacity_tokens or cost.kv_capacity_tokens
    step_ms, allowed_ms = _step_ms(running, cost), limits.slowdown * _empty_step_ms(cost)
    if credit.ms < 0.0:
        number, reason = 0, "earlier prefills"
    elif not running:
        reason = "the first"
    elif step_ms * (1.0 + 1.0 / len(running)) > allowed_ms:
        number, reason = 0, "step time"
    elif _free_slots(load, cost) <= _kept_slots(load, cost, limits):
        number, reason = 0, "slots for newcomers"
    else:
        if cost.gamma_ms > 0.0:
            longest = min(longest, int((allowed_ms - step_ms - cost.beta_ms) / cost.gamma_ms))
        if capacity:
            longest = min(longest, int(room.kv_tokens - limits.free_share * capacity) - room.growth_tokens)
        if longest <= 0:
            longest, number, reason = 0, 0, "cache for newcomers"
    return BackgroundBudget(num_requests=min(number, room.num_requests), longest_tokens=longest, reason=reason)


def give_back(
    load: WorkerLoad,
    running: Sequence[RunningBackground],
    *,
    cost: StepCost,
    limits: BackgroundLimits,
) -> tuple[str, ...]:
    """Ids of running background requests to give back to the queue now that interactive requests have come.

    Going on elsewhere or later costs a prefill of the length so far; going on here costs every step until its end
    β + γ·length. So while steps are beyond the bound those go back whose end is farther away than their prefill is
    worth. Where newcomers have used up half of the slots or of the cache kept for them the others go, too, those
    that gain most first, until all of it is free again. One always stays, the one that would gain least.
    """
    free = sorted((r for r in running if not r.is_fixed), key=lambda r: (-_gain_ms(r, cost), r.request_id))
    if len(free) == len(running):
        free = free[:-1]
    missing, missing_tokens = _missing(load, cost=cost, limits=limits)
    step_ms, allowed_ms = _step_ms(running, cost), limits.slowdown * _empty_step_ms(cost)
    is_slow = step_ms > limits.tolerance * allowed_ms
    gone: list[str] = []
    for request in free:
        relieves = is_slow and step_ms > allowed_ms and _gain_ms(request, cost) > 0.0
        if not relieves and len(gone) >= missing and missing_tokens <= 0.0:
            break
        gone.append(request.request_id)
        missing_tokens -= request.length_tokens
        step_ms -= request.step_ms(cost)
    return tuple(gone)


def _missing(load: WorkerLoad, *, cost: StepCost, limits: BackgroundLimits) -> tuple[int, float]:
    """Slots and tokens of cache to free. Not before half is gone: else each newcomer would cost a prefill."""
    free, kept = _free_slots(load, cost), _kept_slots(load, cost, limits)
    capacity = load.kv_capacity_tokens or cost.kv_capacity_tokens
    free_tokens, kept_tokens = capacity - load.kv_used_tokens, limits.free_share * capacity
    missing = kept - free if 2 * free < kept else 0
    return missing, kept_tokens - free_tokens if 2 * free_tokens < kept_tokens else 0.0


def _gain_ms(request: RunningBackground, cost: StepCost) -> float:
    """Time that the steps of this worker save until its end, less the prefill that it costs once more."""
    rest_ms = request.expected_remaining_tokens * request.step_ms(cost)
    prefill_ms = cost.prefill_ms(request.length_tokens)
    return rest_ms + prefill_ms if request.awaits_prefill else rest_ms - prefill_ms


def _step_ms(running: Sequence[RunningBackground], cost: StepCost) -> float:
    return sum(request.step_ms(cost) for request in running)


def _empty_step_ms(cost: StepCost) -> float:
    """The step of one request without context: what the bound is a part of."""
    return cost.alpha_ms + cost.beta_ms


def _free_slots(load: WorkerLoad, cost: StepCost) -> int:
    return max(0, (load.max_running or cost.max_num_seqs) - load.num_running)


def _kept_slots(load: WorkerLoad, cost: StepCost, limits: BackgroundLimits) -> int:
    return math.ceil(limits.free_share * (load.max_running or cost.max_num_seqs))
