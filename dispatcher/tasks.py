"""Celery tasks: thin shells around functions that tests call directly."""

from __future__ import annotations

import asyncio

from dispatcher.app import app
from dispatcher.replan import replan_once
from l4queue.config import load_settings

__all__ = ("replan",)


@app.task(name="l4queue.replan", ignore_result=True)  # type: ignore[untyped-decorator] # Celery is untyped
def replan() -> str:
    """Keep the plan or publish a better one."""
    return asyncio.run(replan_once(load_settings()))
