"""The worker: admits, generates, writes, settles. One engine, one event loop."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Coroutine, Sequence
from typing import Any

from pydantic import JsonValue

from l4queue.config import Settings
from l4queue.cost.step import StepCost
from l4queue.errors import ServiceUnavailable
from l4queue.models import Plan
from l4queue.protocol.plans import read_plan
from l4queue.protocol.upkeep import Upkeep
from workers.engine.base import Engine, EngineDied, EngineOutput, FinishReason
from workers.engine.loop_work import LoopWork
from workers.loop.background import BackgroundWork
from workers.loop.context import WorkerContext
from workers.loop.engine_profile import EngineProfile
from workers.loop.fleet_view import FleetView
from workers.loop.growth import GrowthCounts
from workers.loop.intake import Intake
from workers.loop.lease import Lease
from workers.loop.mover import Mover
from workers.loop.placement import Placement
from workers.loop.report import WorkerReport
from workers.loop.rollback import Rollback
from workers.loop.session import Session, TextFactory
from workers.loop.sessions import Sessions
from workers.loop.solo import SoloTurn
from workers.loop.task_set import TaskSet, cancel_all
from workers.loop.wakeups import Wakeup, WakeupListener
from workers.loop.writer import Writer
from workers.telemetry.observer import Observer, RequestView
from workers.telemetry.snapshot import WorkerSnapshot

__all__ = ("Worker",)

log = logging.getLogger("l4queue.worker")
placements = logging.getLogger("l4queue.placement")
_UPKEEPERS = 4.0
"""So many workers of a fleet do the upkeep of a round, drawn anew each time. Chosen: one that hangs holds nothing
up."""
_LAST_TRY_S = 1.0
"""A drain that Redis held up asks this long whether it serves again."""


class Worker:
    """Serves one stage of the current plan with one engine.

    `run` lives on one event loop; `request_stop`, `request_cancel`, `stats` and `active` may be called from
    other threads.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        engine: Engine,
        observer: Observer,
        worker_id: str,
        text: TextFactory,
        cost: StepCost,
        work: LoopWork | None = None,
    ) -> None:
        """`work` is the one that the engine marks too, if it does."""
        work = work or LoopWork()
        self.settings = settings
        self.context = context = WorkerContext.open(
            settings=settings, worker_id=worker_id, engine=engine, observer=observer, make_text=text, work=work
        )
        self.sessions = sessions = Sessions()
        self.profile = profile = EngineProfile(settings=settings, engine=engine, cost=cost)
        self.fleet_view = fleet_view = FleetView(settings=settings, executor=context.executor, worker_id=worker_id)
        self.placement = placement = Placement(
            settings=settings,
            worker_id=worker_id,
            newcomer_stage=lambda plan: fleet_view.newcomer_stage(plan, cost=profile.cost),
        )
        self._report = report = WorkerReport(
            context,
            sessions=sessions,
            placement=placement,
            profile=profile,
            incarnation=lambda: self.lease.incarnation,
        )
        self._growth = GrowthCounts(max_model_len=settings.max_model_len)
        self.lease = Lease(
            context, report=report, cost=profile.measure, price=lambda: profile.move_price, growth=self._growth
        )
        self._engine = engine
        self._connect()
        self._tasks_set = TaskSet()
        self._stopping = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def _connect(self) -> None:
        """Make the parts that act, each with those parts of the state that it reads or changes."""
        context, sessions, placement, profile = self.context, self.sessions, self.placement, self.profile
        fleet_view, lease, report = self.fleet_view, self.lease, self._report
        self._writer = writer = Writer(
            context, sessions=sessions, placement=placement, fleet_view=fleet_view, lease=lease
        )
        self._rollback = Rollback(context, sessions=sessions, lease=lease, writer=writer)
        self._mover = Mover(
            context,
            sessions=sessions,
            placement=placement,
            profile=profile,
            fleet_view=fleet_view,
            lease=lease,
            report=report,
            writer=writer,
        )
        background = BackgroundWork(
            context,
            sessions=sessions,
            placement=placement,
            profile=profile,
            fleet_view=fleet_view,
            report=report,
            writer=writer,
        )
        solo = SoloTurn(
            context,
            sessions=sessions,
            placement=placement,
            fleet_view=fleet_view,
            lease=lease,
            report=report,
            writer=writer,
        )
        self._intake = Intake(
            context,
            sessions=sessions,
            placement=placement,
            profile=profile,
            fleet_view=fleet_view,
            lease=lease,
            report=report,
            writer=writer,
            background=background,
            solo=solo,
            rollback=self._rollback,
            escape_before_prefill=self._mover.escape_before_prefill,
        )

    async def run(self) -> None:
        """Start the engine and serve until stopped; then give everything back. Raises EngineDied."""
        self._loop = asyncio.get_running_loop()
        context = self.context
        try:
            if not await self._unless_stopped(self._start_engine()):
                log.warning("stopped before its engine served: worker %s had taken nothing", context.worker_id)
            elif not self._stopping.is_set():
                await self._serve()
        finally:
            self.lease.leave()
            await self._engine.stop()
            await context.executor.close()

    def request_stop(self) -> None:
        """End `run` soon: nothing more is taken, running requests go back with their progress."""
        self._threadsafe(self._stopping.set)

    def request_cancel(self, request_id: str) -> None:
        """Cancel a request wherever it is, waiting or running."""
        self._threadsafe(self._cancel, request_id)

    def stats(self) -> dict[str, JsonValue]:
        """A snapshot for dashboards."""
        return self._report.stats()

    def snapshots(self) -> list[WorkerSnapshot]:
        """The same for metrics."""
        return self._report.snapshots()

    def active(self) -> list[RequestView]:
        """The requests running here."""
        return [session.view for session in self.sessions]

    async def _start_engine(self) -> None:
        info = await self._engine.start()
        self.profile.started(info)
        log.info("worker %s ready: %s %s of %s", self.context.worker_id, info.name, info.version, info.model)

    async def _serve(self) -> None:
        if not await self._unless_stopped(self._begin()):
            worker_id = self.context.worker_id
            log.warning("stopped before Redis served: worker %s had nothing to give back", worker_id)
            return
        failure = await self._run_loops()
        try:
            async with asyncio.timeout(self.settings.drain_s):
                await self._drain(failure)
        except TimeoutError:
            if failure is None and await self._is_served():
                raise
            log.warning(
                "not drained within %.0f s, as Redis does not serve: others go on when the lease has run out",
                self.settings.drain_s,
            )
        if failure is not None:
            raise failure

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do this to its end; False where this worker is to stop before."""
        begin = asyncio.create_task(work)
        stop = asyncio.create_task(self._stopping.wait())
        await asyncio.wait((begin, stop), return_when=asyncio.FIRST_COMPLETED)
        has_begun = begin.done()
        await cancel_all((begin, stop))
        if has_begun:
            await begin
        return has_begun

    async def _begin(self) -> None:
        """Register with the plan in force."""
        self.placement.follow((await self.fleet_view.refresh()).plan)
        await self.lease.begin()

    async def _drain(self, failure: BaseException | None) -> None:
        """Give everything back, and the lease."""
        await self.lease.say()  # that it drains: nobody is to hand over to it any more
        await self._mover.finish()
        await self._tasks_set.finish()
        has_died = isinstance(failure, EngineDied)
        has_crashed = isinstance(failure, EngineDied) and not failure.is_blameless
        why = "engine died" if has_died else "worker stops"
        culprit = self.context.work.culprit(failure)
        await self._writer.give_back(list(self.sessions), why=why, blame=has_crashed, culprit=culprit)
        await self.lease.end()

    async def _is_served(self) -> bool:
        """Whether Redis takes writes: then it is not what held up the drain."""
        context = self.context
        try:
            async with asyncio.timeout(_LAST_TRY_S):
                return await context.executor.offer(context.calls.retire(self.lease.incarnation)) is not None
        except (TimeoutError, ServiceUnavailable):
            return False

    async def _run_loops(self) -> BaseException | None:
        """Run until asked to stop or until a loop fails; the failure, if any."""
        context = self.context
        listener = WakeupListener(
            executor=context.executor,
            keys=context.keys,
            worker_id=context.worker_id,
            on_wake=self._on_wake,
            on_lease=self._intake.begin,
            on_cancel=self._on_cancel,
            on_message=self._mover.answer,
            on_plan=self._on_plan,
        )
        loops: tuple[Coroutine[Any, Any, object], ...] = (
            self._take_for_ever(),
            self._write_for_ever(),
            self.lease.keep(self._on_lost),
            listener.run(lambda: (str(self.placement.stage), self.lease.incarnation, self.fleet_view.has_older)),
            self._keep_up(),
            self._look_around(),
            self._mover.failure(),
            self._mover.escape_for_ever(),
            self._tasks_set.failure(),
            self._stopping.wait(),
        )
        tasks = [asyncio.create_task(loop) for loop in loops]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.placement.drain()
            await cancel_all(tasks)
        failure = next((error for task in done if (error := task.exception()) is not None), None)
        if failure is not None:
            log.error("worker %s fails: %s", context.worker_id, failure, exc_info=failure)
        return failure

    async def _take_for_ever(self) -> None:
        while True:
            self.sessions.begin_round()
            if not self._intake.has_leased:  # that would look strange
                await self._rollback.look()
            has_taken = await self._intake.pull_once() > 0
            try:
                # Not wait_for: in Python 3.11 it swallows a cancellation that meets a wake-up, and the drain
                # would wait for this loop for ever.
                async with asyncio.timeout(self._intake.pull_delay_s() if has_taken else self._intake.idle_s):
                    await self.sessions.woken()
            except TimeoutError:
                if not has_taken:
                    self._intake.heed(Wakeup.ANY)

    async def _write_for_ever(self) -> None:
        """Write what comes out: first tokens and ends at once, everything else once in the emit interval."""
        loop, interval_s = asyncio.get_running_loop(), self.settings.emit_interval_ms / 1000
        flushed_s, dirty = 0.0, dict[str, Session]()
        coming = asyncio.create_task(self._engine.outputs())
        try:
            while True:
                wait_s = max(0.0, flushed_s + interval_s - loop.time()) if dirty else None
                await asyncio.wait({coming}, timeout=wait_s)
                if coming.done():
                    touched = self._fold(coming.result())
                    dirty.update((session.engine_id, session) for session in touched)
                    self._mover.look(touched)
                    coming = asyncio.create_task(self._engine.outputs())
                is_due = loop.time() >= flushed_s + interval_s
                ready = [session for session in dirty.values() if is_due or session.is_urgent]
                for session in ready:
                    del dirty[session.engine_id]
                if ready:
                    await self._writer.flush(ready)
                    flushed_s = loop.time() if is_due else flushed_s
        finally:
            coming.cancel()

    def _fold(self, outputs: Sequence[EngineOutput]) -> list[Session]:
        touched, lost = [], []
        for output in outputs:
            session = self.sessions.get(output.request_id)
            if session is None:
                continue
            if output.finish_reason is FinishReason.LOST:
                lost.append(session)
                continue
            awaited_token = session.awaits_first_token
            with self.context.work.on(session.engine_id, is_timed=False):
                session.feed(output)
            touched.append(session)
            if awaited_token and not session.awaits_first_token and not self._intake.is_ready:
                self.sessions.wake()  # with less prefill before it the engine has room
            if output.cached is not None:
                self.sessions.count_cached(session, output.cached)
            if output.token_ids:
                upto = session.length_tokens
                self._growth.add(from_tokens=upto - len(output.token_ids), to_tokens=upto)
        if lost:
            self._tasks_set.start(self._writer.give_back_lost(lost))
        return touched

    async def _keep_up(self) -> None:
        upkeep = Upkeep(settings=self.settings, executor=self.context.executor)
        while True:
            if random.random() * self.fleet_view.num_workers < _UPKEEPERS:
                await upkeep.run_once(self.placement.plan)
            await asyncio.sleep(upkeep.interval_s)

    async def _look_around(self) -> None:
        fleet_view = self.fleet_view
        while True:
            overview = await fleet_view.next_look()
            self._adopt(overview.plan)  # the listener may have begun just after it was published
            await self._mover.ask_once()
            await self._intake.keep_up()
            if fleet_view.num_waiting:
                self.sessions.wake()  # perhaps there is something to steal

    def _on_wake(self, wakeup: Wakeup) -> None:
        if wakeup is not Wakeup.OTHER:
            self._intake.heed(wakeup)
            self.sessions.wake()
        elif not self.sessions or self._intake.room().num_requests:  # it looks whether to steal that
            self.fleet_view.look_soon()

    def _on_cancel(self, request_ids: Sequence[str]) -> None:
        wanted = set(request_ids)
        self._tasks_set.start(self._writer.drop([s for s in self.sessions if s.request_id in wanted]))

    def _on_plan(self, body: str) -> None:
        plan = read_plan(body, key=self.context.keys.plans)
        if plan is not None:
            self._adopt(plan)

    def _adopt(self, plan: Plan) -> None:
        if not self.placement.follow(plan):
            return
        self._mover.watch_anew()
        self._intake.look_again()
        placements.info("plan %d: %s serves stage %d", plan.version, self.context.worker_id, self.placement.stage)
        self.sessions.wake()

    def _on_lost(self) -> None:
        self._intake.look_again()
        self._tasks_set.start(self._writer.drop(list(self.sessions)))

    def _cancel(self, request_id: str) -> None:
        self._tasks_set.start(self._writer.cancel(request_id))

    def _threadsafe(self, function: Any, *args: Any) -> None:
        if self._loop is None:
            function(*args)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)
