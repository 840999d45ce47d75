"""Placement of a worker: it follows the newest plan, which gives stage, range and siblings."""

from __future__ import annotations

from typing import Any

import pytest

from l4queue.config import Settings
from l4queue.models import Plan, Routing, StagePlan
from workers.loop.placement import Placement


def _plan(version: int, **changes: Any) -> Plan:
    stages = (
        StagePlan(low_tokens=0, high_tokens=512, num_workers=1, worker_ids=("w0",)),
        StagePlan(low_tokens=512, high_tokens=None, num_workers=3, worker_ids=("w1", "w2", "w3")),
    )
    return Plan(version=version, stages=stages, reason="test", **changes)


def _placement(worker_id: str = "w1", **settings: Any) -> Placement:
    return Placement(settings=Settings(**settings), worker_id=worker_id, newcomer_stage=lambda plan: 1)


def test_only_a_newer_plan_is_followed() -> None:
    placement = _placement()
    assert placement.stage == 1  # chosen for a newcomer
    assert [placement.follow(_plan(version)) for version in (2, 1, 2, 3)] == [True, False, False, True]
    assert placement.plan.version == 3


@pytest.mark.parametrize(
    ("worker_id", "stage", "high_tokens", "num_sharers", "siblings"),
    [("w0", 0, 512, 1, ("1",)), ("w2", 1, None, 3, ("0",)), ("newcomer", 1, None, 3, ("0",))],
)
def test_the_plan_says_where_a_worker_stands(
    worker_id: str, stage: int, high_tokens: int | None, num_sharers: int, siblings: tuple[str, ...]
) -> None:
    placement = _placement(worker_id)
    assert placement.follow(_plan(1))
    found = (placement.stage, placement.high_tokens, placement.num_sharers, placement.sibling_stages)
    assert found == (stage, high_tokens, num_sharers, siblings)
    assert [placement.range_text(index) for index in range(3)] == ["0–512", "512–∞", "?"]


def test_nothing_is_stolen_or_handed_over_where_that_is_off() -> None:
    placement = _placement("w0", hand_over=False, steal_from="none")
    placement.follow(_plan(1))
    assert (placement.high_tokens, placement.sibling_stages) == (None, ())
    pushed = _placement("w0")
    pushed.follow(_plan(1, routing=Routing.LEAST_LOADED))
    assert (pushed.is_l4, pushed.sibling_stages) == (False, ())


def test_running_empty_is_a_change_once() -> None:
    placement = _placement()
    assert [placement.run_empty(wanted) for wanted in (False, True, True, False)] == [False, True, False, True]
