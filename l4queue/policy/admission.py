"""Admission: the requests a worker may take now, with KV space left for growth and prefill kept short."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from l4queue.cost.step import StepCost
from l4queue.models import UNBOUNDED_TOKENS, WorkerLoad
from l4queue.policy.loads import decode_step_ms

__all__ = (
    "AdmissionBudget",
    "AdmissionLimits",
    "Admitted",
    "BackgroundBudget",
    "WaitingRequest",
    "admission_budget",
    "admit",
    "max_prefill_ms",
    "pull_delay_ms",
    "unbounded_budget",
)

_MIN_RESERVE, _MAX_RESERVE = 0.05, 0.25
"""Least and most share of the KV cache that is kept for the growth of running requests."""
_EULER_MASCHERONI = 0.5772
"""γ of H(n) ≈ ln n + γ + 1/2n, to four digits: DLMF 5.2.3. The rest of the series is below 1/12n²."""
_PATIENCE = 4.0
"""At most a fifth of the engine's time is given up. Of 1, 3, 4, 5, 6 in simulation: below 3 the long prompts of
mooncake_conversation empty batches on H100 that would fill again; from 5 on less is won on CPU engines."""
_GIVE_WAY_MOST_MS = 50.0
"""A pending prefill may take much longer. In nine windows simulated on 16 H100 with wake-ups 10 ms late, 25 costs
1.5 % of the mean, and pauses of half or a quarter of the difference cost 4 and 3 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """Limits that keep a worker from pulling more.

    `growth_tokens` is a quantile of what a request of this stage still grows; the sum over the batch is
    reserved, but at least 5 % and at most 25 % of the cache, since not all grow at once.
    `prefill_tokens` bounds the prompts that wait for their prefill inside the engine, where nobody can steal,
    cancel cheaply or overtake; None: one step's token budget.
    `remaining_tokens` is what a running request still generates on average: where it is set, a prompt whose
    prefill would hold up what runs for longer than that needs to end waits for it (`max_prefill_ms`).
    """

    growth_tokens: float = 256.0
    prefill_tokens: int | None = None
    remaining_tokens: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionBudget:
    """What may be pulled: at most so many requests with together so many tokens, each with room to grow.

    `prefill_tokens` is soft: the request that exceeds it is still taken, none after it. No request longer than
    `longest_tokens` is, unless it is the first of an idle worker.
    """

    num_requests: int
    kv_tokens: int
    prefill_tokens: int
    growth_tokens: int
    is_idle: bool
    reason: str
    longest_tokens: int = UNBOUNDED_TOKENS


