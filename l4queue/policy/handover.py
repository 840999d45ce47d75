"""Hand-over: whether a running request that has outgrown its stage is worth moving."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost
from l4queue.models import Plan, WorkerLoad
from l4queue.policy.loads import decode_step_ms

__all__ = ("Handover", "decide_handover", "first_watch", "least_loaded", "look_again_at", "next_stage")

_EQUAL = 0.05  # loads within 5 % of the least count as equal: they are half a second old anyway
_LOOK_AGAIN = 1.5
"""Growth after which a request that stayed is weighed again, as a factor of its length. Chosen: a smaller one
weighs the same request at nearly the same length, a larger one lets a move wait that has come to pay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """The decision with what it was weighed by: time won and lost by everybody concerned, ms."""

    is_move: bool
    benefit_ms: float
    cost_ms: float
    reason: str


def decide_handover(
    length_tokens: int,
    *,
    high_tokens: int | None,
    expected_remaining_tokens: float,
    here: WorkerLoad,
    there: WorkerLoad | None,
    cost: StepCost,
    price: MovePrice,
    min_gain_ms: float = 0.0,
    ahead_here_ms: float = 0.0,
    ahead_there_ms: float = 0.0,
    held_there_tokens: int = 0,
    displaced_ms: float = 0.0,
) -> Handover:
    """Move only if the request is beyond `high`, `there` has room, and what remains repays the move.

    With δ = β + γ·length the request adds δ to each step of its batch. Moving it saves, per step still to come,
    δ to each of the others here, costs δ to each there, and changes its own step time:

        benefit = remaining · (step_here - step_there + δ·(n_here - 1 - n_there)) + held up here
        cost    = delay of the move + prefill work · requests there + held up there + displaced there

    Where a KV cache is sent, the delay begins with the copies due at either end (`WorkerLoad.copies_due_ms`).

    Held up: `ahead_here_ms` and `ahead_there_ms` are prefill that comes before what the engines run
    (`loads.prefill_ahead_ms`). A step with a chunk of it still gives a token, so the request loses no more than
    remaining · time of a full chunk. What waits for the request's end instead loses as much by it.

    `held_there_tokens` of the request are in the prefix cache there, and need no prefill. What it brings takes the
    place of other cached blocks: `displaced_ms` is what those would have saved.

    A negative benefit counts as cost. `there` is the least loaded worker of the next stage, or where else the
    request might go; None: nobody. `high_tokens` 0 weighs a move whatever the range; None: the range has no end.
    """
    if high_tokens is None or length_tokens < high_tokens:
        return Handover(is_move=False, benefit_ms=0.0, cost_ms=0.0, reason="within its range")
    if there is None or not there.is_open:
        return Handover(is_move=False, benefit_ms=0.0, cost_ms=0.0, reason="nobody to take it")
    if expected_remaining_tokens <= 0.0:
        return Handover(is_move=False, benefit_ms=0.0, cost_ms=0.0, reason="nearly finished")
    capacity = there.kv_capacity_tokens or cost.kv_capacity_tokens
    if capacity and there.kv_used_tokens + length_tokens > capacity:
        return Handover(is_move=False, benefit_ms=0.0, cost_ms=0.0, reason="no room in the cache there")
    running_there = there.num_running
    if running_there >= (there.max_running or cost.max_num_seqs):
        return Handover(is_move=False, benefit_ms=0.0, cost_ms=0.0, reason="no slot there")
    delta = cost.beta_ms + cost.gamma_ms * (length_tokens + expected_remaining_tokens / 2)
    others_here = max(0, here.num_running - 1)
    step_here = decode_step_ms(max(1, here.num_running), max(length_tokens, here.context_tokens), cost=cost)
    step_there = decode_step_ms(running_there + 1, there.context_tokens + length_tokens, cost=cost)
    benefit = expected_remaining_tokens * (step_here - step_there + delta * (others_here - running_there))
    work_ms = price.work_ms(length_tokens, cost, held_tokens=held_there_tokens)
    delay_ms = price.delay_ms(length_tokens, cost, held_tokens=held_there_tokens)
    if price.is_sent(length_tokens):
        delay_ms += max(here.copies_due_ms, there.copies_due_ms)
    loss = delay_ms + work_ms * running_there + displaced_ms
    most_ms = expected_remaining_tokens * cost.prefill_ms(cost.max_batched_tokens)
    benefit += min(ahead_here_ms, most_ms)
    loss += min(ahead_there_ms, most_ms)
    if benefit - loss <= min_gain_ms:
        return Handover(is_move=False, benefit_ms=benefit, cost_ms=loss, reason="does not repay the move")
    return Handover(is_move=True, benefit_ms=benefit, cost_ms=loss, reason="repays the move")


def least_loaded(
    workers: Sequence[WorkerLoad], *, cost: StepCost, holders: Collection[str] = ()
) -> WorkerLoad | None:
    """The worker with the least to do, by what the requests in its engine take of a step; None of none.

    Of equals one that still holds the request's prefix in its cache (`holders`), then the first by id.
    """
    able = [w for w in workers if w.is_open]
    if not able:
        return None
    busy = {w.worker_id: _busy_ms(w, cost) for w in able}
    least = min(busy.values())
    equal = [w for w in able if busy[w.worker_id] <= least * (1.0 + _EQUAL)]
    return min(equal, key=lambda w: (w.worker_id not in holders, w.worker_id))


def _busy_ms(load: WorkerLoad, cost: StepCost) -> float:
    step_ms = decode_step_ms(load.num_running, load.context_tokens, cost=cost)
    return step_ms + cost.pi_ms * load.pending_prefill_tokens


def look_again_at(length_tokens: int) -> int:
    """The length at which a request that was not worth moving is thought about again: half as long again."""
    return int(length_tokens * _LOOK_AGAIN) + 1


def first_watch(length_tokens: int, *, high_tokens: int | None, has_moved: bool) -> int | None:
    """The length at which a request that a worker begins to run is first weighed: the end of the range.

    One that was moved here beyond the range is weighed when it has grown much further. None: never.
    """
    if high_tokens is not None and has_moved and length_tokens >= high_tokens:
        return look_again_at(length_tokens)
    return high_tokens


def next_stage(stage: int, length_tokens: int, plan: Plan) -> int:
    """Where a request goes that has outgrown `stage`: to the stage of its length, at least one further."""
    return max(stage + 1, plan.stage_of(length_tokens))
