"""Background requests: never more than others bear, never none at all, and given back where that pays."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from l4queue.cost.step import StepCost
from l4queue.models import WorkerLoad
from l4queue.policy.admission import (
    AdmissionBudget,
    AdmissionState,
    BackgroundBudget,
    WaitingRequest,
    admission_budget,
    admit,
)
from l4queue.policy.background import BackgroundLimits, Credit, RunningBackground, background_budget, give_back
from l4queue.policy.loads import decode_step_ms

COST = StepCost(
    alpha_ms=7.0,
    beta_ms=0.0126,
    gamma_ms=4e-5,
    pi_ms=0.017,
    psi_ms=2e-6,
    kv_capacity_tokens=400_000,
    max_batched_tokens=8192,
    max_num_seqs=64,
)
LIMITS = BackgroundLimits()
EMPTY_MS = COST.alpha_ms + COST.beta_ms


def _load(num_running: int, context_tokens: int, **changes: object) -> WorkerLoad:
    used = min(context_tokens, 400_000)
    values = {"worker_id": "w", "kv_capacity_tokens": 400_000, "max_running": 64, "kv_used_tokens": used}
    return WorkerLoad(
        num_running=num_running,
        context_tokens=context_tokens,
        **{**values, **changes},  # type: ignore[arg-type]  # test data by name
    )


def _running(number: int, *, length: int = 800, left: float = 100.0, **more: bool) -> list[RunningBackground]:
    return [
        RunningBackground(request_id=f"b{i:03}", length_tokens=length, expected_remaining_tokens=left, **more)
        for i in range(number)
    ]


def _room(load: WorkerLoad, running: list[RunningBackground], *, credit_ms: float = 0.0) -> BackgroundBudget:
    credit = Credit(ms=credit_ms)
    return background_budget(
        load,
        admission_budget(AdmissionState.of(load), cost=COST),
        running,
        credit=credit,
        cost=COST,
        limits=LIMITS,
    )


@given(
    st.integers(0, 64),
    st.integers(0, 63),
    st.integers(1, 20_000),
    st.floats(0, 4000),
    st.integers(100, 30_000),
)
def test_taking_keeps_step_slots_and_cache_within_the_bounds(others, number, length, left, taken) -> None:
    """All but for the first one, which a worker takes wherever there is any room."""
    running = _running(number, length=length, left=left)
    load = _load(number + others, number * length + others * 300)
    room = admission_budget(AdmissionState.of(load), cost=COST)

    found = _room(load, running)

    assert found.reason
    assert found.num_requests <= 1
    assert found.num_requests <= room.num_requests
    if not running:
        assert found.num_requests == min(1, room.num_requests)
        assert found.longest_tokens == room.longest_tokens
    elif found.num_requests:
        step_ms = sum(r.step_ms(COST) for r in running) * (number + 1) / number
        assert step_ms <= LIMITS.slowdown * EMPTY_MS
        assert load.num_running + 1 <= 48
        waiting = [WaitingRequest(request_id="b", length_tokens=taken, is_background=True)]
        if admit(room, waiting, background=found).num_requests and not room.is_idle:
            assert load.kv_used_tokens + taken <= 300_000
            more = RunningBackground(request_id="b", length_tokens=taken, expected_remaining_tokens=0.0)
            assert sum(r.step_ms(COST) for r in [*running, more]) <= LIMITS.slowdown * EMPTY_MS + 1e-9


@given(st.integers(0, 60), st.integers(0, 100_000), st.integers(0, 20), st.floats(-500, 50), st.floats(0, 60_000))
def test_credit_grows_to_its_bound_and_never_shrinks(others, context, number, before_ms, later_ms) -> None:
    """With no background running it grows by the whole slowdown of an empty engine's time."""
    running = _running(number)
    load = _load(number + others, context)

    grown = Credit(ms=before_ms).grown(now_ms=later_ms, load=load, running=running, cost=COST, limits=LIMITS)

    assert before_ms <= grown.ms <= max(before_ms, LIMITS.most_credit_ms)
    assert grown.at_ms == later_ms
    if number + others == 0 and grown.ms < LIMITS.most_credit_ms:
        assert abs(grown.ms - before_ms - LIMITS.slowdown * later_ms) < 1e-6 * (1 + later_ms)


def test_a_prefill_is_paid_once_and_credit_is_no_store() -> None:
    """A debt is that of the last prefill alone; without credit nothing is taken, not even the first."""
    assert Credit(ms=30.0).less(100.0).ms == -70.0
    assert Credit(ms=-500.0).less(100.0).ms == -100.0
    assert _room(_load(0, 0), [], credit_ms=-1.0).num_requests == 0


def test_in_the_long_run_steps_and_prefills_together_stay_within_the_bound() -> None:
    """A worker that always has background to take, simulated step by step beside ten interactive requests.

    Within a tenth: the credit counts the time of a prefill as so many decode steps.
    """
    others, now_ms, spent_ms, steps = 10, 0.0, 0.0, 0
    running: list[RunningBackground] = []
    credit, most = Credit(), 0
    while now_ms < 120_000.0:
        context = others * 500 + sum(r.length_tokens for r in running)
        load = _load(others + len(running), context)
        credit = credit.grown(now_ms=now_ms, load=load, running=running, cost=COST, limits=LIMITS)
        room = admission_budget(AdmissionState.of(load), cost=COST)
        found = background_budget(load, room, running, credit=credit, cost=COST, limits=LIMITS)
        prefill_ms = 0.0
        if found.num_requests:
            prefill_ms = COST.prefill_ms(600)
            credit = credit.less(prefill_ms)
            running.append(
                RunningBackground(request_id=str(steps), length_tokens=600, expected_remaining_tokens=200.0)
            )
        base_ms = decode_step_ms(others, others * 500, cost=COST)
        added_ms = sum(COST.beta_ms + COST.gamma_ms * r.length_tokens for r in running) + prefill_ms
        now_ms += base_ms + added_ms
        spent_ms += added_ms
        steps += 1
        most = max(most, len(running))
        running = [
            replace(
                r,
                length_tokens=r.length_tokens + 1,
                expected_remaining_tokens=r.expected_remaining_tokens - 1,
            )
            for r in running
            if r.expected_remaining_tokens > 1
        ]

    assert 0.7 * LIMITS.slowdown * EMPTY_MS < spent_ms / steps <= 1.1 * LIMITS.slowdown * EMPTY_MS
    assert most >= 5


