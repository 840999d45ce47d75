"""Celery tasks of the planner: thin calls of `replan_once` and `refine_once`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from celery import Celery

from dispatcher.planner.rounds import refine_once, replan_once
from l4queue.config import Settings
from l4queue.errors import ServiceUnavailable

__all__ = ("REFINE", "REPLAN", "Pace", "add_tasks")

REPLAN = "l4queue.replan"
REFINE = "l4queue.refine"
_SOONEST = 0.5  # of the interval, after the end of the last round


class Pace:
    """Choice of the rounds to run: of several that piled up, one.

    By the time since the last round ended, on this process's own steady clock: whatever clocks of beat's, Redis's
    and this host say, and however long messages were on their way.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ended_s: dict[str, float] = {}

    def is_due(self, name: str, *, interval_s: float) -> bool:
        """Whether a round of this name is run now."""
        ended_s = self._ended_s.get(name)
        return ended_s is None or self._clock() - ended_s >= _SOONEST * interval_s

    def ended(self, name: str) -> None:
        """Such a round has ended."""
        self._ended_s[name] = self._clock()


def add_tasks(app: Celery, settings: Settings) -> None:
    """Register `l4queue.replan` and `l4queue.refine` with this app only: its settings are no other's."""
    pace = Pace()
    # No events: two rounds every few seconds would push the requests off Flower's page of tasks.
    options: dict[str, Any] = {"shared": False, "ignore_result": True, "acks_late": True, "send_events": False}

    @app.task(name=REPLAN, **options)  # type: ignore[untyped-decorator]  # no types
    def replan() -> str:
        """One round of planning; what it returns is the planner's reason."""
        return run(REPLAN, replan_once, settings.replan_interval_s)

    @app.task(name=REFINE, **options)  # type: ignore[untyped-decorator]  # no types
    def refine() -> str:
        """One look at the boundaries; what it returns is the reason."""
        return run(REFINE, refine_once, settings.refine_interval_s)

    def run(name: str, work: Callable[[Settings], Awaitable[str]], interval_s: float) -> str:
        if not pace.is_due(name, interval_s=interval_s):
            return "no round: one has just ended"
        try:
            return asyncio.run(_round(work, settings))
        finally:
            pace.ended(name)


async def _round(work: Callable[[Settings], Awaitable[str]], settings: Settings) -> str:
    """One round; while Redis does not serve, which its executor says in the log, the next round is as good."""
    try:
        return await work(settings)
    except ServiceUnavailable as error:
        return f"no round: {error}"
