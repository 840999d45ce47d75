"""Placement of a worker in the fleet: the plan it follows, its stage, and whether it takes requests."""

from __future__ import annotations

from collections.abc import Callable

from l4queue.config import Settings
from l4queue.models import Plan, Routing
from l4queue.policy.steal import StealFrom

__all__ = ("Placement",)


class Placement:
    """Follows the newest plan. Changed on the worker's event loop only; reading is safe on any thread."""

    def __init__(self, *, settings: Settings, worker_id: str, newcomer_stage: Callable[[Plan], int]) -> None:
        """`newcomer_stage` chooses a stage where the plan does not know this worker."""
        self._worker_id = worker_id
        self._newcomer_stage = newcomer_stage
        self._hands_over = settings.hand_over
        self._steals = StealFrom(settings.steal_from) is not StealFrom.NONE
        self._plan = Plan.one_stage()
        self._known_stage: int | None = None
        self._is_draining = False
        self._is_emptying = False

    def follow(self, plan: Plan) -> bool:
        """Serve by this plan from now on; False where it is no newer than the one in force."""
        if plan.version <= self._plan.version:
            return False
        self._plan, self._known_stage = plan, plan.stage_of_worker(self._worker_id)
        return True

    def drain(self) -> None:
        """Take nothing more: the worker stops."""
        self._is_draining = True

    def run_empty(self, is_emptying: bool) -> bool:
        """Begin or end to run empty for a request of the solo queue; whether that is a change."""
        is_change = is_emptying != self._is_emptying
        self._is_emptying = is_emptying
        return is_change

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self._plan

    @property
    def is_l4(self) -> bool:
        """Whether the plan routes by length: otherwise nothing is handed over or stolen."""
        return self._plan.routing is Routing.L4

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @property
    def is_emptying(self) -> bool:
        return self._is_emptying

    @property
    def stage(self) -> int:
        """Index of the stage that this worker serves."""
        return self._newcomer_stage(self._plan) if self._known_stage is None else self._known_stage

    @property
    def high_tokens(self) -> int | None:
        """Where the range of this worker's stage ends; None: nowhere, or nothing is handed over."""
        return self._plan.stages[self.stage].high_tokens if self._hands_over else None

    @property
    def sibling_stages(self) -> tuple[str, ...]:
        """Other stages whose waiting requests this worker might steal; none where nothing is stolen."""
        if not (self.is_l4 and self._steals):
            return ()
        return tuple(str(stage) for stage in range(len(self._plan.stages)) if stage != self.stage)

    @property
    def num_sharers(self) -> int:
        """Workers of this stage by the current plan; two where the plan does not say."""
        return len(self._plan.stages[self.stage].worker_ids) or 2

    def range_text(self, stage: int) -> str:
        """The range of a stage as people write it."""
        if stage >= len(self._plan.stages):
            return "?"
        found = self._plan.stages[stage]
        return f"{found.low_tokens}–{'∞' if found.high_tokens is None else found.high_tokens}"
