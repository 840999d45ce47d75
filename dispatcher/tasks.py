"""The planner as a Celery task; all it does is call `replan_once`."""

from __future__ import annotations

import asyncio

from celery import Celery

from dispatcher.replan import replan_once
from l4queue.config import Settings

__all__ = ("REPLAN", "add_tasks")

REPLAN = "l4queue.replan"


def add_tasks(app: Celery, settings: Settings) -> None:
    """Register `l4queue.replan` with the app."""

    @app.task(name=REPLAN, ignore_result=True, acks_late=True)  # type: ignore[untyped-decorator]  # no types
    def replan() -> str:
        """One round of planning; what it returns is the planner's reason."""
        return asyncio.run(replan_once(settings))
