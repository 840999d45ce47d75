"""Escapes: from more prefill to less, the most profitable first, never more than may be in motion."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4queue.cost.coefficients import load_coefficients
from l4queue.cost.move import MovePrice
from l4queue.models import WorkerLoad
from l4queue.policy.escape import MIN_PREFILL_MS, Escape, EscapeTarget, escapes
from l4queue.policy.handover import Handover, decide_handover
from l4queue.policy.loads import decode_step_ms
from l4queue.policy.steal import RunningRequest, StealLimits

COST = load_coefficients("h100", "llama-3.1-8b")
TRANSFER = MovePrice(bandwidth_bytes_per_s=50e9)
HERE = WorkerLoad(worker_id="here", num_running=40, context_tokens=60_000, pending_prefill_tokens=10_000)
CALM = EscapeTarget(load=WorkerLoad(worker_id="calm", num_running=10, context_tokens=15_000), ahead_ms=0.0)
ITEM = RunningRequest(request_id="a", length_tokens=1500, expected_remaining_tokens=300.0)

_items = st.builds(
    RunningRequest,
    request_id=st.uuids().map(str),
    length_tokens=st.integers(1, 100_000),
    expected_remaining_tokens=st.floats(0.0, 4000.0),
)
_escape_targets = st.builds(
    EscapeTarget,
    load=st.builds(
        WorkerLoad,
        worker_id=st.uuids().map(str),
        num_running=st.integers(0, 200),
        context_tokens=st.integers(0, 400_000),
        is_draining=st.booleans(),
    ),
    ahead_ms=st.floats(0.0, 3000.0),
)


def _escapes(
    running: list[RunningRequest],
    targets: list[EscapeTarget],
    *,
    here: WorkerLoad = HERE,
    ahead_ms: float = 400.0,
    in_flight: int = 0,
    price: MovePrice = TRANSFER,
) -> tuple[Escape, ...]:
    return escapes(
        running,
        here=here,
        ahead_ms=ahead_ms,
        targets=targets,
        moves_in_flight=in_flight,
        cost=COST,
        price=price,
    )


def _weighed(item: RunningRequest, there: EscapeTarget, *, ahead_ms: float) -> Handover:
    return decide_handover(
        item.length_tokens,
        high_tokens=0,
        expected_remaining_tokens=item.expected_remaining_tokens,
        here=HERE,
        there=there.load,
        cost=COST,
        price=TRANSFER,
        ahead_here_ms=ahead_ms,
        ahead_there_ms=there.ahead_ms,
    )


def test_what_a_long_prefill_would_hold_up_goes_to_a_calm_sibling() -> None:
    """400 ms of prefill here, none there: for the price of a transfer."""
    (escape,) = _escapes([ITEM], [CALM])

    assert (escape.request_id, escape.target_id) == ("a", "calm")
    assert escape.benefit_ms > 400.0 > escape.cost_ms


def test_each_reason_to_stay() -> None:
    """Little prefill, as much elsewhere, nobody there, nearly over, enough in motion, no KV that moves."""
    little = replace(HERE, pending_prefill_tokens=int(MIN_PREFILL_MS / COST.prefill_ms(1)) // 2)
    assert not _escapes([ITEM], [CALM], here=little)
    assert not _escapes([ITEM], [replace(CALM, ahead_ms=400.0)])
    assert not _escapes([ITEM], [])
    assert not _escapes([], [CALM])
    assert not _escapes([ITEM], [replace(CALM, load=replace(CALM.load, is_draining=True))])
    assert not _escapes([replace(ITEM, expected_remaining_tokens=0.0)], [CALM])
    assert not _escapes([ITEM], [CALM], in_flight=StealLimits().max_moves)
    assert not _escapes([ITEM], [CALM], price=MovePrice())


def test_a_sibling_that_drains_hides_no_other() -> None:
    """Though it has the least to do."""
    leaving = EscapeTarget(load=WorkerLoad(worker_id="leaving", is_draining=True), ahead_ms=0.0)

    assert [escape.target_id for escape in _escapes([ITEM], [leaving, CALM])] == ["calm"]


def test_many_that_leave_are_spread_over_equal_siblings() -> None:
    """Each move counts in the load by which the next one is weighed."""
    targets = [replace(CALM, load=replace(CALM.load, worker_id=name)) for name in ("x", "y", "z")]
    items = [replace(ITEM, request_id=name) for name in "abcde"]

    found = _escapes(items, targets)

    assert [escape.target_id for escape in found] == ["x", "y", "z"]
    assert [escape.request_id for escape in found] == ["a", "b", "c"]


@given(
    st.lists(_items, max_size=8, unique_by=lambda item: item.request_id),
    st.lists(_escape_targets, max_size=5, unique_by=lambda place: place.load.worker_id),
    st.floats(0.0, 3000.0),
    st.integers(0, 4),
    st.randoms(use_true_random=False),
)
def test_every_move_pays_and_none_is_invented(  # type: ignore[no-untyped-def]  # hypothesis' Random
    items: list[RunningRequest], targets: list[EscapeTarget], ahead_ms: float, in_flight: int, rng
) -> None:
    """Each request once, from more prefill to less, for a gain; the order of what is given does not matter."""
    found = _escapes(items, targets, ahead_ms=ahead_ms, in_flight=in_flight)

    known, places = {i.request_id for i in items}, {r.load.worker_id: r for r in targets}
    assert len({e.request_id for e in found}) == len(found) <= max(0, StealLimits().max_moves - in_flight)
    for escape in found:
        assert escape.request_id in known
        assert places[escape.target_id].ahead_ms < ahead_ms
        assert not places[escape.target_id].load.is_draining
        assert escape.benefit_ms > escape.cost_ms
    shuffled = [rng.sample(items, len(items)), rng.sample(targets, len(targets))]
    assert _escapes(*shuffled, ahead_ms=ahead_ms, in_flight=in_flight) == found


@given(st.lists(_items, min_size=1, max_size=8, unique_by=lambda item: item.request_id), _escape_targets)
def test_the_first_to_leave_gains_most(items: list[RunningRequest], refuge: EscapeTarget) -> None:
    """Against weighing every request by itself."""
    refuge = replace(refuge, load=replace(refuge.load, is_draining=False))
    found = _escapes(items, [refuge], ahead_ms=refuge.ahead_ms + 500.0)

    step_ms = decode_step_ms(refuge.load.num_running, refuge.load.context_tokens, cost=COST)
    gains_ms = [
        decision.benefit_ms - decision.cost_ms
        for item in items
        if (decision := _weighed(item, refuge, ahead_ms=refuge.ahead_ms + 500.0)).is_move
        and decision.benefit_ms - decision.cost_ms > 20.0 + 0.2 * step_ms * item.expected_remaining_tokens
    ]
    assert [escape.benefit_ms - escape.cost_ms for escape in found[:1]] == sorted(gains_ms)[-1:]


def test_what_runs_long_meets_as_much_prefill_there() -> None:
    """400 ms saved are nothing to a request of minutes whose new engine prefills a fifth of its time."""
    assert not _escapes([replace(ITEM, expected_remaining_tokens=2000.0)], [replace(CALM, load=HERE)])
    assert _escapes([replace(ITEM, expected_remaining_tokens=20.0)], [replace(CALM, load=HERE)])


def test_a_move_pays_for_what_its_target_lacks_and_for_what_it_displaces() -> None:
    """A target that holds all of the request displaces nothing; else more hits make the same move dearer."""

    def moved(item: RunningRequest, reuse_share: float) -> tuple[Escape, ...]:
        return escapes(
            [item],
            here=HERE,
            ahead_ms=400.0,
            targets=[CALM],
            moves_in_flight=0,
            cost=COST,
            price=TRANSFER,
            reuse_share=reuse_share,
        )

    plain, reused = moved(ITEM, 0.0)[0], moved(ITEM, 0.5)[0]
    held = moved(replace(ITEM, held_tokens={"calm": ITEM.length_tokens}), 0.5)[0]

    assert reused.cost_ms - plain.cost_ms == pytest.approx(COST.prefill_ms(ITEM.length_tokens))
    assert held.cost_ms == plain.cost_ms


def test_a_second_prefill_leaves_out_what_the_target_holds() -> None:
    again = MovePrice()
    there = replace(CALM.load, num_running=9)

    def loss_ms(held: int) -> float:
        found = decide_handover(
            8_000,
            high_tokens=0,
            expected_remaining_tokens=300.0,
            here=HERE,
            there=there,
            cost=COST,
            price=again,
            held_there_tokens=held,
        )
        return found.cost_ms

    saved_ms = COST.prefill_ms(8_000) - COST.prefill_ms(8_000, 6_000)
    assert loss_ms(0) - loss_ms(6_000) == pytest.approx(10 * saved_ms)


def test_what_finds_no_room_for_its_kv_cache_stays_and_each_takes_room_from_the_next() -> None:
    """Two of 4,000 tokens, then room for both, for one and for none."""
    two = [replace(ITEM, request_id=name, length_tokens=4_000) for name in ("a", "b")]
    size = 4_000 * TRANSFER.kv_bytes_per_token

    for room_bytes, names in ((2 * size, ["a", "b"]), (2 * size - 1, ["a"]), (size - 1, [])):
        found = _escapes(two, [CALM], price=replace(TRANSFER, room_bytes=room_bytes))
        assert [escape.request_id for escape in found] == names


def test_each_copy_delays_the_next_from_here() -> None:
    """Three of 4,000 tokens at 1 GB/s, 524 ms each: the second waits for one, the third for two."""
    slow = MovePrice(bandwidth_bytes_per_s=1e9)
    items = [replace(ITEM, request_id=name, length_tokens=4_000) for name in ("a", "b", "c")]
    others = [replace(CALM, load=replace(CALM.load, worker_id=name)) for name in ("x", "y", "z")]

    found = _escapes(items, others, ahead_ms=60_000.0, price=slow)

    assert len({escape.target_id for escape in found}) == 3
    waits = [escape.cost_ms - found[0].cost_ms for escape in found]
    assert waits == pytest.approx([0.0, slow.copy_ms(4_000), 2 * slow.copy_ms(4_000)])
