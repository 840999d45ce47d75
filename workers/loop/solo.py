"""Running empty for a request of the solo queue, and keeping everybody else out meanwhile."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from l4queue.policy.solo import SoloLimits, turn_of
from l4queue.protocol.keys import SOLO_STAGE, private_queue
from workers.loop.context import WorkerContext
from workers.loop.fleet_view import FleetView
from workers.loop.lease import Lease
from workers.loop.placement import Placement
from workers.loop.report import WorkerReport
from workers.loop.sessions import Sessions
from workers.loop.writer import Writer

__all__ = ("SoloTurn",)

log = logging.getLogger("l4queue.worker")
_LIMITS = SoloLimits()
_LIMIT = 200
"""Requests that one call looks at. Chosen: it bounds how long a call keeps the server; a longer queue takes
more calls."""


class SoloTurn:
    """Decides when this worker runs empty, which others respect: they neither hand over nor push to this worker.

    What comes all the same, as from workers of an older release, is sent on to the stage of its length.
    """

    def __init__(
        self,
        context: WorkerContext,
        *,
        sessions: Sessions,
        placement: Placement,
        fleet_view: FleetView,
        lease: Lease,
        report: WorkerReport,
        writer: Writer,
    ) -> None:
        self._context = context
        self._sessions = sessions
        self._placement = placement
        self._fleet_view = fleet_view
        self._lease = lease
        self._report = report
        self._writer = writer
        self._head: str | None = None
        self._head_since_s = 0.0
        self._began_s: float | None = None  # when this worker began to run empty

    async def look(self) -> bool:
        """Whether nothing may be taken now, but from the solo queue once this worker runs nothing."""
        runs_alone = self._runs_alone()
        is_emptying = runs_alone or await self._is_our_turn()
        if self._placement.run_empty(is_emptying):
            self._lease.tell()
        if is_emptying and not runs_alone:
            await self._give_back()
        return is_emptying

    def taken(self) -> None:
        """A request of the solo queue was taken here, or none was left: the next one waits for another turn."""
        self._head = self._began_s = None

    async def send_on(self) -> bool:
        """Move what waits for this worker alone to the stages of its lengths; whether there may be more."""
        context = self._context
        own = private_queue(context.worker_id)
        call = context.calls.migrate(source=own, highs=self._placement.plan.highs, limit=_LIMIT)
        answer = await context.executor.run(call)
        if answer.num_moved:
            log.info("sent on %d requests: %s is to be empty", answer.num_moved, context.worker_id)
        return answer.num_seen == _LIMIT

    def _runs_alone(self) -> bool:
        return any(session.grant.stage == SOLO_STAGE for session in self._sessions)

    async def _is_our_turn(self) -> bool:
        context, now_s = self._context, asyncio.get_running_loop().time()
        waiting: list[str] = []
        if self._fleet_view.num_solo:
            waiting = await context.executor.run(context.reads.queue_ids(SOLO_STAGE, limit=1))
        if not waiting:
            self.taken()
            return False
        if waiting[0] != self._head:
            self._head, self._head_since_s = waiting[0], now_s
        own = replace(self._report.load(), is_emptying=self._began_s is not None)
        turn = turn_of(own, self._fleet_view.others(), waited_s=now_s - self._head_since_s, limits=_LIMITS)
        if not turn.is_ours:
            self._began_s = None
        elif self._began_s is None:
            self._began_s = now_s
            log.info("%s runs empty for %s: %s", context.worker_id, self._head, turn.reason)
        return turn.is_ours

    async def _give_back(self) -> None:
        """Requests that have not ended or moved on in time go on elsewhere, or here afterwards."""
        now_s = asyncio.get_running_loop().time()
        if self._began_s is None or now_s - self._began_s < _LIMITS.empty_s:
            return
        leaving = [session for session in self._sessions if not session.is_moving and not session.has_ended]
        await self._writer.give_back(leaving, why="makes way for a request that runs alone")
