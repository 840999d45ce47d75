"""Admission: what is pulled fits, grows, and leaves the rest where it can still be stolen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from l4queue.cost.step import StepCost
from l4queue.models import WorkerLoad
from l4queue.policy.admission import (
    AdmissionBudget,
    AdmissionLimits,
    AdmissionState,
    WaitingRequest,
    admission_budget,
    admit,
    half_share,
    max_prefill_ms,
    pull_delay_ms,
    still_awaited,
)
from l4queue.policy.loads import decode_step_ms

COST = StepCost(
    alpha_ms=7.0,
    beta_ms=0.02,
    gamma_ms=4e-5,
    pi_ms=0.017,
    psi_ms=2e-6,
    kv_capacity_tokens=100_000,
    max_batched_tokens=8192,
    max_num_seqs=64,
)


def _load(**changes: object) -> WorkerLoad:
    values: dict[str, object] = {"worker_id": "w", "kv_capacity_tokens": 100_000, "max_running": 64}
    return WorkerLoad(**{**values, **changes})  # type: ignore[arg-type]  # test data by name


def _budget(load: WorkerLoad, *, cost: StepCost = COST) -> AdmissionBudget:
    return admission_budget(AdmissionState.of(load), cost=cost)


def _waiting(lengths: Sequence[int]) -> list[WaitingRequest]:
    return [WaitingRequest(request_id=str(i), length_tokens=n) for i, n in enumerate(lengths)]


LOADS = st.builds(
    _load,
    num_running=st.integers(0, 70),
    kv_used_tokens=st.integers(0, 120_000),
    context_tokens=st.integers(0, 120_000),
    pending_prefill_tokens=st.integers(0, 20_000),
    is_draining=st.sampled_from([False, False, False, True]),
)


@given(
    load=LOADS,
    longest=st.sampled_from([0, 8192, 8193, 20_000]),
    lengths=st.lists(st.integers(1, 60_000), max_size=12),
    growth=st.floats(0, 5000),
    remaining=st.none() | st.floats(1, 3000),
    num_waiting=st.floats(0, 100),
)
def test_a_take_is_what_the_conditions_say_one_request_after_the_other(
    load, longest, lengths, growth, remaining, num_waiting
) -> None:
    """The oracle states each condition by itself, in the quantity it is about: slots, ms, tokens."""
    limits = AdmissionLimits(growth_tokens=growth)
    state = AdmissionState.of(
        load, longest_prefill_tokens=longest, num_waiting=num_waiting, remaining_tokens=remaining
    )
    bearable_ms = math.inf
    if remaining is not None:
        bearable_ms = max_prefill_ms(
            load.num_running, load.context_tokens, remaining_tokens=remaining, num_waiting=num_waiting, cost=COST
        )
    in_engine = 8192 if longest > 8192 else 2 * 8192
    reserve = min(max(load.num_running * growth, 5000), 25_000)
    expected, used, prefill, is_near = 0, float(load.kv_used_tokens), 0, False
    for length in lengths:
        is_first = load.num_running == 0 and expected == 0
        needs = length + max(1, round(growth))
        has_slot = load.num_running + expected < 64 and not load.is_draining
        may_prefill = load.pending_prefill_tokens < in_engine or load.num_running == 0
        in_step = expected == 0 or prefill < min(8192, in_engine - load.pending_prefill_tokens)
        fits = used + needs + reserve <= 100_000 and load.kv_used_tokens + reserve < 100_000
        is_borne = COST.prefill_ms(length) <= bearable_ms
        edge = COST.prefill_ms(length) - bearable_ms if math.isfinite(bearable_ms) else math.inf
        is_near |= abs(edge) <= COST.prefill_ms(1) + 1e-3 * bearable_ms or abs(used + needs + reserve - 1e5) <= 1.0
        if not (has_slot and may_prefill and in_step and (is_first or (fits and is_borne))):
            break
        expected, used, prefill = expected + 1, used + needs, prefill + length

    taken = admit(admission_budget(state, cost=COST, limits=limits), _waiting(lengths))

    assert taken.request_ids == tuple(str(i) for i in range(expected)) or is_near
    assert taken.reason


@given(
    st.builds(
        AdmissionBudget,
        num_requests=st.integers(0, 5),
        kv_tokens=st.integers(0, 30),
        prefill_tokens=st.integers(0, 15),
        growth_tokens=st.integers(0, 4),
        is_idle=st.booleans(),
        reason=st.just("any"),
        longest_tokens=st.integers(2, 12),
    ),
    st.lists(st.integers(1, 9), max_size=6),
)
def test_a_take_is_refusal_and_charge_for_each_in_turn(budget, lengths) -> None:
    """As the simulator goes through its queue."""
    left, taken = budget, 0
    for length in lengths:
        if left.refusal(length) is not None:
            break
        left, taken = left.after(length), taken + 1

    found = admit(budget, _waiting(lengths))

    assert found.num_requests == taken
    assert found.reason == ("queue empty" if taken == len(lengths) else left.refusal(lengths[taken]))


@given(pending=st.integers(1, 40_000), longest=st.integers(1, 40_000))
def test_nothing_waits_beside_a_prompt_of_many_steps(pending, longest) -> None:
    """Two steps of prefill may wait in the engine; one where a prompt there takes more than that by itself."""
    longest = min(longest, pending)
    load = _load(num_running=3, pending_prefill_tokens=pending)
    budget = admission_budget(AdmissionState.of(load, longest_prefill_tokens=longest), cost=COST)

    assert (budget.num_requests > 0) == (pending < (8192 if longest > 8192 else 16_384))
    if budget.num_requests:
        assert budget.prefill_tokens <= 8192, "one step at a time"
    else:
        assert budget.reason == "prefill pending"


@given(st.lists(st.tuples(st.sampled_from(["come", "end"]), st.integers(0, 9)), max_size=40), st.integers(0, 39))
def test_a_prompt_waits_for_what_ran_when_it_began_to_and_for_nothing_else(events, begun) -> None:
    """Hand-overs come and go, and one that comes back is new."""
    running: set[tuple[int, int]] = set()
    first: set[tuple[int, int]] = set()
    awaited: frozenset[tuple[int, int]] | None = None
    for at, (what, name) in enumerate(events):
        if what == "come":
            running.add((at, name))
        else:
            running = {known for known in running if known[1] != name}
        if at == begun:
            first = set(running)
        if at >= begun:
            awaited = still_awaited(awaited, running)
            assert awaited == first & running
            budget = _budget(_load(num_running=1))
            tight = replace(budget, longest_tokens=5).without_newcomers(awaited)
            assert (tight.refusal(6) is None) == (not first & running)


@given(st.integers(0, 200), st.integers(1, 40))
def test_workers_that_take_half_their_share_in_turn_empty_the_queue(num_waiting, num_sharers) -> None:
    """Nobody takes more than half of what is there for each, rounded up; one alone takes all."""
    left, rounds = num_waiting, 0
    while left:
        share = half_share(left, num_sharers=num_sharers)
        assert 1 <= share <= (left if num_sharers == 1 else math.ceil(left / (2 * num_sharers)))
        left, rounds = left - share, rounds + 1
    assert rounds <= num_waiting


def test_an_idle_worker_takes_one_request_whatever_its_size() -> None:
    """Else a request larger than the free share would wait for ever."""
    pull = admit(_budget(_load()), _waiting([99_000]))

    assert pull.num_requests == 1


def test_the_next_in_order_is_never_skipped() -> None:
    """A long request at the head stops the pull although a short one behind it would fit."""
    room = _budget(_load(num_running=2, kv_used_tokens=50_000, context_tokens=50_000))
    waiting = _waiting([60_000, 10])

    assert admit(room, waiting).num_requests == 0
    assert admit(room, waiting).reason == "cache"
    assert admit(room, waiting[1:]).num_requests == 1


def test_each_reason_for_no_room_is_named() -> None:
    """Draining, slots, prefill, cache."""
    assert _budget(_load(is_draining=True)).reason == "draining"
    assert _budget(_load(num_running=64)).reason == "all slots taken"
    assert _budget(_load(num_running=1, pending_prefill_tokens=17_000)).reason == "prefill pending"
    assert _budget(_load(num_running=1, kv_used_tokens=99_000)).reason == "cache full"
    assert _budget(_load(num_running=1)).reason == "room"
    assert _budget(_load()).reason == "idle"


def test_a_worker_without_known_capacity_uses_the_cost_models_and_none_means_no_bound() -> None:
    """The worker's own figure comes first."""
    unknown = _load(kv_capacity_tokens=0, max_running=0)
    free = StepCost(alpha_ms=1.0, beta_ms=0.0, gamma_ms=0.0, pi_ms=0.0, psi_ms=0.0)

    assert _budget(unknown, cost=COST).kv_tokens == 95_000
    assert _budget(unknown, cost=COST).num_requests == 64
    assert _budget(unknown, cost=free).kv_tokens > 10**12
    busy = _load(num_running=1, kv_capacity_tokens=0)
    assert _budget(busy, cost=free).num_requests == 63


