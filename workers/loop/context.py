"""Context of a worker: its settings and its ways to Redis, engine and observer. Nothing in it is ever replaced."""

from __future__ import annotations

from dataclasses import dataclass

from l4queue.config import Settings
from l4queue.policy.steal import StealFrom, StealLimits
from l4queue.protocol.calls import Calls
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.keys import Keys
from l4queue.protocol.reads import Reads
from workers.engine.base import Engine
from workers.engine.loop_work import LoopWork
from workers.loop.session import TextFactory
from workers.telemetry.observer import Observer

__all__ = ("WorkerContext",)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerContext:
    """The same for all parts of a worker's loop, from its start to its end."""

    settings: Settings
    worker_id: str
    engine: Engine
    observer: Observer
    make_text: TextFactory
    work: LoopWork
    keys: Keys
    calls: Calls
    reads: Reads
    executor: AsyncExecutor
    steal_limits: StealLimits

    @classmethod
    def open(
        cls,
        *,
        settings: Settings,
        worker_id: str,
        engine: Engine,
        observer: Observer,
        make_text: TextFactory,
        work: LoopWork,
    ) -> WorkerContext:
        """With the deployment's keys and an executor of its own, which waits for Redis without a limit."""
        keys = Keys(settings.namespace)
        return cls(
            settings=settings,
            worker_id=worker_id,
            engine=engine,
            observer=observer,
            make_text=make_text,
            work=work,
            keys=keys,
            calls=Calls(keys),
            reads=Reads(keys),
            executor=AsyncExecutor(settings.redis_url, retry_s=None),
            steal_limits=StealLimits(steal_from=StealFrom(settings.steal_from)),
        )
