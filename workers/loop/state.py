"""State of a worker that its loops share, and its published view."""

from __future__ import annotations

from collections.abc import Iterable
from uuid import uuid4

from pydantic import JsonValue

from l4queue.config import Settings
from l4queue.cost.step import StepCost
from l4queue.models import RequestState, WorkerLoad
from l4queue.policy.steal import StealFrom, StealLimits
from l4queue.protocol.calls import Calls, Verdict
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.keys import Keys
from l4queue.protocol.reads import Reads
from workers.engine.base import Cut, Engine, EngineDied
from workers.engine.loop_work import LoopWork
from workers.loop.engine_profile import EngineProfile
from workers.loop.fleet_view import FleetView
from workers.loop.growth import GrowthCounts
from workers.loop.lease import Lease
from workers.loop.placement import Placement
from workers.loop.session import Session, TextFactory
from workers.loop.sessions import Sessions
from workers.telemetry.observer import LEASE_ENDED, Observer, RequestView
from workers.telemetry.snapshot import WorkerSnapshot

__all__ = ("WorkerState",)


class WorkerState:
    """The state of one worker. Changed on its event loop only; reading from other threads is safe."""

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
        self.settings = settings
        self.worker_id = worker_id
        self.engine = engine
        self.observer = observer
        self.make_text = text
        self.work = work or LoopWork()
        self.keys = Keys(settings.namespace)
        self.calls = Calls(self.keys)
        self.reads = Reads(self.keys)
        self.executor = AsyncExecutor(settings.redis_url, retry_s=None)
        self.sessions = Sessions()
        self.profile = EngineProfile(settings=settings, engine=engine, cost=cost)
        self.fleet_view = FleetView(settings=settings, executor=self.executor, worker_id=worker_id)
        self.placement = Placement(
            settings=settings,
            worker_id=worker_id,
            newcomer_stage=lambda plan: self.fleet_view.newcomer_stage(plan, cost=self.profile.cost),
        )
        self.steal_limits = StealLimits(steal_from=StealFrom(settings.steal_from))
        self.growth = GrowthCounts(max_model_len=settings.max_model_len)
        self.lease = Lease(
            settings=settings,
            executor=self.executor,
            calls=self.calls,
            worker_id=worker_id,
            load=self.load,
            cost=self.profile.measure,
            price=lambda: self.profile.move_price,
            num_steps=lambda: engine.stats().num_steps,
            work=self.work,
            growth=self.growth,
        )

    async def abort(self, sessions: Iterable[Session]) -> None:
        """Stop computing these; a dead engine has stopped already."""
        try:
            await self.engine.abort([session.engine_id for session in sessions])
        except EngineDied:
            return

    async def cut(self, session: Session) -> Cut | None:
        """Stop computing this one at a token boundary; None when it does not run any more."""
        try:
            return await self.engine.cut(session.engine_id)
        except EngineDied:
            return None

    async def drop(self, sessions: Iterable[Session]) -> None:
        """Stop computing requests that are no longer ours; tell the observer what became of them."""
        gone = [session for session in sessions if self.sessions.drop(session)]
        if not gone:
            return
        await self.abort(gone)
        self.sessions.wake()
        records = await self.executor.run_many([self.reads.record(session.request_id) for session in gone])
        for session, record in zip(gone, records, strict=True):
            if record is not None and record.state in ("cancelled", "expired"):
                self.observer.request_cancelled(self.view(session))
            else:
                self.observer.request_moved(self.view(session), why=LEASE_ENDED)

    async def cancel(self, request_id: str) -> None:
        """Cancel a request wherever it is. Many workers may be asked; the one that does it tells the observer.

        A request that runs is reported by the worker that runs it, as soon as it hears of it.
        """
        record = await self.executor.run(self.reads.record(request_id))
        verdict, _ = await self.executor.run(self.calls.cancel(request_id, reason="revoked", nonce=uuid4().hex))
        if verdict is Verdict.OK and record is not None and record.state is not RequestState.RUNNING:
            stage = int(record.stage) if record.stage is not None and record.stage.isdecimal() else 0
            view = RequestView(
                request_id=request_id,
                stage=stage,
                range_text=self.placement.range_text(stage),
                prompt_tokens=record.prompt_tokens or 0,
                max_tokens=record.max_tokens or 0,
                num_resumed=record.offset,
                epoch=record.epoch,
                is_traced="traceparent" in record.body,
            )
            self.observer.request_cancelled(view)

    def expected_remaining(self, session: Session) -> float:
        """Tokens it still generates: all where nothing else ends the output, else by what others went on to."""
        params, left = session.params, session.remaining_tokens
        if params.ignore_eos and not params.stop and not params.stop_token_ids:
            return float(left)
        return self.fleet_view.outputs.expected_remaining(len(session.output_ids), limit=left)

    def view(self, session: Session) -> RequestView:
        """A session as a dashboard may show it."""
        grant = session.grant
        return RequestView(
            request_id=grant.request_id,
            stage=session.stage,
            range_text=session.range_text,
            prompt_tokens=grant.prompt_tokens,
            max_tokens=session.max_tokens,
            num_resumed=grant.offset,
            epoch=grant.epoch,
            is_traced=session.is_traced,
        )

    def load(self) -> WorkerLoad:
        """What this worker does now, as it publishes it."""
        stats = self.engine.stats()
        info = self.profile.info if self.profile.is_started else None
        return WorkerLoad(
            worker_id=self.worker_id,
            incarnation=self.lease.incarnation,
            stage=self.placement.stage,
            num_running=len(self.sessions),
            num_waiting_in_engine=stats.num_waiting,
            context_tokens=sum(session.length_tokens for session in self.sessions),
            pending_prefill_tokens=self.sessions.pending_prefill_tokens,
            kv_used_tokens=stats.kv_used_tokens,
            kv_capacity_tokens=info.kv_capacity_tokens if info else 0,
            max_running=self.profile.max_running,
            step_ms=round(stats.last_step_ms, 3),
            is_draining=self.placement.is_draining,
            engine=info.name if info else "",
            num_finished=self.sessions.num_finished,
            num_preemptions=stats.num_preemptions,
            is_emptying=self.placement.is_emptying,
            can_empty=True,
        )

    def figures(self) -> list[WorkerSnapshot]:
        """For metrics; none before the engine has started."""
        if not self.profile.is_started:
            return []
        return [
            WorkerSnapshot(
                load=self.load(),
                engine=self.engine.stats(),
                steps=self.profile.steps,
                plan_version=self.placement.plan.version,
                num_stolen=self.sessions.num_stolen,
                num_handed_over=self.sessions.num_handed_over,
                is_calibrated=self.profile.is_calibrated,
            )
        ]

    def stats(self) -> dict[str, JsonValue]:
        """A snapshot for dashboards."""
        if not self.profile.is_started:
            return {"worker": self.worker_id, "engine": "loading", "model": self.settings.model}
        load, engine, info = self.load(), self.engine.stats(), self.profile.info
        return {
            "worker": self.worker_id,
            "engine": f"{load.engine} {info.version}",
            "model": info.model,
            "stage": load.stage,
            "range_tokens": self.placement.range_text(load.stage),
            "plan_version": self.placement.plan.version,
            "running": load.num_running,
            "max_running": load.max_running,
            "context_tokens": load.context_tokens,
            "kv_share": round(load.kv_share, 4),
            "step_ms": load.step_ms,
            "finished": load.num_finished,
            "stolen": self.sessions.num_stolen,
            "handed_over": self.sessions.num_handed_over,
            "kv_loads": engine.num_kv_loads,
            "kv_misses": engine.num_kv_misses,
            "draining": load.is_draining,
        }
