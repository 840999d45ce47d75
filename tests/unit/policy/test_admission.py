"""Room: what is pulled fits, grows, and leaves the rest where it can still be stolen."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from l4queue.cost.step import StepCost
from l4queue.models import WorkerLoad
from l4queue.policy.admission import (
    AdmissionLimits,
    WaitingRequest,
    admission_budget,
    admit,
    max_prefill_ms,
    pull_delay_ms,
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


@given(
    st.integers(0, 70),
    st.integers(0, 120_000),
    st.lists(st.integers(1, 60_000), max_size=30),
    st.integers(0, 20_000),
    st.floats(0, 5000),
)
def test_what_is_pulled_fits_and_is_the_head_of_the_queue(running, used, lengths, pending, growth) -> None:
    """Slots, cache with growth and reserve, and one step of prefill are kept, except for one on an idle worker."""
    limits = AdmissionLimits(growth_tokens=growth)
    load = _load(num_running=running, kv_used_tokens=used if running else 0, context_tokens=used)
    waiting = [WaitingRequest(request_id=str(i), length_tokens=n) for i, n in enumerate(lengths)]

    room = admission_budget(replace(load, pending_prefill_tokens=pending), cost=COST, limits=limits)
    pull = admit(room, waiting)

    taken = lengths[: pull.num_requests]
    assert running + len(taken) <= 64 or not taken
    reserve = min(max(running * growth, 5000), 25_000)
    fits = sum(taken) + len(taken) * max(1, round(growth)) + load.kv_used_tokens + reserve <= 100_000 + 1
    assert fits or not taken or (running == 0 and len(taken) == 1)
    assert sum(taken[:-1]) + (pending if running else 0) <= 8192 or len(taken) <= 1
    if running == 0 and lengths:
        assert pull.num_requests >= 1
    assert pull.reason


def test_an_idle_worker_takes_one_request_whatever_its_size() -> None:
    """Else a request larger than the free share would wait for ever."""
    pull = admit(admission_budget(_load(), cost=COST), [WaitingRequest(request_id="a", length_tokens=99_000)])

    assert pull.num_requests == 1


def test_the_next_in_order_is_never_skipped() -> None:
    """A long request at the head stops the pull although a short one behind it would fit."""
    room = admission_budget(_load(num_running=2, kv_used_tokens=50_000, context_tokens=50_000), cost=COST)
    waiting = [
        WaitingRequest(request_id="a", length_tokens=60_000),
        WaitingRequest(request_id="b", length_tokens=10),
    ]

    assert admit(room, waiting).num_requests == 0
    assert admit(room, waiting).reason == "cache"
    assert admit(room, waiting[1:]).num_requests == 1


def test_each_reason_for_no_room_is_named() -> None:
    """Draining, slots, prefill, cache."""
    assert admission_budget(_load(is_draining=True), cost=COST).reason == "draining"
    assert admission_budget(_load(num_running=64), cost=COST).reason == "all slots taken"
    assert (
        admission_budget(_load(num_running=1, pending_prefill_tokens=9000), cost=COST).reason == "prefill pending"
    )
    assert admission_budget(_load(num_running=1, kv_used_tokens=99_000), cost=COST).reason == "cache full"


def test_a_worker_without_known_capacity_uses_the_cost_models_and_none_means_no_bound() -> None:
    """The worker's own figure comes first."""
    unknown = _load(kv_capacity_tokens=0, max_running=0)
    free = StepCost(alpha_ms=1.0, beta_ms=0.0, gamma_ms=0.0, pi_ms=0.0, psi_ms=0.0)

    assert admission_budget(unknown, cost=COST).kv_tokens == 95_000
    assert admission_budget(unknown, cost=COST).num_requests == 64
    assert admission_budget(unknown, cost=free).kv_tokens > 10**12
    busy = _load(num_running=1, kv_capacity_tokens=0)
    assert admission_budget(busy, cost=free).num_requests == 63


@given(
    st.integers(0, 60),
    st.integers(0, 500_000),
    st.floats(1, 5000),
    st.integers(0, 300),
    st.integers(1, 200_000),
)
def test_a_prompt_waits_exactly_where_what_runs_cannot_bear_its_prefill(
    running, context, remaining, num_waiting, length
) -> None:
    """The bound in tokens that a worker gives to Redis says what the bound in time of the simulator says."""
    cost = replace(COST, kv_capacity_tokens=0)
    load = _load(num_running=running, context_tokens=context, kv_capacity_tokens=0)
    limits = AdmissionLimits(remaining_tokens=remaining, prefill_tokens=10**9)
    room = admission_budget(load, cost=cost, limits=limits, num_waiting=num_waiting)
    bearable = max_prefill_ms(running, context, remaining_tokens=remaining, num_waiting=num_waiting, cost=cost)

    taken = admit(room, [WaitingRequest(request_id="a", length_tokens=length)]).num_requests

    is_near = abs(cost.prefill_ms(length) - bearable) <= cost.prefill_ms(1) + 1e-3 * bearable
    may = running == 0 or cost.prefill_ms(length) <= bearable
    assert bool(taken) == may or is_near or running >= 64


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
    pull = admit(
        admission_budget(_load(num_running=1), cost=COST), [WaitingRequest(request_id="a", length_tokens=90_000)]
    )
    assert pull.num_requests == 1


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
