"""A deployment in this process, beside a connection that writes what nobody of ours would."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import redis

from dispatcher.exporter import Exporter
from dispatcher.planner.rounds import refine_once, replan_once
from dispatcher.routing.service import Dispatcher
from l4queue import AsyncClient, Settings
from l4queue.cost.step import StepCost
from l4queue.models import TERMINAL, RequestState
from l4queue.observe import health
from l4queue.observe.watch import Watch
from l4queue.protocol.executor import AsyncExecutor, Executor
from l4queue.protocol.keys import Keys
from l4queue.protocol.upkeep import Upkeep
from tests.services.pipeline import MAX_LEN, ByteTokenizer, until
from workers.engine.emulated.engine import EmulatedEngine
from workers.loop.text import no_text
from workers.loop.worker import Worker
from workers.telemetry.observer import NullObserver

__all__ = ("BYTES", "LONG_S", "NUMBERS", "Place", "open_place")

COST = StepCost(
    alpha_ms=4.0, beta_ms=0.01, gamma_ms=0.0, pi_ms=0.001, psi_ms=0.0, kv_capacity_tokens=100_000, max_num_seqs=32
)
LONG_S = 120.0
BYTES = b"\xff\xfe\x00"
NUMBERS = (b"abc", b"", b"-7", b"1e400", b"nan", b"9" * 400, BYTES)


@dataclass(kw_only=True)
class Place:
    """One deployment in this process, with a raw connection for what nobody of ours would write."""

    settings: Settings
    client: AsyncClient
    executor: AsyncExecutor
    raw: Any
    keys: Keys
    dispatcher: Dispatcher
    upkeep: Upkeep
    tasks: dict[str, asyncio.Task[Any]]
    worker: Worker
    redis_url: str

    @property
    def incarnation(self) -> str:
        """Of the worker that serves."""
        return self.worker.lease.incarnation

    async def good(self, number: int = 3) -> None:
        """Requests of well-behaved clients are done."""
        handles = [await self.client.enqueue(token_ids=[1] * (5 + i), max_tokens=4) for i in range(number)]
        for handle in handles:
            assert len((await handle.result(timeout=LONG_S)).token_ids) == 4

    async def running(self) -> str:
        """The id of a request that the worker runs, and will for long."""
        handle = await self.client.enqueue(token_ids=[1] * 9, max_tokens=8000, ignore_eos=True)
        await until(lambda: self._runs(handle.id), timeout_s=LONG_S)
        return handle.id

    async def _runs(self, request_id: str) -> bool:
        record = await (await self.client.get(request_id)).status()
        return record.state is RequestState.RUNNING and record.output_tokens > 0

    async def look(self) -> None:
        """Everything that reads or mends the deployment runs once, and none of it fails."""
        for _ in range(2):
            await self.upkeep.run_once(self.dispatcher.plan)
            await self.upkeep.measure_drain()
            await self.upkeep.repair_once()
            await self.upkeep.reroute(self.dispatcher.plan)
            await self.dispatcher.adopt_once()
            await replan_once(self.settings)
            await refine_once(self.settings)
            await self.worker.fleet_view.refresh()
            await asyncio.to_thread(self._look_blocking)
            await self.client.plan_history()
            await self.client.dead_letters()
        self.check()

    def _look_blocking(self) -> None:
        executor, namespace = Executor(self.redis_url), self.settings.namespace
        try:
            Watch(executor, namespace).look()
            exporter = Exporter(self.settings, executor)
            exporter.follow()
            exporter.follow()
            metrics = {metric.name: metric for metric in exporter.collect()}
            assert metrics["l4queue_redis_up"].samples[0].value == 1.0
            health.worker_life(executor, namespace, "w0")
            health.dispatcher_heard_s(executor, namespace, "host")
            health.planner_idle_s(executor, namespace)
        finally:
            executor.close()

    def check(self) -> None:
        """Every process serves."""
        for name, task in self.tasks.items():
            assert not task.done(), f"{name}: {task.exception()!r}"

    async def ended(self, request_id: str) -> RequestState:
        """The terminal state that this request comes to."""

        async def has_ended() -> bool:
            self.check()
            await self.upkeep.repair_once()
            await self.upkeep.run_once(self.dispatcher.plan)
            state = self.raw.hget(self.keys.request(request_id), "state")
            return state is not None and state.decode() in TERMINAL

        try:
            await until(has_ended, timeout_s=LONG_S)
        except TimeoutError:
            raise AssertionError(f"does not end: {self.raw.hgetall(self.keys.request(request_id))}") from None
        return RequestState(self.raw.hget(self.keys.request(request_id), "state").decode())

    def letters(self) -> list[str]:
        """All dead letters, as text."""
        if self.raw.type(self.keys.dead) != b"stream":
            return []
        return [repr(values) for _, values in self.raw.xrange(self.keys.dead)]


@asynccontextmanager
async def open_place(redis_url: str, namespace: str) -> AsyncIterator[Place]:
    """A dispatcher, upkeep, a worker and a client."""
    values: dict[str, Any] = {
        "lease_s": 5.0,
        "max_running": 16,
        "max_model_len": 4 * MAX_LEN,
        "engine": "emulated",
    }
    settings = Settings(redis_url=redis_url, namespace=namespace, metrics_port=9, **values)
    executor = AsyncExecutor(redis_url, retry_s=None)
    dispatcher = Dispatcher(settings=settings, executor=executor, tokenizer=ByteTokenizer(), name="d")  # type: ignore[arg-type]
    dispatcher._tokenizer.max_model_len = 4 * MAX_LEN
    worker = Worker(
        settings=settings,
        engine=EmulatedEngine(COST, speed=1.0, max_model_len=4 * MAX_LEN),
        observer=NullObserver(),
        worker_id="w0",
        text=no_text,
        cost=COST,
    )
    tasks = {
        "dispatcher": asyncio.create_task(dispatcher.run()),
        "worker": asyncio.create_task(worker.run()),
    }
    keys = Keys(namespace)
    raw = redis.Redis.from_url(redis_url, single_connection_client=True)
    async with AsyncClient(settings=settings) as client:
        place = Place(
            settings=settings,
            client=client,
            executor=executor,
            raw=raw,
            keys=keys,
            dispatcher=dispatcher,
            upkeep=Upkeep(settings=settings, executor=executor),
            tasks=tasks,
            worker=worker,
            redis_url=redis_url,
        )
        try:
            await place.good(1)
            yield place
            place.check()
        finally:
            worker.request_stop()
            dispatcher.request_stop()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
            await executor.close()
            raw.close()
