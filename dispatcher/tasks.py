"""The planner as Celery tasks; all they do is call `replan_once` and `refine_once`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from celery import Celery

from dispatcher.replan import refine_once, replan_once
from l4queue.config import Settings
from l4queue.errors import ServiceUnavailable

__all__ = ("REFINE", "REPLAN", "add_tasks")

REPLAN = "l4queue.replan"
REFINE = "l4queue.refine"


def add_tasks(app: Celery, settings: Settings) -> None:
    """Register `l4queue.replan` and `l4queue.refine` with the app."""

    @app.task(name=REPLAN, ignore_result=True, acks_late=True)  # type: ignore[untyped-decorator]  # no types
    def replan() -> str:
        """One round of planning; what it returns is the planner's reason."""
        return asyncio.run(_round(replan_once, settings))

    @app.task(name=REFINE, ignore_result=True, acks_late=True)  # type: ignore[untyped-decorator]  # no types
    def refine() -> str:
        """One look at the boundaries; what it returns is the reason."""
        return asyncio.run(_round(refine_once, settings))


async def _round(work: Callable[[Settings], Awaitable[str]], settings: Settings) -> str:
    """One round; while Redis does not serve, which its door says in the log, the next round is as good."""
    try:
        return await work(settings)
    except ServiceUnavailable as error:
        return f"no round: {error}"
