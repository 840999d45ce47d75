"""The worker: admits, generates, writes, settles. One engine, one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Sequence
from typing import Any

from pydantic import JsonValue

from l4queue.config import Settings
from l4queue.cost.step import StepCost
from l4queue.errors import ServiceUnavailable
from l4queue.models import Plan
from l4queue.planning.histogram import Buckets, growth_fields
from l4queue.protocol.plans import read_plan
from l4queue.protocol.upkeep import Upkeep
from workers.engine.base import Engine, EngineDied, EngineOutput
from workers.engine.loop_work import LoopWork
from workers.loop.intake import Intake
from workers.loop.listener import Listener
from workers.loop.mover import Mover
from workers.loop.rollback import Rollback
from workers.loop.session import Session, TextFactory
from workers.loop.state import WorkerState
from workers.loop.task_set import TaskSet
from workers.loop.writer import Writer
from workers.telemetry.observer import Observer, RequestView
from workers.telemetry.snapshot import WorkerSnapshot

__all__ = ("Worker",)

log = logging.getLogger("l4queue.worker")
_EARLY_REFRESH_FRACTION = (
    10  # news of other stages' queues bring the next look forward to so small a part of the interval
)
_LAST_TRY_S = 1.0
_IDLE_S = 1.0  # an idle worker looks for work at least so often, should a wake-up have been missed


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
        self.settings = settings
        self.state = WorkerState(
            settings=settings,
            engine=engine,
            observer=observer,
            worker_id=worker_id,
            text=text,
            cost=cost,
            work=work,
        )
        self._engine = engine
        self._writer = Writer(self.state)
        self._rollback = Rollback(self.state)
        self._mover = Mover(self.state, self._writer)
        self._intake = Intake(
            self.state, self._writer, self._rollback, evacuate_before_prefill=self._mover.evacuate_before_prefill
        )
        self._tasks_set = TaskSet()
        self._buckets = Buckets.log_spaced(settings.max_model_len)
        self._stopping = asyncio.Event()
        self._early_refresh = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self) -> None:
        """Start the engine and serve until stopped; then give everything back. Raises EngineDied."""
        self._loop = asyncio.get_running_loop()
        state = self.state
        try:
            info = await self._engine.start()
            state.engine_started(info)
            log.info("worker %s ready: %s %s of %s", state.worker_id, info.name, info.version, info.model)
            if not self._stopping.is_set():
                await self._serve()
        finally:
            state.lease.leave()
            await self._engine.stop()
            await state.executor.close()

    def request_stop(self) -> None:
        """End `run` soon: nothing more is taken, running requests go back with their progress."""
        self._threadsafe(self._stopping.set)

    def request_cancel(self, request_id: str) -> None:
        """Cancel a request wherever it is, waiting or running."""
        self._threadsafe(self._cancel, request_id)

    def stats(self) -> dict[str, JsonValue]:
        """A snapshot for dashboards."""
        return self.state.stats()

    def figures(self) -> list[WorkerSnapshot]:
        """The same for metrics."""
        return self.state.figures()

    def active(self) -> list[RequestView]:
        """The requests running here."""
        return [self.state.view(session) for session in list(self.state.sessions.values())]

    async def _serve(self) -> None:
        state = self.state
        if not await self._has_begun():
            log.warning("stopped before Redis served: worker %s had nothing to give back", state.worker_id)
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

    async def _has_begun(self) -> bool:
        """Register with the plan in force; False where this is to stop before Redis serves."""
        begin = asyncio.create_task(self._begin())
        stop = asyncio.create_task(self._stopping.wait())
        await asyncio.wait((begin, stop), return_when=asyncio.FIRST_COMPLETED)
        has_begun = begin.done()
        await _cancel_all((begin, stop))
        if has_begun:
            await begin
        return has_begun

    async def _begin(self) -> None:
        self.state.plan = (await self.state.fleet_view.refresh()).plan
        await self.state.lease.begin()

    async def _drain(self, failure: BaseException | None) -> None:
        """Give everything back, and the lease."""
        state = self.state
        await state.lease.say()  # that it drains: nobody is to hand over to it any more
        await self._mover.finish()
        await self._tasks_set.finish()
        has_died = isinstance(failure, EngineDied)
        why = "engine died" if has_died else "worker stops"
        culprit = state.work.culprit(failure)
        await self._writer.give_back(list(state.sessions.values()), why=why, blame=has_died, culprit=culprit)
        await state.lease.end()

    async def _is_served(self) -> bool:
        """Whether Redis takes writes: then it is not what held up the drain."""
        state = self.state
        try:
            async with asyncio.timeout(_LAST_TRY_S):
                return await state.executor.offer(state.calls.retire(state.lease.incarnation)) is not None
        except (TimeoutError, ServiceUnavailable):
            return False

    async def _run_loops(self) -> BaseException | None:
        """Run until asked to stop or until a loop fails; the failure, if any."""
        state = self.state
        listener = Listener(
            executor=state.executor,
            keys=state.keys,
            worker_id=state.worker_id,
            on_wake=self._on_wake,
            on_other=self._on_other,
            on_cancel=self._on_cancel,
            on_message=self._mover.answer,
            on_plan=self._on_plan,
        )
        loops: tuple[Coroutine[Any, Any, object], ...] = (
            self._take_for_ever(),
            self._write_for_ever(),
            state.lease.keep(self._on_lost),
            listener.run(lambda: (str(state.stage), state.sibling_stages, state.lease.incarnation)),
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
            state.is_draining = True
            await _cancel_all(tasks)
        failure = next((error for task in done if (error := task.exception()) is not None), None)
        if failure is not None:
            log.error("worker %s fails: %s", state.worker_id, failure, exc_info=failure)
        return failure

    async def _take_for_ever(self) -> None:
        while True:
            self.state.nudge.clear()
            await self._rollback.look()
            has_taken = await self._intake.pull_once() > 0
            try:
                # Not wait_for: in Python 3.11 it swallows a cancellation that meets a nudge, and the drain
                # would wait for this loop for ever.
                async with asyncio.timeout(self._intake.pull_delay_s() if has_taken else _IDLE_S):
                    await self.state.nudge.wait()
            except TimeoutError:
                continue

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
        touched = []
        for output in outputs:
            session = self.state.sessions.get(output.request_id)
            if session is None:
                continue
            with self.state.work.on(session.engine_id, is_timed=False):
                session.feed(output)
            touched.append(session)
            if output.token_ids:
                upto = session.length_tokens
                grown = growth_fields(self._buckets, from_tokens=upto - len(output.token_ids), to_tokens=upto)
                self.state.lease.histogram.update(grown)
        return touched

    async def _keep_up(self) -> None:
        upkeep = Upkeep(settings=self.settings, executor=self.state.executor)
        while True:
            await upkeep.run_once(self.state.plan)
            await asyncio.sleep(upkeep.interval_s)

    async def _look_around(self) -> None:
        state, fleet_view = self.state, self.state.fleet_view
        while True:
            self._early_refresh.clear()
            await asyncio.sleep(fleet_view.interval_s / _EARLY_REFRESH_FRACTION)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(fleet_view.interval_s * (1.0 - 1.0 / _EARLY_REFRESH_FRACTION)):
                    await self._early_refresh.wait()
            overview = await fleet_view.refresh()
            self._adopt(overview.plan)  # the listener may have begun just after it was published
            await self._mover.ask_once()
            self._intake.private_due = True  # a wake-up may have been missed
            if fleet_view.num_waiting:
                state.nudge.set()  # perhaps there is something to steal

    def _on_wake(self, is_private_queue: bool) -> None:
        if is_private_queue:
            self._intake.private_due = True
            self.state.nudge.set()
        else:
            asyncio.get_running_loop().call_later(self._intake.pull_delay_s(), self.state.nudge.set)

    def _on_other(self) -> None:
        """Something waits in another stage: a worker with nothing to wait for looks whether to steal it."""
        if not self.state.sessions or self._intake.room().num_requests:
            self._early_refresh.set()

    def _on_cancel(self, request_ids: Sequence[str]) -> None:
        wanted = set(request_ids)
        self._tasks_set.start(self.state.drop([s for s in self.state.sessions.values() if s.request_id in wanted]))

    def _on_plan(self, body: str) -> None:
        plan = read_plan(body, key=self.state.keys.plans)
        if plan is not None:
            self._adopt(plan)

    def _adopt(self, plan: Plan) -> None:
        state = self.state
        if plan.version <= state.plan.version:
            return
        state.plan = plan
        self._mover.watch_anew()
        log.info("plan %d: %s serves stage %d", state.plan.version, state.worker_id, state.stage)
        state.nudge.set()

    def _on_lost(self) -> None:
        self._tasks_set.start(self.state.drop(list(self.state.sessions.values())))

    def _cancel(self, request_id: str) -> None:
        self._tasks_set.start(self.state.cancel(request_id))

    def _threadsafe(self, function: Any, *args: Any) -> None:
        if self._loop is None:
            function(*args)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)


async def _cancel_all(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel and wait. Repeated: a cancellation that coincides with the end of a read can be lost below us."""
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=0.2)
