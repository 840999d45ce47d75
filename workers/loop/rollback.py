"""Detection of lost Redis writes: a failover to a lagging replica undoes transitions.

What a worker took, wrote or settled in that moment has not happened any more. Writes to what it no longer owns are
fenced. What Redis says it owns and it knows nothing of would never end, so it is given back, without blame.
"""

from __future__ import annotations

import asyncio
import logging

from l4queue.models import RequestState
from workers.loop.context import WorkerContext
from workers.loop.lease import Lease
from workers.loop.session import Session
from workers.loop.sessions import Sessions
from workers.loop.writer import Writer

__all__ = ("Rollback",)

log = logging.getLogger("l4queue.worker")
_AGAIN_S = 0.5
"""Time until the second look, s. Chosen: a wake-up comes within milliseconds of its lease."""


class Rollback:
    """Compares leases with sessions. Only between two takes: what is being started is in neither.

    A request that comes with a wake-up may be on its way: what is strange counts with the second look.
    """

    def __init__(
        self,
        context: WorkerContext,
        *,
        sessions: Sessions,
        lease: Lease,
        writer: Writer,
    ) -> None:
        self._context = context
        self._sessions = sessions
        self._lease = lease
        self._writer = writer
        self._due_s = 0.0
        self._strange: set[tuple[str, int]] = set()  # ids and epochs of the last look

    async def look(self) -> int:
        """Once a lease: give back what Redis holds for this worker, as before, and it does not run; how many."""
        context, now_s = self._context, asyncio.get_running_loop().time()
        if now_s < self._due_s:
            return 0
        incarnation = self._lease.incarnation
        held = await context.executor.run(context.reads.held(incarnation))
        strange = sorted(held - {session.request_id for session in self._sessions})
        records = await context.executor.run_many([context.reads.record(request_id) for request_id in strange])
        running = [r for r in records if r is not None and r.state is RequestState.RUNNING]
        before, self._strange = self._strange, {(r.request_id, r.epoch) for r in running}
        running = [r for r in running if (r.request_id, r.epoch) in before]
        lease_s = context.settings.lease_s
        self._due_s = now_s + (min(_AGAIN_S, lease_s) if self._strange else lease_s)
        calls = [context.calls.release(r.request_id, incarnation=incarnation, epoch=r.epoch) for r in running]
        await context.executor.run_many(calls)
        if running:
            log.error("Redis has lost writes: gave back %d requests that are not run here", len(running))
        return len(running)

    async def is_second(self, session: Session) -> bool:
        """Whether this lease was had before and undone. Its output could be taken for that of the first.

        Both are ended: the next lease has another epoch.
        """
        context = self._context
        first = self._sessions.get(session.engine_id)
        if first is None:
            return False
        await self._writer.drop([first])
        call = context.calls.release(
            session.request_id, incarnation=session.incarnation, epoch=session.grant.epoch
        )
        await context.executor.run(call)
        log.error("Redis has lost writes: gave back %s, which was taken before", session.request_id)
        return True
