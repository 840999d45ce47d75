"""The planner as Celery tasks; all they do is call `replan_once` and `refine_once`."""

from __future__ import annotations

import asyncio

from celery import Celery

from dispatcher.replan import refine_once, replan_once
from l4queue.config import Settings

__all__ = ("REFINE", "REPLAN", "add_tasks")

REPLAN = "l4queue.replan"
REFINE = "l4queue.refine"


def add_tasks(app: Celery, settings: Settings) -> None:
    """Register `l4queue.replan` and `l4queue.refine` with the app."""

    @app.task(name=REPLAN, ignore_result=True, acks_late=True)  # type: ignore[untyped-decorator]  # no types
    def replan() -> str:
        """One round of planning; what it returns is the planner's reason."""
        return asyncio.run(replan_once(settings))

    @app.task(name=REFINE, ignore_result=True, acks_late=True)  # type: ignore[untyped-decorator]  # no types
    def refine() -> str:
        """One look at the boundaries; what it returns is the reason."""
        return asyncio.run(refine_once(settings))
