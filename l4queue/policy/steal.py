"""Stealing from an overloaded sibling: waiting requests by the thief, running ones by ask and bid.

No decision can be undone by the next. A steal happens only if the thief's finish afterwards is earlier than the
victim's was before, which strictly lowers the later of the two. A running request never goes straight back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost
from l4queue.models import UNBOUNDED_TOKENS, WorkerLoad
from l4queue.policy.loads import StageLoad, decode_step_ms, request_work_ms, running_work_ms

__all__ = (
    "Ask",
    "Bid",
    "RunningRequest",
    "Steal",
    "StealFrom",
    "StealLimits",
    "Transfer",
    "ask",
    "bid",
    "choose_victim",
    "match",
    "steal_waiting",
)

_IDLE_PREFILL_SHARE = 0.125  # of a step: more pending prefill than this would hold decodes up


class StealFrom(StrEnum):
    """Which siblings a worker may steal from: the dial between mean and tail."""

    #: any: a short stage may take long requests, at a price
    ANY = "any"
    #: waiting requests of stages of shorter ones only, running ones of its own too: best mean, worst tail
    SHORTER = "shorter"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class StealLimits:
    """Bounds of stealing."""

    steal_from: StealFrom = StealFrom.ANY
    max_requests: int = 16
    #: running requests in motion at once, to or from one worker
    max_moves: int = 3
    cool_down_ms: int = 2000
    #: an overloaded worker's finish is at least this multiple of the asking worker's
    overload_ratio: float = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Steal:
    """How many waiting requests to take from the head of which stage's queue; None: none, for the reason."""

    stage: int | None
    num_requests: int
    benefit_ms: float
    cost_ms: float
    reason: str


