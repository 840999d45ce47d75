"""Prefix affinity: which worker takes a queued request, weighed by the prefill that is really due there.

A worker that holds the beginning of a prompt in its prefix cache spares the fleet that much work. So each request
has a cost at each worker, and the least decides. Binding stays late: a request is taken only by a worker with
room. It waits for another one, such as the holder of its prefix, no longer than that is worth (delay scheduling).

Live and simulated code give the same facts: of each worker its load and what it may take, of each request the
tokens that each worker is believed to hold. Nothing here looks at a cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from l4queue.cost.step import StepCost
from l4queue.policy.admission import AdmissionBudget
from l4queue.policy.loads import decode_step_ms

__all__ = (
    "LEAST_REPEATED",
    "MAX_LOOKED_AT",
    "CandidateWorker",
    "Choice",
    "OwnChoice",
    "QueuedPrompt",
    "cost_ms",
    "is_worth_telling",
    "own_choices",
    "patience_ms",
    "place",
    "saved_weight",
)

_SAVED_PER_REQUEST = 2.0
"""Delays that a saved ms of prefill is worth, for each request that a worker has on average and for this one,
beside the delays of the requests there: later requests are spared it, too. 2 and 3 in simulation differ by 1 %
of the mean. With 0 conversations find a sixth fewer cached tokens. With 15 at any load agents are 2 % slower."""
_OTHERS_WEIGHT = 1 / 5
"""Weight of the delays that a request means to those in the engine, against its own. Of 1, 1/3, 1/5 and 1/6 in
simulation 1 costs 2 % of the mean, and 17 % of the longest 5 % of conversations, which all go where few are."""
_MAX_WAIT_MS = 20_000.0
"""Longest wait for a worker without room while another has some. Chosen: a prefill of 100k tokens takes 13 s on an
H100. With 5,000 in simulation conversations find 6 % fewer cached tokens, and the mean is 3 % worse."""
_MAX_PASSED = 8
"""Most requests that wait for a worker and are passed over by those behind them. Chosen: it bounds the work of a
look at a long queue."""


MAX_LOOKED_AT = 64
"""Most requests at the head of a queue for which a worker asks. Chosen: a worker has room for few at a time, and
at most eight requests wait for holders."""
_MISSED_MS = 1000.0
"""After so long a request that others have room for is taken by any worker that looks. Chosen: two rounds of news,
after which the others see the same as this worker."""


LEAST_REPEATED = 0.1
"""Share of prompt tokens seen before, somewhere in the fleet, from which content counts. Chosen: below it affinity
has little to win; with prompts that are all new nothing is hashed, nothing kept, and replays have no caches."""


@dataclass(slots=True, kw_only=True)
class CandidateWorker:
    """A worker as a place for queued requests.

    `due_ms` is the prefill of its prompts that have no token yet, each without what it found in the cache.
    `budget` is what it may take now (`admission.admission_budget`, by uncached tokens).
    """

    worker_id: str
    num_running: int
    context_tokens: int
    due_ms: float
    budget: AdmissionBudget


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedPrompt:
    """A queued request: prompt plus output so far, its time in the queue, and what of it workers hold.

    Workers that `held_tokens` does not name hold nothing. A number too high or too low costs time, nothing else.
    """

    request_id: str
    length_tokens: int
    waited_ms: float
    held_tokens: Mapping[str, int]

    def prefill_tokens(self, worker_id: str) -> int:
        """Tokens that this worker would have to compute: the last one is, whatever it holds."""
        return max(1, self.length_tokens - self.held_tokens.get(worker_id, 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Who takes a queued request now; None: nobody, for the reason. `awaited_id`: whom it waits for."""

    request_id: str
    worker_id: str | None
    reason: str
    awaited_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnChoice:
    """A request that one worker takes, with what it is believed to hold of it, and why."""

    request_id: str
    held_tokens: int
    reason: str


def is_worth_telling(found_share: float, *, num_workers: int) -> bool:
    """Whether the planner should learn what prompts have in common: it weighs prefix affinity by that.

    `found_share` is the share of prompt tokens that the engine has found in its cache. Requests that go anywhere
    find there one part in `num_workers` of what repeats. A lone worker has nothing to choose.
    """
    return num_workers > 1 and found_share * num_workers >= LEAST_REPEATED


def saved_weight(workers: Sequence[CandidateWorker]) -> float:
    """Delays of one request that a ms of engine time is worth: the more, the more requests each worker has."""
    num_running = sum(worker.num_running for worker in workers)
    return _SAVED_PER_REQUEST * (1.0 + num_running / max(1, len(workers)))


