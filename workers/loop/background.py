"""Background requests of a worker: held back beside interactive ones, given back when in their way."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from l4queue.policy.admission import AdmissionBudget
from l4queue.policy.background import (
    BackgroundLimits,
    Credit,
    RunningBackground,
    background_budget,
    give_back,
)
from l4queue.policy.queue_order import background_overdue_ms
from l4queue.protocol.records import BackgroundQuota, Grant
from workers.loop.context import WorkerContext
from workers.loop.engine_profile import EngineProfile
from workers.loop.fleet_view import FleetView
from workers.loop.placement import Placement
from workers.loop.report import WorkerReport
from workers.loop.session import Session
from workers.loop.sessions import Sessions
from workers.loop.writer import Writer

__all__ = ("BackgroundWork",)

_ALWAYS_MS = 1e15  # longer than the server's clock has run: also where none ever came to the stage


class BackgroundWork:
    """Applies the policy to what this worker runs. `no_quota` is for takes of what was meant for this worker."""

    def __init__(
        self,
        context: WorkerContext,
        *,
        sessions: Sessions,
        placement: Placement,
        profile: EngineProfile,
        fleet_view: FleetView,
        report: WorkerReport,
        writer: Writer,
    ) -> None:
        settings = context.settings
        self._context = context
        self._sessions = sessions
        self._placement = placement
        self._profile = profile
        self._fleet_view = fleet_view
        self._report = report
        self._writer = writer
        self._limits = BackgroundLimits(slowdown=settings.background_slowdown)
        self._quiet_ms = settings.background_quiet_s * 1000
        self._overdue_ms = background_overdue_ms(settings.starvation_bound_s)
        self._credit = Credit()
        self._foreground_ms = -math.inf  # when one was last seen here
        self.no_quota = BackgroundQuota(overdue_ms=self._overdue_ms)

    def hold(self, room: AdmissionBudget) -> BackgroundQuota:
        """Limit for the next take. The script knows the arrivals, this worker its running requests."""
        now_ms, running = _now_ms(), self._running()
        load, cost = self._report.load(), self._profile.cost
        self._credit = self._credit.grown(
            now_ms=now_ms, load=load, running=running, cost=cost, limits=self._limits
        )
        held = background_budget(load, room, running, credit=self._credit, cost=cost, limits=self._limits)
        return BackgroundQuota(
            for_ms=_ALWAYS_MS if self._local_quiet_ms() < self._quiet_ms else self._quiet_ms,
            max_requests=held.num_requests,
            longest_tokens=held.longest_tokens,
            overdue_ms=self._overdue_ms,
        )

    def began(self, grants: Sequence[Grant]) -> None:
        """Charge the prefills of what was taken."""
        for grant in grants:
            if grant.is_background:
                self._credit = self._credit.less(self._profile.cost.prefill_ms(grant.prompt_tokens + grant.offset))

    async def preempt_background(self) -> None:
        """Give back what stands in the way of interactive requests, if there are any."""
        running = self._running()
        if not running:
            return
        chosen = set(give_back(self._report.load(), running, cost=self._profile.cost, limits=self._limits))
        if not chosen or await self._is_quiet():
            return
        leaving = [session for session in self._sessions if session.request_id in chosen]
        await self._writer.give_back(leaving, why="makes way for interactive requests")

    async def _is_quiet(self) -> bool:
        """Whether no other request is here or came to the stage for some time."""
        context = self._context
        if self._local_quiet_ms() < self._quiet_ms:
            return False
        reads = context.reads
        now_ms, came_ms = await context.executor.run_many(
            [reads.server_time_ms(), reads.foreground_ms(str(self._placement.stage))]
        )
        return came_ms is None or now_ms - came_ms >= self._quiet_ms

    def _local_quiet_ms(self) -> float:
        """How long ago another request was last seen here."""
        if any(not session.grant.is_background for session in self._sessions):
            self._foreground_ms = _now_ms()
        return _now_ms() - self._foreground_ms

    def _running(self) -> list[RunningBackground]:
        return [self._look_at(s) for s in self._sessions if s.grant.is_background]

    def _look_at(self, session: Session) -> RunningBackground:
        is_bound = session.params.is_pinned and not session.awaits_first_token
        return RunningBackground(
            request_id=session.request_id,
            length_tokens=session.length_tokens,
            expected_remaining_tokens=self._fleet_view.expected_remaining(session),
            awaits_prefill=session.awaits_first_token,
            is_fixed=session.is_moving or session.has_ended or is_bound,
        )


def _now_ms() -> float:
    return asyncio.get_running_loop().time() * 1000
