"""Admission: the requests a worker may take now, with KV space left for growth and prefill kept short.

The live intake and the simulator ask the same functions: `admission_budget` turns what is known of a worker and
of the queue it pulls from into a budget, `AdmissionBudget.refusal` holds one request against that, and
`AdmissionBudget.after` charges one that is taken. The script `take` applies the same budget inside Redis.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from l4queue.cost.step import StepCost
from l4queue.models import UNBOUNDED_TOKENS, WorkerLoad
from l4queue.policy.loads import decode_step_ms

__all__ = (
    "AdmissionBudget",
    "AdmissionLimits",
    "AdmissionState",
    "Admitted",
    "BackgroundBudget",
    "WaitingRequest",
    "admission_budget",
    "admit",
    "half_share",
    "max_prefill_ms",
    "pull_delay_ms",
    "still_awaited",
    "unbounded_budget",
)

K = TypeVar("K", bound=Hashable)

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
    `prefill_steps` bounds the prompts that wait for their prefill inside the engine, where nobody can steal,
    cancel cheaply or overtake. With two steps it never runs dry, and little is out of reach.
    `long_prefill_steps` is the same beside a prompt of more than one step: nothing waits behind that one, as
    others can take it, and there is time.
    """

    growth_tokens: float = 256.0
    prefill_steps: int = 2
    long_prefill_steps: int = 1


_LIMITS = AdmissionLimits()


class AdmissionState(NamedTuple):
    """What is known of a worker, and of the queue that it pulls from, when it looks for work.

    The first seven are those of `WorkerLoad`. `longest_prefill_tokens` is the longest prompt here that has no
    token yet; one that brings its KV cache does not count. `num_waiting` is the worker's share of the requests in
    the queue. `remaining_tokens` is what a running request still generates on average: where it is set, a prompt
    whose prefill would hold up the running requests for longer than they need to end waits for them
    (`max_prefill_ms`).

    A tuple, since the simulator makes one for each look of each engine.
    """

    num_running: int
    context_tokens: int
    pending_prefill_tokens: int
    kv_used_tokens: int
    kv_capacity_tokens: int
    max_running: int
    is_draining: bool = False
    longest_prefill_tokens: int = 0
    num_waiting: float = 0.0
    remaining_tokens: float | None = None

    @classmethod
    def of(
        cls,
        load: WorkerLoad,
        *,
        longest_prefill_tokens: int = 0,
        num_waiting: float = 0.0,
        remaining_tokens: float | None = None,
    ) -> AdmissionState:
        """By the load of a worker."""
        return cls(
            num_running=load.num_running,
            context_tokens=load.context_tokens,
            pending_prefill_tokens=load.pending_prefill_tokens,
            kv_used_tokens=load.kv_used_tokens,
            kv_capacity_tokens=load.kv_capacity_tokens,
            max_running=load.max_running,
            is_draining=load.is_draining,
            longest_prefill_tokens=longest_prefill_tokens,
            num_waiting=num_waiting,
            remaining_tokens=remaining_tokens,
        )


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

    def refusal(self, length_tokens: int) -> str | None:
        """Why the next request in order is not taken; None: it is. Its length is prompt plus output so far."""
        if self.num_requests <= 0:
            return self.reason
        if self.is_idle:
            return None
        if length_tokens > self.longest_tokens:
            return "what runs ends first"
        return "cache" if length_tokens + self.growth_tokens > self.kv_tokens else None

    def after(self, length_tokens: int, *, prefill_tokens: int | None = None) -> AdmissionBudget:
        """What is left once that request is taken. `prefill_tokens`: what of it is to be computed; None: all."""
        spent_tokens = length_tokens if prefill_tokens is None else prefill_tokens
        num_requests, prefill_tokens = self.num_requests - 1, self.prefill_tokens - spent_tokens
        reason = self.reason if num_requests else "slots"
        if num_requests and prefill_tokens <= 0:
            num_requests, reason = 0, "prefill budget"
        return AdmissionBudget(
            num_requests=num_requests,
            kv_tokens=self.kv_tokens - length_tokens - self.growth_tokens,
            prefill_tokens=prefill_tokens,
            growth_tokens=self.growth_tokens,
            is_idle=False,
            reason=reason,
            longest_tokens=self.longest_tokens,
        )

    def without_newcomers(self, awaited: frozenset[K]) -> AdmissionBudget:
        """The same, without the bound on the prompt where nothing is `still_awaited`."""
        return self if awaited else replace(self, longest_tokens=UNBOUNDED_TOKENS)


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


