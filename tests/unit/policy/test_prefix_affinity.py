"""Prefix affinity: the least cost decides, by an oracle; a bounded wait; ties, no holder, no room."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4queue.cost.coefficients import load_coefficients
from l4queue.cost.step import BatchShape
from l4queue.policy.admission import AdmissionBudget, unbounded_budget
from l4queue.policy.prefix_affinity import (
    CandidateWorker,
    Choice,
    QueuedPrompt,
    cost_ms,
    is_worth_telling,
    own_choices,
    patience_ms,
    place,
    saved_weight,
)

COST = load_coefficients("h100", "llama-3.1-8b")
OUTPUT = 300.0
ROOM = unbounded_budget(16, reason="slots", is_idle=False)
FULL = unbounded_budget(0, reason="prefill pending", is_idle=False)


def worker(
    name: str, *, running: int = 10, context: int = 50_000, due: float = 0.0, budget: AdmissionBudget = ROOM
) -> CandidateWorker:
    return CandidateWorker(worker_id=name, num_running=running, context_tokens=context, due_ms=due, budget=budget)


def prompt(name: str = "r", *, tokens: int = 8_000, waited: float = 0.0, **held: int) -> QueuedPrompt:
    return QueuedPrompt(request_id=name, length_tokens=tokens, waited_ms=waited, held_tokens=held)


def chosen(queue: list[QueuedPrompt], workers: list[CandidateWorker]) -> list[str | None]:
    choices = place(queue, workers, expected_output_tokens=OUTPUT, cost=COST)
    return [choice.worker_id for choice in choices]


def oracle_ms(request: QueuedPrompt, at: CandidateWorker, workers: list[CandidateWorker]) -> float:
    """The cost from steps of the cost model: a prefill, a step here with the request, what it adds to a step."""
    held = min(request.held_tokens.get(at.worker_id, 0), request.length_tokens - 1)
    new = request.length_tokens - held
    prefill = COST.pi_ms * new + COST.psi_ms * (request.length_tokens**2 - held**2) / 2

    def step(number: int, context: float) -> float:
        return COST.step_ms(BatchShape(num_decodes=number, context_tokens=context))  # type: ignore[arg-type]

    ours = step(at.num_running + 1, at.context_tokens + request.length_tokens)
    grown = step(2, request.length_tokens + OUTPUT / 2) - step(1, 0)
    own = at.due_ms + prefill + OUTPUT * ours
    return own + at.num_running * (prefill + OUTPUT * grown) * OTHERS + worth(workers) * prefill


OTHERS = 1 / 5
"""Weight of others' delays, as the docstring of `cost_ms` has it."""


def worth(workers: list[CandidateWorker]) -> float:
    """Twice the requests of a worker with this one."""
    return 2.0 + 2.0 * sum(w.num_running for w in workers) / len(workers)


_workers = st.lists(
    st.builds(
        CandidateWorker,
        worker_id=st.sampled_from("abcdefgh"),
        num_running=st.integers(0, 60),
        context_tokens=st.integers(0, 400_000),
        due_ms=st.floats(0.0, 20_000.0),
        budget=st.sampled_from([ROOM, FULL]),
    ),
    max_size=6,
    unique_by=lambda w: w.worker_id,
)
_prompts = st.builds(
    QueuedPrompt,
    request_id=st.uuids().map(str),
    length_tokens=st.integers(1, 120_000),
    waited_ms=st.floats(0.0, 30_000.0),
    held_tokens=st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 130_000)),
)


def _exact_ms(request: QueuedPrompt, worker: CandidateWorker, weight: float) -> float:
    """The cost to its last bit, which decides between nearly equal ones."""
    return cost_ms(request, worker, saved_weight=weight, expected_output_tokens=OUTPUT, cost=COST)[0]


