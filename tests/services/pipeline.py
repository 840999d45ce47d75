"""A deployment in one process: dispatcher, upkeep, client, and workers with the emulated engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from dispatcher.routing.service import Dispatcher
from dispatcher.routing.tokenizer import Counted, Refusal
from l4queue import AsyncClient, Settings
from l4queue.cost.step import StepCost
from l4queue.models import Plan, StagePlan
from l4queue.plan_json import plan_to_json
from l4queue.protocol.calls import Calls
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.keys import Keys
from l4queue.protocol.upkeep import Upkeep
from workers.engine.base import Engine
from workers.engine.emulated.engine import EmulatedEngine
from workers.loop.text import no_text
from workers.loop.worker import Worker
from workers.telemetry.observer import NullObserver

__all__ = ("COST", "MAX_LEN", "ByteTokenizer", "Pipeline", "open_pipeline", "true", "until")

COST = StepCost(
    alpha_ms=4.0, beta_ms=0.01, gamma_ms=0.0, pi_ms=0.001, psi_ms=0.0, kv_capacity_tokens=100_000, max_num_seqs=32
)
MAX_LEN = 2048


class ByteTokenizer:
    """A token is a byte: enough to count with, and quick."""

    max_model_len = MAX_LEN
    vocabulary_size = 8000

    def count(self, prompts: list[tuple[str, bytes]]) -> list[Counted | Refusal]:
        """Ids of prompts."""
        return [Counted(token_ids=tuple(data)) for _, data in prompts]


@dataclass(kw_only=True)
class Pipeline:
    """Parts of a deployment in this process; workers come and go by name."""

    settings: Settings
    client: AsyncClient
    executor: AsyncExecutor
    workers: dict[str, tuple[Worker, asyncio.Task[None]]] = field(default_factory=dict)

    def start(
        self,
        name: str,
        *,
        speed: float = 0.0,
        cost: StepCost = COST,
        make_engine: Callable[..., Engine] = EmulatedEngine,
    ) -> Worker:
        """Start a worker. KV moves as the settings say."""
        kv_bytes_per_s = self.settings.emulated_kv_bytes_per_s
        worker = Worker(
            settings=self.settings,
            engine=make_engine(cost, speed=speed, max_model_len=MAX_LEN, kv_bytes_per_s=kv_bytes_per_s),
            observer=NullObserver(),
            worker_id=name,
            text=no_text,
            cost=cost,
        )
        self.workers[name] = (worker, asyncio.create_task(worker.run()))
        return worker

    async def crash(self, name: str) -> None:
        """End a worker without any farewell: its lease is left to run out."""
        _, task = self.workers.pop(name)
        for other in asyncio.all_tasks():  # what the worker started belongs to it
            if other is not task and "Worker." in repr(other.get_coro()):
                other.cancel()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def stop(self, name: str) -> None:
        """Drain a worker."""
        worker, task = self.workers.pop(name)
        worker.request_stop()
        await task

    async def running(self, name: str, number: int = 1) -> None:
        """Wait until a worker runs so many requests."""
        worker = self.workers[name][0]
        await until(lambda: true(len(worker.active()) >= number))

    async def publish(self, *stages: StagePlan, prefix_affinity: bool = False) -> None:
        """Publish a plan; returns when every worker follows it."""
        current = (await self.client.overview()).plan.version
        plan = Plan(version=current + 1, stages=stages, prefix_affinity=prefix_affinity)
        call = Calls(Keys(self.settings.namespace)).publish(
            expected_version=current, version=plan.version, body=plan_to_json(plan)
        )
        await self.executor.run(call)
        await until(lambda: true(all(self._follows(name, plan) for name in self.workers)))

    def _follows(self, name: str, plan: Plan) -> bool:
        worker, task = self.workers[name]
        return task.done() or worker.placement.plan.version >= plan.version


async def true(value: bool) -> bool:
    return value


async def until(condition: Callable[[], Awaitable[bool]], *, timeout_s: float = 300) -> None:
    """Poll until true."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 - the state is in Redis, nobody signals it
            await asyncio.sleep(0.01)


@asynccontextmanager
async def open_pipeline(redis_url: str, namespace: str, **more: object) -> AsyncIterator[Pipeline]:
    """Dispatcher, upkeep and client with short leases."""
    values = {
        "lease_s": 0.6,
        "max_running": 16,
        "drain_s": 5.0,
        "max_model_len": MAX_LEN,
        "engine": "emulated",
        **more,
    }
    settings = Settings(redis_url=redis_url, namespace=namespace, **values)  # type: ignore[arg-type]
    executor = AsyncExecutor(redis_url, retry_s=None)
    dispatcher = Dispatcher(settings=settings, executor=executor, tokenizer=ByteTokenizer(), name="d")  # type: ignore[arg-type]
    routing = asyncio.create_task(dispatcher.run())
    upkeep = Upkeep(settings=settings, executor=executor)

    ended = asyncio.Event()

    async def keep_up() -> None:
        while not ended.is_set():
            await upkeep.run_once(dispatcher.plan)
            await asyncio.sleep(upkeep.interval_s)

    keeping = asyncio.create_task(keep_up())
    async with AsyncClient(settings=settings) as client:
        opened = Pipeline(settings=settings, client=client, executor=executor)
        try:
            yield opened
        finally:
            for name in list(opened.workers):
                await opened.stop(name)
            ended.set()
            dispatcher.request_stop()
            await asyncio.gather(routing, keeping, return_exceptions=True)
            await executor.close()
