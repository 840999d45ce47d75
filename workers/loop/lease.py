"""The worker's lease: an incarnation, renewed only while its engine makes progress or is rightly idle.

The loop renews it with its news; a thread (`workers.loop.lease_thread`) keeps it while the loop stands still.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import Callable

from l4queue.compat import FORMAT
from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost
from l4queue.errors import ServiceUnavailable
from l4queue.models import WorkerLoad
from l4queue.policy.loads import NEWS_INTERVAL_S
from l4queue.protocol.calls import Verdict
from l4queue.protocol.parsing import load_to_json, price_to_json
from l4queue.protocol.survey import brief_of
from workers.engine.base import EngineDied
from workers.engine.loop_work import lease_of
from workers.loop.context import WorkerContext
from workers.loop.growth import GrowthCounts
from workers.loop.lease_thread import LeaseThread
from workers.loop.report import WorkerReport

__all__ = ("Lease",)

log = logging.getLogger("l4queue.worker")
_LEAST_NEWS_S = 0.02
"""Shortest pause between two publications, s: changes within it go out together, 50 calls a second at most."""


class Lease:
    """Begins, renews and ends this worker's lease. `on_lost` is called when others have taken its work."""

    def __init__(
        self,
        context: WorkerContext,
        *,
        report: WorkerReport,
        cost: Callable[[], StepCost | None],
        price: Callable[[], MovePrice],
        growth: GrowthCounts,
    ) -> None:
        self._settings = settings = context.settings
        self._executor = context.executor
        self._calls = calls = context.calls
        self._worker_id = context.worker_id
        self._engine = context.engine
        self._work = work = context.work
        self._report = report
        self._cost = cost
        self._price = price
        self._growth = growth
        self._seen_steps = -1
        self._progress_s = 0.0
        self._checked_s = 0.0
        self._renewed_s = 0.0
        self._interval_s = min(settings.lease_s / 3, NEWS_INTERVAL_S)
        self._keeper = LeaseThread(
            settings=settings,
            calls=calls,
            incarnation=lambda: self.incarnation,
            renewed_s=lambda: self._renewed_s,
            work=work,
            on_lost=self.tell,
        )
        self._due = asyncio.Event()
        self.last_published: WorkerLoad | None = None  # the load that the others know
        self.incarnation = self._fresh_name()

    async def begin(self) -> None:
        """Register, and let the thread keep the lease from now on, until `end` or `leave`."""
        await self._register()
        self._keeper.start()

    async def keep(self, on_lost: Callable[[], None]) -> None:
        """Renew for ever: with each change of the load, by which siblings decide, and three times a lease.

        Raises EngineDied when the engine has stalled too long.
        """
        while True:
            await asyncio.sleep(_LEAST_NEWS_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s - _LEAST_NEWS_S):
                    await self._due.wait()
            self._check_progress()
            if self._due.is_set() or self._has_news():
                self._due.clear()
                await self._renew(on_lost)

    def _has_news(self) -> bool:
        """Whether siblings should know more, or a third of the lease passes before the next look."""
        age_s = time.monotonic() - self._renewed_s
        if age_s + self._interval_s > self._settings.lease_s / 3:
            return True
        return self._growth.has_unsent or self._report.load() != self.last_published

    async def _renew(self, on_lost: Callable[[], None]) -> None:
        """Renew once; where the lease was lost, begin a new one and say what it was lost for."""
        was_renewed_s, sent_s, incarnation = self._renewed_s, time.monotonic(), self.incarnation
        is_lost = await self._send(register=False) is Verdict.LOST
        if is_lost:
            log.warning("lease of %s lost: its requests continue elsewhere", incarnation)
            on_lost()
            await self._register()
        if is_lost or self._renewed_s - was_renewed_s > self._settings.lease_s:  # else perhaps in part
            await self._come_back(incarnation)
        self._work.forget(before_s=sent_s)

    def tell(self) -> None:
        """Renew now: the load has changed by more than siblings should overlook."""
        self._due.set()

    async def say(self) -> None:
        """Renew with the news as of now, if Redis takes them."""
        try:
            await self._send(register=False)
        except ServiceUnavailable as error:  # what follows matters more
            log.warning("news not told: %s", error)

    async def end(self) -> None:
        """Leave for good; what is still held goes back without blame."""
        await self._executor.run(self._calls.retire(self.incarnation))
        self.leave()

    def leave(self) -> None:
        """Keep the lease no longer; safe to call at any time."""
        self._keeper.stop()

    async def _register(self) -> None:
        """Begin a new incarnation."""
        self.incarnation = self._fresh_name()
        self._progress_s = self._checked_s = asyncio.get_running_loop().time()
        await self._send(register=True)

    async def _come_back(self, incarnation: str) -> None:
        """Tell that this one had not died, but for requests that had kept even the thread from renewing."""
        guilty = [lease_of(engine_id)[0] for engine_id in self._work.busy_for(self._settings.lease_s / 3)]
        await self._executor.run(self._calls.pardon(incarnation, worker_id=self._worker_id, guilty=guilty))

    def _check_progress(self) -> None:
        """An engine that has stalled too long is dead. While the loop stands still nobody sees its steps."""
        now_s, steps = asyncio.get_running_loop().time(), self._engine.stats().num_steps
        self._progress_s += max(0.0, now_s - self._checked_s - 2 * NEWS_INTERVAL_S)
        self._checked_s = now_s
        if steps != self._seen_steps or self._report.load().num_running == 0:
            self._seen_steps, self._progress_s = steps, now_s
        stalled_s = now_s - self._progress_s
        if stalled_s > self._settings.stall_limit_s:
            raise EngineDied(f"no engine step for {stalled_s:.0f} s with requests running")

    async def _send(self, *, register: bool) -> Verdict:
        sequence, histogram = self._growth.batch()
        cost = self._cost()
        load = self.last_published = self._report.load()
        news = {
            "v": FORMAT,
            **load_to_json(load),
            "cost": None if cost is None else cost.to_dict(),
            "price": price_to_json(self._price()),
        }
        verdict = await self._executor.run(
            self._calls.renew(
                self.incarnation,
                worker_id=self._worker_id,
                lease_ms=int(self._settings.lease_s * 1000),
                load=json.dumps(news),
                sequence=sequence,
                register=register,
                histogram=histogram,
                brief=brief_of(load),
                backlog_ms=self._report.work_before_ms() if load.is_open else None,
            )
        )
        self._growth.answered(is_counted=verdict is Verdict.OK)
        if verdict is Verdict.OK:
            self._renewed_s = time.monotonic()
        return verdict

    def _fresh_name(self) -> str:
        return f"{self._worker_id}:{uuid.uuid4().hex[:12]}"
