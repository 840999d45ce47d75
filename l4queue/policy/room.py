"""How much a worker may pull from its queue now: what runs needs room to grow, and steps must not get slow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from l4queue.models import WorkerLoad
from l4queue.policy.cost import StepCost

__all__ = ("Pull", "Room", "RoomLimits", "Waiting", "choose", "room_of")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoomLimits:
    """What keeps a worker from pulling more.

    `growth_tokens` is a quantile of what a request of this stage still grows; the sum over the batch is
    reserved, but at least `min_reserve` and at most `max_reserve` of the cache, since not all grow at once.
    `prefill_tokens` bounds the prompts that wait for their prefill inside the engine, where nobody can steal,
    cancel cheaply or overtake; None: one step's token budget. `max_step_ms` bounds the decode step, if set.
    """

    growth_tokens: float = 256.0
    min_reserve: float = 0.05
    max_reserve: float = 0.25
    prefill_tokens: int | None = None
    max_step_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What may be pulled: at most so many requests with together so many tokens, each with room to grow.

    `prefill_tokens` is soft: the request that exceeds it is still taken, none after it.
    """

    num_requests: int
    kv_tokens: int
    prefill_tokens: int
    growth_tokens: int
    is_idle: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A waiting request as the puller sees it: its length is prompt plus what it has generated already."""

    request_id: str
    length_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """How many of the waiting requests to take, from the head, and what stopped it."""

    num_requests: int
    tokens: int
    reason: str


def room_of(load: WorkerLoad, *, cost: StepCost, limits: RoomLimits | None = None) -> Room:
    """Room of a worker by its load. A worker with nothing to do has room for one request whatever its size.

    The capacity is the worker's own when it says one, else the cost model's; zero in both means no bound.
    """
    limits = limits or RoomLimits()
    busy = load.num_running + load.num_waiting_in_engine
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
        slots, reason = _within_step(load, slots, busy=busy, cost=cost, limits=limits)
    return Room(
        num_requests=slots,
        kv_tokens=max(0, free),
        prefill_tokens=max(0, prefill),
        growth_tokens=growth,
        is_idle=busy == 0 and slots > 0,
        reason=reason,
    )


def choose(room: Room, waiting: Sequence[Waiting]) -> Pull:
    """Take from the head while there is room. Never skips: the next in order must not starve behind small ones."""
    taken = tokens = prefill = 0
    reason = room.reason if room.num_requests == 0 else "queue empty"
    for request in waiting:
        if taken >= room.num_requests:
            reason = room.reason if room.num_requests == 0 else "slots"
            break
        if taken and prefill >= room.prefill_tokens:
            reason = "prefill budget"
            break
        needs = request.length_tokens + room.growth_tokens
        if tokens + needs > room.kv_tokens and not (room.is_idle and taken == 0):
            reason = "cache"
            break
        taken += 1
        tokens += needs
        prefill += request.length_tokens
    return Pull(num_requests=taken, tokens=tokens, reason=reason)


def _free_tokens(load: WorkerLoad, capacity: int, *, busy: int, limits: RoomLimits) -> int:
    if not capacity:
        return 2**62
    reserve = min(max(busy * limits.growth_tokens, limits.min_reserve * capacity), limits.max_reserve * capacity)
    return int(capacity - load.kv_used_tokens - reserve)


def _within_step(
    load: WorkerLoad, slots: int, *, busy: int, cost: StepCost, limits: RoomLimits
) -> tuple[int, str]:
    """Fewer slots when more requests of the present mean length would make the decode step too slow."""
    if limits.max_step_ms is None:
        return slots, "room"
    now_ms = cost.alpha_ms + cost.beta_ms * busy + cost.gamma_ms * load.context_tokens
    each_ms = cost.beta_ms + cost.gamma_ms * load.context_tokens / busy
    spare_ms = limits.max_step_ms - now_ms
    if spare_ms <= 0.0:
        return 0, "step time"
    if each_ms <= 0.0:
        return slots, "room"
    return min(slots, max(1, int(spare_ms / each_ms))), "room"
