"""Hand-over: only when the next stage has room and what remains repays the move."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4queue.cost.coefficients import load_coefficients
from l4queue.cost.move import MovePrice
from l4queue.models import WorkerLoad
from l4queue.policy.handover import Handover, decide_handover
from l4queue.policy.loads import prefill_ahead_ms

COST = load_coefficients("h100", "llama-3.1-8b")
RECOMPUTE = MovePrice()
TRANSFER = MovePrice(bandwidth_bytes_per_s=50e9)
BUSY = WorkerLoad(worker_id="a", num_running=120, context_tokens=120_000, kv_capacity_tokens=445_000)
CALM = WorkerLoad(
    worker_id="b", num_running=10, context_tokens=90_000, kv_used_tokens=90_000, kv_capacity_tokens=445_000
)


def _decide(length: int = 9000, remaining: float = 2000.0, **changes: object) -> Handover:
    values: dict[str, object] = {
        "high_tokens": 8192,
        "expected_remaining_tokens": remaining,
        "here": BUSY,
        "there": CALM,
        "cost": COST,
        "price": TRANSFER,
    }
    return decide_handover(length, **{**values, **changes})  # type: ignore[arg-type]  # test data by name


def test_a_request_that_outgrew_a_busy_stage_moves_to_a_calm_one() -> None:
    """Long enough to go, cheap enough to move."""
    decision = _decide()

    assert decision.is_move
    assert decision.benefit_ms > decision.cost_ms > 0.0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"length": 8000}, "within its range"),
        ({"high_tokens": None}, "within its range"),
        ({"there": None}, "nobody to take it"),
        ({"there": replace(CALM, is_draining=True)}, "nobody to take it"),
        ({"remaining": 0.0}, "nearly finished"),
        ({"there": replace(CALM, kv_used_tokens=440_000)}, "no room in the cache there"),
        ({"there": replace(CALM, max_running=10)}, "no slot there"),
        ({"remaining": 3.0, "price": RECOMPUTE}, "does not repay the move"),
        ({"there": replace(BUSY, worker_id="b"), "here": CALM}, "does not repay the move"),
    ],
)
def test_each_reason_to_stay_is_named(changes: dict[str, object], reason: str) -> None:
    """No move, with the reason."""
    decision = _decide(**changes)

    assert not decision.is_move
    assert decision.reason == reason


@given(st.floats(1, 20_000), st.floats(1, 20_000), st.booleans())
def test_more_remaining_output_never_turns_a_move_into_a_stay(a: float, b: float, by_recompute: bool) -> None:
    """With batches as they are the benefit grows with what remains."""
    price = RECOMPUTE if by_recompute else TRANSFER
    less, more = sorted((a, b))

    if _decide(remaining=less, price=price).is_move:
        assert _decide(remaining=more, price=price).is_move


@given(st.floats(0.0, 60_000.0), st.floats(0.0, 60_000.0), st.floats(1.0, 5_000.0))
def test_prefill_there_speaks_against_a_move_and_prefill_here_for_it(a: float, b: float, remaining: float) -> None:
    """Each holds up the request, by no more than a full chunk for every token to come."""
    little, much = sorted((a, b))
    most_ms = remaining * COST.prefill_ms(COST.max_batched_tokens)

    calm = _decide(remaining=remaining)
    there = [_decide(remaining=remaining, ahead_there_ms=ms) for ms in (little, much)]
    here = [_decide(remaining=remaining, ahead_here_ms=ms) for ms in (little, much)]

    assert there[0].is_move or not there[1].is_move
    assert here[1].is_move or not here[0].is_move
    assert there[1].cost_ms - calm.cost_ms == pytest.approx(min(much, most_ms), abs=1e-6)
    assert here[1].benefit_ms - calm.benefit_ms == pytest.approx(min(much, most_ms), abs=1e-6)


def test_prefill_ahead_is_what_pends_in_the_engine_and_a_share_of_the_queue() -> None:
    """Three prompts of 4,000 tokens for two workers, and half of one begun already."""
    ahead_ms = prefill_ahead_ms(2000, queued_requests=3, queued_tokens=12_000, num_workers=2, cost=COST)

    assert ahead_ms == pytest.approx(COST.prefill_ms(2000) + 1.5 * COST.prefill_ms(4000))
    assert prefill_ahead_ms(0, queued_requests=0, queued_tokens=0, num_workers=0, cost=COST) == 0.0


@given(st.integers(8192, 200_000))
def test_prefilling_again_costs_more_than_sending_the_cache(length: int) -> None:
    """At 50 GB/s the transfer is the cheaper way at every length."""
    assert RECOMPUTE.delay_ms(length, COST) > TRANSFER.delay_ms(length, COST)
    assert TRANSFER.work_ms(length, COST) == 0.0
    assert RECOMPUTE.work_ms(length, COST) == pytest.approx(COST.prefill_ms(length))


@pytest.mark.parametrize(("room_bytes", "as_if"), [(3000 * 131_072, TRANSFER), (3000 * 131_072 - 1, RECOMPUTE)])
def test_a_cache_without_room_is_weighed_as_the_prefill_it_will_be(room_bytes: int, as_if: MovePrice) -> None:
    """One byte decides."""
    found = [_decide(3000, price=price) for price in (replace(TRANSFER, room_bytes=room_bytes), as_if)]

    assert found[0] == found[1]


@pytest.mark.parametrize("end", ["here", "there"])
def test_a_move_waits_for_the_copies_before_it_at_the_busier_end(end: str) -> None:
    """So much later; a second prefill waits for no copy."""
    ends = {"here": replace(BUSY, copies_due_ms=30.0), "there": replace(CALM, copies_due_ms=30.0)}
    ends[end] = replace(ends[end], copies_due_ms=500.0)

    assert _decide(**ends).cost_ms == pytest.approx(_decide().cost_ms + 500.0)
    assert _decide(price=RECOMPUTE, **ends) == _decide(price=RECOMPUTE)