def pull_delay_ms(backlog_ms: float, *, lightest_ms: float) -> float:
    """How long to let others go first with what a take has left in a shared queue: by how much more is before us.

    An arrival wakes the lightest worker with room, and nobody else. Where several have come, and more wait than a
    worker takes at a time, all that were woken go on. The others' loads (`lightest_ms` is the least of them) are
    known as of a while ago only: an error there shifts all pauses alike.
    """
    return min(max(0.0, backlog_ms - lightest_ms), _GIVE_WAY_MOST_MS)


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
    state: AdmissionState, *, cost: StepCost, limits: AdmissionLimits | None = None
) -> AdmissionBudget:
    """Budget of the next take. A worker with nothing to do has room for one request whatever its size.

    A take has one step of prefill at most, so that a long prompt is seen before more is put behind it. The
    capacity is the worker's own when it says one, else the cost model's; zero in both means no bound.
    """
    limits = limits or _LIMITS
    busy, step_tokens = state.num_running, cost.max_batched_tokens
    is_long = state.longest_prefill_tokens > step_tokens
    steps = limits.long_prefill_steps if is_long else limits.prefill_steps
    prefill = steps * step_tokens - state.pending_prefill_tokens
    slots = (state.max_running or cost.max_num_seqs) - busy
    free = _free_tokens(state, cost, limits)
    if state.is_draining:
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
        prefill_tokens=min(max(0, prefill), step_tokens),
        growth_tokens=max(1, round(limits.growth_tokens)),
        is_idle=busy == 0 and slots > 0,
        reason=reason,
        longest_tokens=_bound_by_running(state, cost) if slots else UNBOUNDED_TOKENS,
    )


def still_awaited(awaited: frozenset[K] | None, running: Iterable[K]) -> frozenset[K]:
    """The requests that a prompt at the head of the queue waits for: the ones that ran when it began to wait.

    `awaited` is the last answer, None where the queue was empty, or something was taken from it, since. Requests
    that were handed over meanwhile are not waited for: they would keep the prompt out for ever.
    """
    return frozenset(running) if awaited is None else awaited.intersection(running)


def half_share(num_waiting: int, *, num_sharers: int) -> int:
    """The most requests of a queue that one of several workers takes at a time: half of its share.

    So the first to wake leaves work to the others.
    """
    return -(-num_waiting // (2 * num_sharers)) if num_sharers > 1 else num_waiting


def admit(
    budget: AdmissionBudget, waiting: Sequence[WaitingRequest], *, background: BackgroundBudget | None = None
) -> Admitted:
    """Take in this order while the budget lasts, as the script `take` does.

    It never skips: the next in order must not starve behind small ones. Only a background request that may not
    be taken is passed over, and so are those behind it. `background` None: as all others.
    """
    taken: list[str] = []
    left, tokens, reason = budget, 0, "queue empty"
    number = budget.num_requests if background is None else background.num_requests
    longest = UNBOUNDED_TOKENS if background is None else background.longest_tokens
    for request in waiting:
        if request.is_background and number <= 0:
            continue
        stop = left.refusal(request.length_tokens)
        is_too_long = request.length_tokens > longest and not left.is_idle
        if request.is_background and (stop or is_too_long):
            number = 0
        elif stop:
            reason = stop
            break
        else:
            taken.append(request.request_id)
            tokens += request.length_tokens + budget.growth_tokens
            left = left.after(request.length_tokens)
            number -= request.is_background
    return Admitted(request_ids=tuple(taken), tokens=tokens, reason=reason)


def _bound_by_running(state: AdmissionState, cost: StepCost) -> int:
    if state.remaining_tokens is None:
        return UNBOUNDED_TOKENS
    bearable_ms = max_prefill_ms(
        state.num_running,
        state.context_tokens,
        remaining_tokens=state.remaining_tokens,
        num_waiting=state.num_waiting,
        cost=cost,
    )
    return _longest_tokens(bearable_ms, cost)


def _free_tokens(state: AdmissionState, cost: StepCost, limits: AdmissionLimits) -> int:
    capacity = state.kv_capacity_tokens or cost.kv_capacity_tokens
    if not capacity:
        return UNBOUNDED_TOKENS
    reserve = min(max(state.num_running * limits.growth_tokens, _MIN_RESERVE * capacity), _MAX_RESERVE * capacity)
    return int(capacity - state.kv_used_tokens - reserve)