@given(st.integers(1, 60), st.integers(0, 100_000), st.floats(1, 1000), st.integers(0, 1000))
def test_short_prompts_never_wait_and_a_long_queue_fills_the_batch(
    running, context, remaining, num_waiting
) -> None:
    """What is bearable is at least four times what one request needs to end, and rises with the queue."""
    one = remaining * decode_step_ms(running, context, cost=COST)
    bearable = [
        max_prefill_ms(running, context, remaining_tokens=remaining, num_waiting=q, cost=COST)
        for q in (num_waiting, num_waiting + running * 5 + 1)
    ]
    assert 4.0 * one <= bearable[0] <= bearable[1]


def test_without_an_expectation_prompts_of_any_length_are_taken() -> None:
    """As the routings that l4 is compared with do."""
    assert admit(_budget(_load(num_running=1)), _waiting([90_000])).num_requests == 1


@given(own=st.floats(0, 1e9), more=st.floats(0, 1e9), lightest=st.floats(0, 1e9))
def test_the_one_that_gets_through_its_batch_sooner_never_gives_way_for_longer(own, more, lightest) -> None:
    pauses = [pull_delay_ms(batch, lightest_ms=lightest) for batch in (own, own + more)]
    assert 0.0 <= pauses[0] <= pauses[1] <= 50.0


def test_the_lightest_and_one_alone_give_way_to_nobody() -> None:
    """Others may be known as heavier than the worker is itself; one that knows nobody waits for nobody."""
    assert pull_delay_ms(7.0, lightest_ms=7.0) == pull_delay_ms(7.0, lightest_ms=9.0) == 0.0
    assert pull_delay_ms(7.0, lightest_ms=math.inf) == 0.0


def test_the_difference_is_what_counts() -> None:
    assert pull_delay_ms(17.0, lightest_ms=10.0) == 7.0