@given(
    st.lists(
        st.tuples(st.integers(1, 30_000), st.floats(0, 4000), st.booleans(), st.booleans()),
        min_size=1,
        max_size=64,
    ),
    st.integers(0, 64),
    st.integers(0, 400_000),
)
def test_giving_back_frees_slots_keeps_one_and_spares_what_would_lose(rows, others, used) -> None:
    """Those kept for newcomers become free as far as there is background; fixed ones stay; never all go."""
    running = [
        RunningBackground(
            request_id=f"{i:02}",
            length_tokens=n,
            expected_remaining_tokens=left,
            awaits_prefill=a,
            is_fixed=fixed,
        )
        for i, (n, left, a, fixed) in enumerate(rows)
    ]
    load = _load(len(running) + others, used)

    gone = give_back(load, running, cost=COST, limits=LIMITS)

    fixed = {r.request_id for r in running if r.is_fixed}
    assert len(set(gone)) == len(gone) < len(running)
    assert not fixed & set(gone)
    free = max(0, 64 - load.num_running)
    can_go = len(running) - max(1, len(fixed))
    assert free >= 8 or free + len(gone) >= min(16, free + can_go)
    needed = 16 - free if free < 8 else 0
    by_id = {r.request_id: r for r in running}
    before_tokens = used - sum(by_id[i].length_tokens for i in gone[:-1])
    left_tokens = used - sum(by_id[i].length_tokens for i in gone)
    assert left_tokens <= 300_000 or len(gone) == can_go or used <= 350_000
    if len(gone) > needed and (before_tokens <= 300_000 or used <= 350_000):  # for the step's sake
        slow_ms = sum(r.step_ms(COST) for r in running)
        assert slow_ms > LIMITS.slowdown * EMPTY_MS * LIMITS.tolerance
        last = by_id[gone[-1]]
        pays_ms = last.expected_remaining_tokens * last.step_ms(COST)
        assert last.awaits_prefill or pays_ms > COST.prefill_ms(last.length_tokens)


def test_what_was_just_taken_is_not_given_back() -> None:
    """Not for a slot either, while it still waits in the engine for its prefill."""
    running = _running(11, length=100, left=10.0)
    load = _load(47, 10_000, num_waiting_in_engine=3)
    assert _room(load, running).num_requests == 1

    after = [*running, *_running(1, length=100, left=10.0, awaits_prefill=True)]

    assert give_back(_load(48, 10_100, num_waiting_in_engine=4), after, cost=COST, limits=LIMITS) == ()


def test_short_rests_are_waited_out_and_long_ones_given_back() -> None:
    """With free slots it is a matter of price: the steps to come against one more prefill."""
    load = _load(40, 40 * 2000, max_running=64)

    assert give_back(load, _running(40, length=2000, left=100.0), cost=COST, limits=LIMITS) == ()
    gone = give_back(load, _running(40, length=2000, left=3000.0), cost=COST, limits=LIMITS)
    assert 20 < len(gone) < 40
    left = _running(40 - len(gone), length=2000, left=3000.0)
    assert sum(r.step_ms(COST) for r in left) <= LIMITS.slowdown * EMPTY_MS


@given(st.integers(1, 64), st.integers(1, 5000), st.floats(0, 3000))
def test_what_was_given_back_is_not_taken_again_at_once(number, length, left) -> None:
    """The bounds of taking lie inside those of giving back."""
    running = _running(number, length=length, left=left)
    load = _load(number, number * length)
    gone = set(give_back(load, running, cost=COST, limits=LIMITS))
    rest = [r for r in running if r.request_id not in gone]
    after = _load(len(rest), len(rest) * length)

    if gone:
        assert _room(after, rest, credit_ms=50.0).num_requests == 0
    assert not give_back(after, rest, cost=COST, limits=LIMITS)


def test_background_that_may_not_be_taken_is_passed_over() -> None:
    """Others behind it are taken; a second background one behind one that does not fit is not."""
    waiting = [
        WaitingRequest(request_id="b1", length_tokens=500, is_background=True),
        WaitingRequest(request_id="a", length_tokens=10),
        WaitingRequest(request_id="b2", length_tokens=5, is_background=True),
        WaitingRequest(request_id="c", length_tokens=10),
    ]
    room = AdmissionBudget(
        num_requests=9,
        kv_tokens=900,
        prefill_tokens=900,
        growth_tokens=1,
        is_idle=False,
        reason="",
        longest_tokens=900,
    )

    def taken(number: int, longest: int) -> tuple[str, ...]:
        background = BackgroundBudget(num_requests=number, longest_tokens=longest, reason="")
        return admit(room, waiting, background=background).request_ids

    assert admit(room, waiting).request_ids == ("b1", "a", "b2", "c")
    assert taken(0, 900) == ("a", "c")
    assert taken(1, 900) == ("b1", "a", "c")
    assert taken(9, 400) == ("a", "c")
