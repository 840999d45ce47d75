"""The objective of a deployment is that of its planner: closed form and replay."""

from __future__ import annotations

import pytest

from dispatcher.planner import rounds
from l4queue import Settings
from l4queue.cost.move import MovePrice
from l4queue.planning.steady_state import Objective


@pytest.mark.parametrize("objective", list(Objective))
def test_the_setting_reaches_the_search(objective: Objective) -> None:
    """With its service level; the setting knows each objective that there is."""
    settings = Settings(objective=objective.value, slo_ttft_ms=300.0, slo_tpot_ms=20.0, hand_over=False)

    found = rounds._planner_settings(settings, MovePrice(fixed_ms=7.0)).partition

    assert found.objective is objective
    assert (found.slo_ttft_ms, found.slo_tpot_ms) == (300.0, 20.0)
    assert (found.move_price.fixed_ms, found.moves_requests) == (7.0, False)


def test_the_default_bounds_what_long_requests_pay() -> None:
    """As the simulator's does."""
    assert rounds._planner_settings(Settings(), MovePrice()).partition.objective is Objective.BALANCED
