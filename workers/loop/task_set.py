"""Fire-and-forget tasks owned by one loop; the first failure is raised to the owner."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any, NoReturn

__all__ = ("TaskSet", "cancel_all")

log = logging.getLogger("l4queue.worker")


class TaskSet:
    """Belongs to one event loop. Its owner awaits `failure` as one more loop of its own, and ends with it."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()  # the event loop itself keeps only weak references
        self._has_failed = asyncio.Event()
        self._failure: BaseException | None = None

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Do this beside everything else."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def failure(self) -> NoReturn:
        """Wait for the first task that fails, and raise what it raised."""
        await self._has_failed.wait()
        assert self._failure is not None
        raise self._failure

    async def rest(self, *, timeout_s: float) -> None:
        """Wait for those in progress, but no longer than that; who looks at failures is `failure`."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

    async def finish(self) -> None:
        """Wait for those in progress; what fails now is only logged."""
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, BaseException):
                log.error("not finished before the end: %s", result, exc_info=result)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._failure = self._failure or error
            self._has_failed.set()


async def cancel_all(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel and wait. Repeated: a cancellation that coincides with the end of a read can be lost below us."""
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=0.2)
