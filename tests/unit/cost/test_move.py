"""Price of a move: by KV cache where there is room for it, else by a second prefill."""

from __future__ import annotations

import pytest

from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost

COST = StepCost(alpha_ms=5.0, beta_ms=0.1, gamma_ms=0.0, pi_ms=0.02, psi_ms=1e-6)
SENT = MovePrice(bandwidth_bytes_per_s=1e9, kv_bytes_per_token=1_000, room_bytes=8_000_000)


def test_what_has_room_costs_its_copy() -> None:
    """8,000 tokens are 8 MB: 8 ms, and nothing for the batch there."""
    assert SENT.is_sent(8_000)
    assert SENT.delay_ms(8_000, COST) == pytest.approx(28.0)
    assert SENT.work_ms(8_000, COST) == 0.0


@pytest.mark.parametrize("held", [0, 3_000])
def test_what_has_none_costs_the_prefill_that_it_will_be(held: int) -> None:
    """As much as where no KV cache moves."""
    again = MovePrice()

    assert not SENT.is_sent(8_001)
    assert SENT.work_ms(8_001, COST, held_tokens=held) == again.work_ms(8_001, COST, held_tokens=held)
    assert SENT.delay_ms(8_001, COST, held_tokens=held) == again.delay_ms(8_001, COST, held_tokens=held) > 20.0


def test_each_move_takes_its_room_from_the_next() -> None:
    """One that is prefilled again takes none; without bound all have room."""
    rest = SENT.after(5_000)

    assert rest.is_sent(3_000)
    assert not rest.is_sent(3_001)
    assert rest.after(3_001) == rest
    assert MovePrice(bandwidth_bytes_per_s=1e9).after(10**9).is_sent(10**9)
    assert not MovePrice(room_bytes=10**9).is_sent(1)