@given(_prompts, _workers)
def test_the_worker_of_least_cost_takes_it_or_is_waited_for_within_the_bound(
    request: QueuedPrompt, workers: list[CandidateWorker]
) -> None:
    costs = {w.worker_id: oracle_ms(request, w, workers) for w in workers}
    able = {w.worker_id for w in workers if w.budget is ROOM}
    weight = saved_weight(workers)

    def prefill(name: str) -> float:
        held = min(request.held_tokens.get(name, 0), request.length_tokens - 1)
        return COST.prefill_ms(request.length_tokens, held)

    (choice,) = place([request], [replace(w) for w in workers], expected_output_tokens=OUTPUT, cost=COST)

    assert all(
        cost_ms(request, w, saved_weight=weight, expected_output_tokens=OUTPUT, cost=COST)
        == (pytest.approx(costs[w.worker_id]), pytest.approx(prefill(w.worker_id)))
        for w in workers
    )
    if not able:
        assert (choice.worker_id, choice.awaited_id) == (None, None)
        return
    least_able = min(costs[name] for name in able)
    if choice.worker_id is not None:
        assert choice.worker_id in able
        assert costs[choice.worker_id] == pytest.approx(least_able)
        if choice.reason == "has room":
            exact = {w.worker_id: _exact_ms(request, w, weight) for w in workers}
            best = min(sorted(exact), key=lambda name: exact[name])  # it is waited for, and no other
            saved = prefill(choice.worker_id) - prefill(best)
            assert request.waited_ms >= patience_ms(saved, saved_weight=weight) or saved <= 0
        return
    assert choice.awaited_id is not None
    assert choice.awaited_id not in able
    assert costs[choice.awaited_id] == pytest.approx(min(costs.values()))
    assert request.waited_ms < patience_ms(float("inf"), saved_weight=weight)


@given(st.lists(_prompts, max_size=12, unique_by=lambda r: r.request_id), _workers)
def test_each_look_is_bounded_and_gives_each_request_one_choice(
    queue: list[QueuedPrompt], workers: list[CandidateWorker]
) -> None:
    """Choices follow the queue; nothing is looked at behind one for which nobody has room."""
    room = sum(w.budget.num_requests for w in workers)
    choices = place(queue, workers, expected_output_tokens=OUTPUT, cost=COST)

    assert [c.request_id for c in choices] == [r.request_id for r in queue[: len(choices)]]
    assert sum(c.worker_id is not None for c in choices) <= room
    assert all(c.worker_id is not None or c.awaited_id is not None for c in choices[:-1])
    assert sum(c.worker_id is None for c in choices) <= 8


def test_of_equals_the_first_by_name_takes_it() -> None:
    assert chosen([prompt()], [worker("b"), worker("a")]) == ["a"]
    assert chosen([prompt(a=4_000, b=4_000)], [worker("b"), worker("a")]) == ["a"]


def test_nothing_waits_where_nobody_is_and_nobody_is_asked_where_nothing_waits() -> None:
    assert chosen([], [worker("a")]) == []
    (choice,) = place([prompt()], [], expected_output_tokens=OUTPUT, cost=COST)
    assert (choice.worker_id, choice.reason) == (None, "no room anywhere")


def test_the_holder_takes_it_though_it_is_busier_and_all_say_why() -> None:
    """With a hit of 7,000 tokens; the idler one where nobody holds anything."""
    workers = [worker("busy", running=14, context=70_000, due=100.0), worker("idle", running=8, context=40_000)]
    held, unknown = prompt("a", busy=7_000), prompt("b")

    choices = [
        place([request], [replace(w) for w in workers], expected_output_tokens=OUTPUT, cost=COST)[0]
        for request in (held, unknown)
    ]

    assert [(c.worker_id, c.reason) for c in choices] == [
        ("busy", "holds most of its prefix"),
        ("idle", "nobody holds its prefix"),
    ]


def test_a_hit_that_all_have_makes_no_difference() -> None:
    same = dict.fromkeys(("a", "b", "c"), 4_000)
    workers = [worker("a", running=12), worker("b", running=9), worker("c", running=11)]
    assert chosen([prompt(**same)], workers) == ["b"]


def test_a_request_waits_for_a_full_holder_as_long_as_that_is_worth_and_no_longer() -> None:
    """With ten requests in each engine it waits 22 times the prefill that 7,000 cached tokens save."""
    saved_ms = COST.prefill_ms(8_000) - COST.prefill_ms(8_000, 7_000)
    for waited_ms, expected in ((0.0, None), (21.9 * saved_ms, None), (22.1 * saved_ms, "free")):
        workers = [worker("full", budget=FULL), worker("free")]
        assert chosen([prompt(waited=waited_ms, full=7_000)], workers) == [expected]


def test_nobody_waits_for_a_full_worker_that_holds_no_more() -> None:
    assert chosen([prompt()], [worker("full", running=1, context=0, budget=FULL), worker("free")]) == ["free"]