def cost_ms(
    request: QueuedPrompt,
    worker: CandidateWorker,
    *,
    saved_weight: float,
    expected_output_tokens: float,
    cost: StepCost,
) -> tuple[float, float]:
    """What taking the request there costs: its own time, a share of others' delays, and the work; and its prefill.

    With P its uncached prefill there, n the requests in that engine, m those in each on average, r the output to
    come and δ = β + γ·length, in ms:

        own    = prefill due there + P + r · step with n + 1
        others = n · (P + r·δ)
        cost   = own + others/5 + 2·(1 + m)·P
    """
    length, n = request.length_tokens, worker.num_running
    prefill_ms = cost.prefill_ms(length, length - request.prefill_tokens(worker.worker_id))
    step_ms = decode_step_ms(n + 1, worker.context_tokens + length, cost=cost)
    delta_ms = cost.beta_ms + cost.gamma_ms * (length + expected_output_tokens / 2)
    own_ms = worker.due_ms + prefill_ms + expected_output_tokens * step_ms
    others_ms = n * (prefill_ms + expected_output_tokens * delta_ms)
    return own_ms + _OTHERS_WEIGHT * others_ms + saved_weight * prefill_ms, prefill_ms


def patience_ms(saved_ms: float, *, saved_weight: float) -> float:
    """How long a request waits for a worker without room that saves it so much prefill, though another has room.

    Its wait delays one request, what is saved spares as many as `saved_weight`. Where nothing is saved it does not
    wait.
    """
    return min(_MAX_WAIT_MS, max(0.0, saved_weight * saved_ms))


def place(
    queue: Iterable[QueuedPrompt],
    workers: Sequence[CandidateWorker],
    *,
    expected_output_tokens: float,
    cost: StepCost,
) -> tuple[Choice, ...]:
    """A choice for each request that is looked at, in serving order; `workers` are updated by what they take.

    The worker of least cost takes a request if it has room; ties by id. Else the request waits for it, and those
    behind it may be taken before: its prefill counts as due there. When it has waited as long as that is worth
    (`patience_ms`), the best worker with room takes it. Where none has room, nothing behind it is looked at: a
    long request does not starve behind short ones.
    """
    choices: list[Choice] = []
    num_passed = 0
    by_id = sorted(workers, key=lambda worker: worker.worker_id)
    weight = saved_weight(by_id)
    for request in queue:
        choice = _choose(request, by_id, weight, expected_output_tokens, cost)
        choices.append(choice)
        if choice.worker_id is None:
            num_passed += 1
            if choice.awaited_id is None or num_passed >= _MAX_PASSED:
                break
    return tuple(choices)


def own_choices(
    choices: Iterable[Choice],
    queue: Sequence[QueuedPrompt],
    *,
    worker_id: str,
    budget: AdmissionBudget,
    left_ms: Mapping[str, float],
) -> tuple[OwnChoice, ...]:
    """What this worker takes of these choices, in serving order: its own, and what others have left lying.

    Each worker chooses by its own view. `left_ms` says for how long this one has seen a request chosen for others
    who did not take it; beyond a second it takes that, too, as far as its budget goes. So no disagreement lasts.
    """
    by_id = {request.request_id: request for request in queue}
    taken = []
    for choice in choices:
        request = by_id[choice.request_id]
        is_own = choice.worker_id == worker_id
        is_left = choice.worker_id is not None and left_ms.get(choice.request_id, 0.0) >= _MISSED_MS
        if not is_own and not (is_left and budget.refusal(request.length_tokens) is None):
            continue
        reason = choice.reason if is_own else "left lying by others"
        budget = budget.after(request.length_tokens, prefill_tokens=request.prefill_tokens(worker_id))
        held_tokens = request.held_tokens.get(worker_id, 0)
        taken.append(OwnChoice(request_id=choice.request_id, held_tokens=held_tokens, reason=reason))
    return tuple(taken)


def _choose(
    request: QueuedPrompt, workers: Sequence[CandidateWorker], weight: float, output_tokens: float, cost: StepCost
) -> Choice:
    costs = [
        (*cost_ms(request, w, saved_weight=weight, expected_output_tokens=output_tokens, cost=cost), w)
        for w in workers
    ]
    costs.sort(key=_by_cost)
    able = (entry for entry in costs if entry[2].budget.refusal(request.length_tokens) is None)
    found = next(able, None)
    if found is None:
        return Choice(request_id=request.request_id, worker_id=None, reason="no room anywhere")
    (_, best_prefill_ms, best), (_, prefill_ms, taker) = costs[0], found
    if taker is not best and request.waited_ms < patience_ms(prefill_ms - best_prefill_ms, saved_weight=weight):
        best.due_ms += best_prefill_ms
        reason = "waits for a worker that holds more of it"
        return Choice(request_id=request.request_id, worker_id=None, reason=reason, awaited_id=best.worker_id)
    tokens = request.prefill_tokens(taker.worker_id)
    taker.num_running += 1
    taker.context_tokens += request.length_tokens
    taker.due_ms += prefill_ms
    taker.budget = taker.budget.after(request.length_tokens, prefill_tokens=tokens)
    reason = _why_taken(request, taker, is_best=taker is best)
    return Choice(request_id=request.request_id, worker_id=taker.worker_id, reason=reason)


def _by_cost(entry: tuple[float, float, CandidateWorker]) -> float:
    return entry[0]


def _why_taken(request: QueuedPrompt, taker: CandidateWorker, *, is_best: bool) -> str:
    most = max(request.held_tokens.values(), default=0)
    if not is_best:
        return "has room"
    if most <= 0:
        return "nobody holds its prefix"
    held = request.held_tokens.get(taker.worker_id, 0)
    return "holds most of its prefix" if held == most else "cheaper than the holder of its prefix"