def unbounded_budget(num_requests: int, *, reason: str, is_idle: bool = True) -> AdmissionBudget:
    """Budget of a number of requests of any size."""
    return AdmissionBudget(
        num_requests=num_requests,
        kv_tokens=UNBOUNDED_TOKENS,
        prefill_tokens=UNBOUNDED_TOKENS,
        growth_tokens=0,
        is_idle=is_idle,
        reason=reason,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingRequest:
    """A waiting request for `admit`: its length is prompt plus output so far."""

    request_id: str
    length_tokens: int
    is_background: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BackgroundBudget:
    """At most this many background requests, none above `longest_tokens` except the first of an idle worker."""

    num_requests: int
    longest_tokens: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """The answer of `admit`: requests to take, from the head but for background ones, and what stopped it."""

    request_ids: tuple[str, ...]
    tokens: int
    reason: str

    @property
    def num_requests(self) -> int:
        return len(self.request_ids)


def max_prefill_ms(
    num_running: int, context_tokens: int, *, remaining_tokens: float, num_waiting: float, cost: StepCost
) -> float:
    """The longest prefill that may begin beside n running requests, ms: shortest remaining first.

    What runs needs D to end: remaining · H(n) · step, with H the harmonic number, for remaining lengths without
    memory. A prefill of P ms admitted now delays each of the n by P (a step with a chunk of it takes as long as
    the chunk); admitted when they have ended it is late by D, and so are the others of the q that wait: it should
    wait where n·P > q·D. A batch that empties wastes the engine, though, for about D out of D + P: it may only
    where P > _PATIENCE·D. With nothing running the bound is that of one request that has just begun.
    """
    n = max(1, num_running)
    harmonic = math.log(n) + _EULER_MASCHERONI + 0.5 / n if n > 1 else 1.0
    ends_ms = remaining_tokens * harmonic * decode_step_ms(n, context_tokens, cost=cost)
    return ends_ms * max(_PATIENCE, num_waiting / n)


def pull_delay_ms(batch_ms: float, *, lightest_ms: float) -> float:
    """How long to let others go first when something arrives in a shared queue: by how much more is before us.

    All workers with room are woken at once. The one that gets through its batch soonest should take the request,
    and with these pauses it does as far as wake-ups are punctual, though the others' loads (`lightest_ms` is the
    least of them) are known as of a while ago only: an error there shifts all pauses alike.
    """
    return min(max(0.0, batch_ms - lightest_ms), _GIVE_WAY_MOST_MS)


def _longest_tokens(prefill_ms: float, cost: StepCost) -> int:
    """The longest prompt with at most this prefill: the root of π·L + ψ·L²/2."""
    if cost.psi_ms > 0.0:
        root = math.sqrt(cost.pi_ms * cost.pi_ms + 2.0 * cost.psi_ms * prefill_ms)
        found = (root - cost.pi_ms) / cost.psi_ms
    elif cost.pi_ms > 0.0:
        found = prefill_ms / cost.pi_ms
    else:
        return UNBOUNDED_TOKENS
    return int(min(found, UNBOUNDED_TOKENS))


def admission_budget(
    load: WorkerLoad, *, cost: StepCost, limits: AdmissionLimits | None = None, num_waiting: float = 0.0
) -> AdmissionBudget:
    """Room of a worker by its load. A worker with nothing to do has room for one request whatever its size.

    The capacity is the worker's own when it says one, else the cost model's; zero in both means no bound.
    `num_waiting` is the worker's share of the requests in the queue it pulls from.
    """
    limits = limits or AdmissionLimits()
    busy = load.num_in_engine
    growth = max(1, round(limits.growth_tokens))
    max_running = load.max_running or cost.max_num_seqs
    capacity = load.kv_capacity_tokens or cost.kv_capacity_tokens
    prefill = (limits.prefill_tokens or cost.max_batched_tokens) - load.pending_prefill_tokens
    slots = max_running - busy
    free = _free_tokens(load, capacity, busy=busy, limits=limits)
    if load.is_draining:
        slots, reason = 0, "draining"
    elif slots <= 0:
        slots, reason = 0, "all slots taken"
    elif busy == 0:
        reason = "idle"
    elif prefill <= 0:
        slots, reason = 0, "prefill pending"
    elif free <= 0:
        slots, reason = 0, "cache full"
    else:
        reason = "room"
    return AdmissionBudget(
        num_requests=slots,
        kv_tokens=max(0, free),
        prefill_tokens=max(0, prefill),
        growth_tokens=growth,
        is_idle=busy == 0 and slots > 0,
        reason=reason,
        longest_tokens=_bound_by_running(load, busy=busy, num_waiting=num_waiting, cost=cost, limits=limits),
    )


def admit(
    room: AdmissionBudget, waiting: Sequence[WaitingRequest], *, background: BackgroundBudget | None = None
) -> Admitted:
    """Take in this order while there is room: the rule of the script `take`, and the oracle of its tests.

    No product code calls it. It never skips: the next in order must not starve behind small ones. Only a
    background request that may not be taken is passed over, and so are those behind it. `background` None: as
    all others.
    """
    taken: list[str] = []
    tokens = prefill = 0
    number = room.num_requests if background is None else background.num_requests
    longest = UNBOUNDED_TOKENS if background is None else background.longest_tokens
    reason = room.reason if room.num_requests == 0 else "queue empty"
    for request in waiting:
        if len(taken) >= room.num_requests:
            reason = room.reason if room.num_requests == 0 else "slots"
            break
        if request.is_background and number <= 0:
            continue
        needs, is_first = request.length_tokens + room.growth_tokens, room.is_idle and not taken
        stop = None
        if taken and prefill >= room.prefill_tokens:
            stop = "prefill budget"
        elif request.length_tokens > room.longest_tokens and not is_first:
            stop = "what runs ends first"
        elif tokens + needs > room.kv_tokens and not is_first:
            stop = "cache"
        if request.is_background and (stop or (request.length_tokens > longest and not is_first)):
            number = 0
            continue
        if stop:
            reason = stop
            break
        taken.append(request.request_id)
        tokens += needs
        prefill += request.length_tokens
        number -= request.is_background
    return Admitted(request_ids=tuple(taken), tokens=tokens, reason=reason)


def _bound_by_running(
    load: WorkerLoad, *, busy: int, num_waiting: float, cost: StepCost, limits: AdmissionLimits
) -> int:
    if limits.remaining_tokens is None:
        return UNBOUNDED_TOKENS
    bearable_ms = max_prefill_ms(
        busy, load.context_tokens, remaining_tokens=limits.remaining_tokens, num_waiting=num_waiting, cost=cost
    )
    return _longest_tokens(bearable_ms, cost)


def _free_tokens(load: WorkerLoad, capacity: int, *, busy: int, limits: AdmissionLimits) -> int:
    if not capacity:
        return UNBOUNDED_TOKENS
    reserve = min(max(busy * limits.growth_tokens, _MIN_RESERVE * capacity), _MAX_RESERVE * capacity)
    return int(capacity - load.kv_used_tokens - reserve)
