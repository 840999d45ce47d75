"""Escapes: running requests that move away before a long prefill stalls them, and their targets.

A long prompt holds up everything that decodes beside it for as long as its prefill takes. Where a sibling has less
prefill before it, a running request is finished there sooner, for the price of a move. So prefill and decode part,
request by request, and only where that pays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost
from l4queue.models import WorkerLoad
from l4queue.policy.handover import decide_handover
from l4queue.policy.loads import decode_step_ms
from l4queue.policy.steal import RunningRequest, StealLimits

__all__ = (
    "MIN_PREFILL_MS",
    "REST_MS",
    "Escape",
    "EscapeTarget",
    "escapes",
    "has_prefill",
    "may_escape",
    "sample_siblings",
)

T = TypeVar("T")

MIN_PREFILL_MS = 30.0
"""Less prefill pending in the engine is not worth a look, whatever is said to wait in the queue: that is old news.
From 30 to 100 nothing changes in simulation; with 10 the short prompts of any batch set requests moving."""
REST_MS = 3000
"""A request that has moved stays for so long. From 300 to 3,000 the mean hardly changes in simulation; the moves
become fewer."""
_NUM_TARGETS = 8
"""So many siblings are looked at, drawn anew each time: all that look for the best of all, by the same old news,
would choose the same. Four give up 2 % of the mean on 16 engines in simulation, two 8 %."""
_MIN_GAIN_MS = 20.0
"""Least gain of a move, ms. Chosen: smaller gains lie within the error of a prediction; with a larger bound more
requests stay behind a prefill."""
_PREFILL_SHARE = 0.2
"""The share of its time that an engine prefills, as far as a move is weighed: what a request flees from it meets
again where it goes, and the longer it has to run the surer. From 0.1 to 0.4 little changes in simulation; with 0,
where all prompts are alike, many moves lose 2 % of the mean and 13 % of the p99."""
_DISPLACED_WEIGHT = 2.0
"""Delays of one request that a ms of cached prefill is worth which a move displaces. Of 0, 2, 5 and 20 in
simulation at 50 GB/s more finds more (17, 19, 19, 20 % of the prompts of conversations). With 20 the mean is 4 %
worse."""
_STEPS = 10.0  # the steps by which a target's batch counts beside its prefill when targets are compared


@dataclass(frozen=True, slots=True, kw_only=True)
class EscapeTarget:
    """A sibling, and the prefill before what it runs, ms (`loads.prefill_ahead_ms`)."""

    load: WorkerLoad
    ahead_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Escape:
    """Move this request there, and what that was weighed by, ms."""

    request_id: str
    target_id: str
    benefit_ms: float
    cost_ms: float


def escapes(
    running: Sequence[RunningRequest],
    *,
    here: WorkerLoad,
    ahead_ms: float,
    targets: Sequence[EscapeTarget],
    moves_in_flight: int,
    cost: StepCost,
    price: MovePrice,
    limits: StealLimits | None = None,
    reuse_share: float = 0.0,
) -> tuple[Escape, ...]:
    """The moves that pay most, each to the target with the least before it, from more prefill to less.

    `ahead_ms` is the prefill before what runs here. With less than `MIN_PREFILL_MS` in the engine nothing moves.
    A move must win more than the prefill that its request is going to meet there (`_PREFILL_SHARE`). At most
    `max_moves` are in motion from here; each move counts in the loads by which the next is weighed
    (`handover.decide_handover`), and takes from the room for KV caches. A request whose KV cache finds none stays.
    Ties by request id, and by worker id.

    `reuse_share` is the share of prompt tokens that is found in prefix caches: what a request brings to its target
    displaces blocks that would be found again as often.
    """
    left = (limits or StealLimits()).max_moves - moves_in_flight
    able = list(running)
    places = {
        target.load.worker_id: target for target in targets if target.ahead_ms < ahead_ms and target.load.is_open
    }
    if not may_escape(here.pending_prefill_tokens, cost=cost, price=price) or left < 1 or not places:
        return ()
    found: list[Escape] = []
    while able and len(found) < left:
        there = min(places.values(), key=lambda place: (_before_ms(place, cost), place.load.worker_id))
        step_ms = _step_ms(there.load, cost)
        weighed = []
        for item in able:
            if not price.is_sent(item.length_tokens):
                continue
            held = item.held_by(there.load.worker_id)
            displaced_ms = 0.0
            if reuse_share:
                displaced_ms = _DISPLACED_WEIGHT * reuse_share * cost.prefill_ms(item.length_tokens, held)
            move = decide_handover(
                item.length_tokens,
                high_tokens=0,
                expected_remaining_tokens=item.expected_remaining_tokens,
                here=here,
                there=there.load,
                cost=cost,
                price=price,
                min_gain_ms=_MIN_GAIN_MS + _PREFILL_SHARE * step_ms * item.expected_remaining_tokens,
                ahead_here_ms=ahead_ms,
                ahead_there_ms=there.ahead_ms,
                held_there_tokens=held,
                displaced_ms=displaced_ms,
            )
            if move.is_move:
                weighed.append((move.cost_ms - move.benefit_ms, item.request_id, item, move))
        if not weighed:
            break
        _, _, item, move = min(weighed, key=lambda entry: entry[:2])
        target_id = there.load.worker_id
        found.append(
            Escape(
                request_id=item.request_id,
                target_id=target_id,
                benefit_ms=move.benefit_ms,
                cost_ms=move.cost_ms,
            )
        )
        able.remove(item)
        copy_ms = price.copy_ms(item.length_tokens)
        here = _with(here, -1, -item.length_tokens, copy_ms)
        places[target_id] = replace(there, load=_with(there.load, 1, item.length_tokens, copy_ms))
        price = price.after(item.length_tokens)
    return tuple(found)


def has_prefill(pending_tokens: int, cost: StepCost) -> bool:
    """Whether so much pending in an engine is worth looking for what it holds up."""
    return cost.prefill_ms(pending_tokens) >= MIN_PREFILL_MS


def sample_siblings(others: Sequence[T], *, draw: Callable[[int, int], Iterable[int]]) -> list[T]:
    """Those of the other workers that are looked at: all of few, else some drawn anew each time.

    `draw(n, k)` gives k different whole numbers below n.
    """
    if len(others) <= _NUM_TARGETS:
        return list(others)
    return [others[index] for index in draw(len(others), _NUM_TARGETS)]


def may_escape(pending_tokens: int, *, cost: StepCost, price: MovePrice) -> bool:
    """Whether with so much pending in an engine any move can pay.

    Without a KV cache that moves none does: to prefill what fled again holds up others, whose workers let them
    flee in their turn. By news half a second old this went on without end (docs/simulator.md).
    """
    return price.bandwidth_bytes_per_s is not None and has_prefill(pending_tokens, cost)


def _before_ms(place: EscapeTarget, cost: StepCost) -> float:
    return place.ahead_ms + place.load.copies_due_ms + _STEPS * _step_ms(place.load, cost)


def _step_ms(load: WorkerLoad, cost: StepCost) -> float:
    return decode_step_ms(load.num_running, load.context_tokens, cost=cost)


def _with(load: WorkerLoad, num_requests: int, tokens: int, copy_ms: float) -> WorkerLoad:
    """The load with these requests and tokens added, and with their copy."""
    return replace(
        load,
        num_running=max(0, load.num_running + num_requests),
        context_tokens=max(0, load.context_tokens + tokens),
        kv_used_tokens=max(0, load.kv_used_tokens + tokens),
        copies_due_ms=load.copies_due_ms + copy_ms,
    )
