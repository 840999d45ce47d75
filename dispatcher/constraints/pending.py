"""Inbox entries whose constraint is being checked: kept pending, and handled once the verdict is known."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from dispatcher.constraints.checker import ConstraintChecker
from l4queue.protocol.inbox import Inbox
from l4queue.sampling import StructuredOutputs

__all__ = ("PendingChecks",)

log = logging.getLogger("l4queue.dispatcher")
_MAX_HELD = 1024  # with schemas of 64 kB each 64 MB; what comes beyond is adopted again later
_LEAST_KEEP_S = 0.05
"""Shortest period in which entries under check are claimed anew, s: no storm of calls where the claim time is
tiny."""


class PendingChecks:
    """Waits for verdicts beside routing. An entry stays pending in the inbox, so it survives this dispatcher.

    While it waits, its deliveries do not count: an end of this dispatcher meanwhile is not blamed on it. With the
    verdict known, `resume` handles the entry as one that was adopted.
    """

    def __init__(
        self,
        *,
        inbox: Inbox,
        checker: ConstraintChecker,
        resume: Callable[[bytes], Awaitable[object]],
        claim_idle_s: float,
    ) -> None:
        self._inbox = inbox
        self._checker = checker
        self._resume = resume
        self._keep_s = max(_LEAST_KEEP_S, claim_idle_s / 3)
        self._held: dict[bytes, asyncio.Task[None]] = {}
        self._retention: asyncio.Task[None] | None = None
        self._has_stopped = False

    def __contains__(self, entry_id: bytes) -> bool:
        return entry_id in self._held

    def __len__(self) -> int:
        """How many entries wait for a verdict."""
        return len(self._held)

    def hold(self, entry_id: bytes, given: StructuredOutputs) -> None:
        """Have the constraint of an entry checked, and the entry handled after that."""
        if entry_id in self._held or self._has_stopped:
            return
        is_one_too_many = len(self._held) >= _MAX_HELD
        self._held[entry_id] = asyncio.create_task(self._settle(entry_id, None if is_one_too_many else given))
        if self._retention is None or self._retention.done():
            self._retention = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """Wait no longer. Other dispatchers adopt what is held here."""
        self._has_stopped = True
        tasks = [*self._held.values(), *([self._retention] if self._retention else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._checker.close()

    async def _settle(self, entry_id: bytes, given: StructuredOutputs | None) -> None:
        try:
            await self._inbox.set_aside(entry_id)
            if given is None:
                return
            await self._checker.check(given)
        except Exception:  # it stays pending and is adopted again; routing goes on
            log.exception("a constraint could not be checked")
            return
        finally:
            del self._held[entry_id]
        try:
            await self._resume(entry_id)
        except Exception:  # the same
            log.exception("a request could not be routed after the check of its constraint")

    async def _keep(self) -> None:
        while self._held:
            await asyncio.sleep(self._keep_s)
            if self._held:
                await self._inbox.keep(list(self._held))