def test_a_hot_prefix_goes_to_others_once_its_holder_has_much_due() -> None:
    """Each that is taken, or waits, is due there. So the holder is not the least cost for long."""
    workers = [
        worker(name, budget=unbounded_budget(64, reason="slots", is_idle=False)) for name in ("a", "b", "c")
    ]
    found = chosen([prompt(str(i), a=7_000) for i in range(60)], workers)

    assert found[0] == "a"
    assert {"b", "c"} <= set(found)

    waiting = [worker("a", budget=FULL), worker("b"), worker("c")]
    choices = place([prompt(str(i), a=7_000) for i in range(8)], waiting, expected_output_tokens=OUTPUT, cost=COST)
    assert waiting[0].due_ms == pytest.approx(
        sum(c.awaited_id == "a" for c in choices) * COST.prefill_ms(8_000, 7_000)
    )


def test_a_request_that_waits_for_its_holder_lets_others_pass_but_not_one_that_finds_no_room() -> None:
    long_one = AdmissionBudget(
        num_requests=4, kv_tokens=10_000, prefill_tokens=8_192, growth_tokens=256, is_idle=False, reason="room"
    )
    assert chosen([prompt("a", full=7_000), prompt("b")], [worker("full", budget=FULL), worker("free")]) == [
        None,
        "free",
    ]
    assert chosen([prompt("a", tokens=50_000), prompt("b")], [worker("free", budget=long_one)]) == [None]


def test_what_is_found_in_a_cache_is_not_charged_to_the_budget_of_prefill() -> None:
    room = AdmissionBudget(
        num_requests=9, kv_tokens=90_000, prefill_tokens=8_000, growth_tokens=256, is_idle=False, reason="room"
    )
    queue = [prompt(str(i), a=7_000) for i in range(9)]

    assert chosen(queue, [worker("a", budget=room)]) == ["a"] * 8 + [None]
    assert chosen([prompt(str(i)) for i in range(9)], [worker("a", budget=room)]) == ["a", None]


def taken(choices: list[Choice], budget: AdmissionBudget = ROOM, **left_ms: float) -> list[tuple[str, int, str]]:
    """What worker `a` takes of choices for prompts of which it holds 100 tokens."""
    queue = [prompt(choice.request_id, tokens=1_000, a=100) for choice in choices]
    found = own_choices(choices, queue, worker_id="a", budget=budget, left_ms=left_ms)
    return [(one.request_id, one.held_tokens, one.reason) for one in found]


def choice(name: str, worker_id: str | None, reason: str = "has room") -> Choice:
    return Choice(request_id=name, worker_id=worker_id, reason=reason)


def test_a_worker_takes_its_own_and_leaves_what_waits_or_goes_to_others() -> None:
    choices = [choice("r", "b"), choice("s", "a"), choice("t", None), choice("u", "a", "nobody holds its prefix")]
    assert taken(choices) == [("s", 100, "has room"), ("u", 100, "nobody holds its prefix")]


def test_what_others_leave_lying_is_taken_after_a_second() -> None:
    """As far as there is room. What waits for a worker does not count as left."""
    choices = [choice("r", "b"), choice("s", None), choice("t", "b")]
    assert taken(choices, r=999.0, s=9e9) == []
    assert taken(choices, r=1000.0, s=9e9, t=1000.0) == [
        ("r", 100, "left lying by others"),
        ("t", 100, "left lying by others"),
    ]
    assert [name for name, _, _ in taken(choices, replace(ROOM, num_requests=1), r=1e4, t=1e4)] == ["r"]
    assert taken(choices, FULL, r=1e4) == []


def test_own_choices_leave_less_room_for_what_lies_there() -> None:
    choices = [choice("r", "a"), choice("s", "b")]
    budget = replace(ROOM, prefill_tokens=900)
    assert [name for name, _, _ in taken(choices, budget, s=1e4)] == ["r"]


@pytest.mark.parametrize(
    ("found_share", "num_workers", "is_worth"),
    [(0.0, 2, False), (0.05, 2, True), (0.049, 2, False), (0.01, 16, True), (0.005, 16, False), (0.9, 1, False)],
)
def test_content_is_told_where_a_tenth_repeats_somewhere(
    found_share: float, num_workers: int, is_worth: bool
) -> None:
    """Of what repeats, requests that go anywhere find one part in as many as there are workers."""
    assert is_worth_telling(found_share, num_workers=num_workers) is is_worth