def steal_waiting(
    thief: WorkerLoad,
    *,
    own: StageLoad,
    siblings: Sequence[StageLoad],
    head_tokens: Mapping[int, int],
    max_requests: int,
    expected_output_tokens: float,
    cost: StepCost,
    limits: StealLimits | None = None,
) -> Steal:
    """Steal from the sibling with the longest drain time of those for which it pays; ties to the lower stage.

    `head_tokens` holds the length of the next request of each stage's queue (the mean of the queue where it is
    missing); `max_requests` is the thief's room. With w the engine time of the request:

    - finish: the thief's own drain, with the prefill that is pending in it, + w must lie below the victim's drain,
      else the imbalance would flip
    - benefit: every request in the victim's queue moves up by one, together one drain time of the queue
    - cost: running with the request slows the thief's n requests by its prefill and (β+γ·length) a step for half
      its expected output, less what it would have slowed the victim's
    """
    limits = limits or StealLimits()
    if limits.steal_from is StealFrom.NONE or max_requests < 1:
        return _no_steal("stealing is off" if max_requests >= 1 else "no room")
    if own.queued_requests > 0:
        return _no_steal("own queue first")
    busy = thief.num_running
    thief_ms = running_work_ms(
        busy, thief.context_tokens, expected_remaining_tokens=expected_output_tokens / 2, cost=cost
    ) + cost.prefill_ms(thief.pending_prefill_tokens)
    reason = "nothing waits elsewhere"
    for victim in sorted(siblings, key=_longest_first):
        if victim.stage == own.stage or victim.queued_requests < 1:
            continue
        if limits.steal_from is StealFrom.SHORTER and victim.stage > own.stage:
            reason = "only from shorter stages"
            continue
        mean = victim.queued_tokens / victim.queued_requests
        head = head_tokens.get(victim.stage, round(mean))
        work_ms = request_work_ms(head, expected_output_tokens=expected_output_tokens, cost=cost)
        if victim.drain_ms is None:
            return Steal(
                stage=victim.stage, num_requests=1, benefit_ms=work_ms, cost_ms=0.0, reason="no workers there"
            )
        if thief_ms + work_ms >= victim.drain_ms:
            reason = "would not finish earlier"
            continue
        slow_ms = cost.prefill_ms(head) + expected_output_tokens / 2 * (cost.beta_ms + cost.gamma_ms * head)
        cost_ms = max(0.0, slow_ms * (busy - victim.running_per_worker))
        benefit_ms = victim.drain_ms
        if benefit_ms <= cost_ms:
            reason = "would slow its own requests more"
            continue
        level = work_ms * (1.0 + 1.0 / victim.num_workers)
        number = int((victim.drain_ms - thief_ms) / level) if level > 0.0 else victim.queued_requests
        number = max(1, min(number, max_requests, limits.max_requests, -(-victim.queued_requests // 2)))
        return Steal(
            stage=victim.stage,
            num_requests=number,
            benefit_ms=benefit_ms,
            cost_ms=cost_ms,
            reason="longest drain",
        )
    return _no_steal(reason)


def _longest_first(load: StageLoad) -> tuple[float, int]:
    """Sort key: no worker at all counts as the longest drain."""
    return (float("-inf") if load.drain_ms is None else -load.drain_ms, load.stage)


def _no_steal(reason: str) -> Steal:
    return Steal(stage=None, num_requests=0, benefit_ms=0.0, cost_ms=0.0, reason=reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A worker with nothing waiting anywhere offers room for running requests."""

    worker_id: str
    room_tokens: int
    num_slots: int
    num_running: int
    context_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningRequest:
    """A running request that may move, as its worker knows it. `came_from`: the worker it was moved from last.

    `held_tokens`: how many of its leading tokens other workers hold in their prefix caches, by worker; None: none.
    """

    request_id: str
    length_tokens: int
    expected_remaining_tokens: float
    came_from: str | None = None
    held_tokens: Mapping[str, int] | None = None

    def held_by(self, worker_id: str) -> int:
        """Its leading tokens that this worker holds."""
        return self.held_tokens.get(worker_id, 0) if self.held_tokens else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bid:
    """The victim's answer: this request may go to that worker, for this net gain."""

    victim_id: str
    thief_id: str
    request_id: str
    length_tokens: int
    benefit_ms: float
    cost_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A match: move the request."""

    source_id: str
    target_id: str
    request_id: str
    length_tokens: int
    reason: str


def ask(
    load: WorkerLoad,
    *,
    num_waiting_anywhere: int,
    moves_in_flight: int,
    last_move_ms: int | None,
    now_ms: int,
    cost: StepCost,
    limits: StealLimits | None = None,
) -> Ask | None:
    """Ask for running requests; None if something waits, or it takes no work, moves enough already or cools down.

    Prefill pending that fills more than an eighth of a step counts as waiting: decodes would stand behind it.
    """
    limits = limits or StealLimits()
    cooling = last_move_ms is not None and now_ms - last_move_ms < limits.cool_down_ms
    slots = (load.max_running or cost.max_num_seqs) - load.num_running
    slots = min(slots, limits.max_moves - moves_in_flight)
    capacity = load.kv_capacity_tokens or cost.kv_capacity_tokens
    room = capacity - load.kv_used_tokens if capacity else UNBOUNDED_TOKENS
    is_prefilling = load.pending_prefill_tokens > cost.max_batched_tokens * _IDLE_PREFILL_SHARE
    if num_waiting_anywhere or is_prefilling or not load.is_open or cooling or slots < 1 or room < 1:
        return None
    return Ask(
        worker_id=load.worker_id,
        room_tokens=room,
        num_slots=slots,
        num_running=load.num_running,
        context_tokens=load.context_tokens,
    )


def choose_victim(
    asker: WorkerLoad, siblings: Sequence[WorkerLoad], *, cost: StepCost, limits: StealLimits | None = None
) -> WorkerLoad | None:
    """Whom to ask for running requests: an overloaded sibling, the least busy asker that with the longest step.

    Overloaded is a step `overload_ratio` times as long as the asker's with one request more. The k-th least busy
    of all workers asks the k-th busiest of the overloaded ones (round again where these are fewer), so that
    several idle workers do not all ask the same. Ties by id. `steal_from` bounds whom one may ask.
    """
    limits = limits or StealLimits()
    if limits.steal_from is StealFrom.NONE:
        return None
    if limits.steal_from is StealFrom.SHORTER:
        siblings = [s for s in siblings if s.stage <= asker.stage]
    mean = asker.context_tokens / asker.num_running if asker.num_running else 0.0
    own_ms = decode_step_ms(asker.num_running + 1, asker.context_tokens + mean, cost=cost)
    able = [s for s in siblings if s.num_running >= 2 and s.worker_id != asker.worker_id and not s.is_draining]
    slow_ms = limits.overload_ratio * own_ms
    slow = [s for s in able if decode_step_ms(s.num_running, s.context_tokens, cost=cost) >= slow_ms]
    if not slow:
        return None
    steps = {s.worker_id: decode_step_ms(s.num_running, s.context_tokens, cost=cost) for s in (asker, *siblings)}
    own = (steps[asker.worker_id], asker.worker_id)
    rank = sum((steps[s.worker_id], s.worker_id) < own for s in siblings if s.is_open)
    slow.sort(key=lambda s: (-steps[s.worker_id], s.worker_id))
    return slow[rank % len(slow)]


def bid(
    victim: WorkerLoad,
    running: Sequence[RunningRequest],
    request: Ask,
    *,
    moves_in_flight: int,
    last_move_ms: int | None,
    now_ms: int,
    cost: StepCost,
    price: MovePrice,
    limits: StealLimits | None = None,
) -> tuple[Bid, ...]:
    """The victim's offers to one ask, best net gain first (ties by request id); empty when it is not overloaded.

    Moving a request of length l with r tokens to go gains r·(step here - step there) for itself and r·(β+γl) for
    each other request here, and costs the same to each there, the move's delay and its prefill for those there.
    A request is not offered to where it came from, if pinned, if it does not fit, or if the asking worker's step
    would become longer than the victim's. An offer takes from the room for KV caches of those after it.
    """
    limits = limits or StealLimits()
    cooling = last_move_ms is not None and now_ms - last_move_ms < limits.cool_down_ms
    if cooling or moves_in_flight >= limits.max_moves or victim.worker_id == request.worker_id:
        return ()
    here_ms = decode_step_ms(victim.num_running, victim.context_tokens, cost=cost)
    idle_ms = decode_step_ms(max(1, request.num_running), request.context_tokens, cost=cost)
    if victim.num_running < 2 or here_ms < limits.overload_ratio * idle_ms:
        return ()
    chosen: list[Bid] = []
    offers = _offers(victim, running, request, cost=cost, price=price)
    while offers and len(chosen) < limits.max_moves - moves_in_flight:
        chosen.append(offers.pop(0))
        rest = price.after(chosen[-1].length_tokens)
        if rest is not price:
            price, taken = rest, {offer.request_id for offer in chosen}
            others = [item for item in running if item.request_id not in taken]
            offers = _offers(victim, others, request, cost=cost, price=price)
    return tuple(chosen)


def _offers(
    victim: WorkerLoad, running: Sequence[RunningRequest], request: Ask, *, cost: StepCost, price: MovePrice
) -> list[Bid]:
    """All moves that pay, each by itself, best net gain first."""
    here_ms = decode_step_ms(victim.num_running, victim.context_tokens, cost=cost)
    offers = []
    for item in running:
        if item.came_from == request.worker_id or item.expected_remaining_tokens <= 0.0:
            continue
        length, remaining = item.length_tokens, item.expected_remaining_tokens
        there_ms = decode_step_ms(request.num_running + 1, request.context_tokens + length, cost=cost)
        if length + remaining > request.room_tokens or there_ms >= here_ms:
            continue
        delta = cost.beta_ms + cost.gamma_ms * (length + remaining / 2)
        benefit = remaining * (here_ms - there_ms + delta * (victim.num_running - 1 - request.num_running))
        held = item.held_by(request.worker_id)
        work_ms = price.work_ms(length, cost, held_tokens=held)
        loss = price.delay_ms(length, cost, held_tokens=held) + work_ms * request.num_running
        loss += victim.copies_due_ms if price.is_sent(length) else 0.0
        if benefit > loss:
            offers.append(
                Bid(
                    victim_id=victim.worker_id,
                    thief_id=request.worker_id,
                    request_id=item.request_id,
                    length_tokens=length,
                    benefit_ms=benefit,
                    cost_ms=loss,
                )
            )
    offers.sort(key=lambda b: (b.cost_ms - b.benefit_ms, b.request_id))
    return offers


def match(
    asks: Sequence[Ask],
    bids: Sequence[Bid],
    *,
    moves_in_flight: Mapping[str, int],
    limits: StealLimits | None = None,
) -> tuple[Transfer, ...]:
    """Pair bids with asks, greatest gain first; each request once, each worker at most `max_moves` in motion.

    A bid that fits no ask is dropped; what was accepted takes room from its ask. No ask or no bid: no transfer.
    """
    limits = limits or StealLimits()
    room = {a.worker_id: a.room_tokens for a in asks}
    slots = {a.worker_id: a.num_slots for a in asks}
    moves = dict(moves_in_flight)
    moved: set[str] = set()
    transfers: list[Transfer] = []
    for offer in sorted(bids, key=lambda b: (b.cost_ms - b.benefit_ms, b.request_id, b.thief_id)):
        source, target = offer.victim_id, offer.thief_id
        if offer.request_id in moved or source == target or target not in room:
            continue
        if slots[target] < 1 or room[target] < offer.length_tokens:
            continue
        if moves.get(source, 0) >= limits.max_moves or moves.get(target, 0) >= limits.max_moves:
            continue
        moved.add(offer.request_id)
        slots[target] -= 1
        room[target] -= offer.length_tokens
        moves[source] = moves.get(source, 0) + 1
        moves[target] = moves.get(target, 0) + 1
        transfers.append(
            Transfer(
                source_id=source,
                target_id=target,
                request_id=offer.request_id,
                length_tokens=offer.length_tokens,
                reason="victim overloaded",
            )
        )
    return tuple(transfers)
