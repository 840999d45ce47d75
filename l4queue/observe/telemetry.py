"""Monitoring data of a whole deployment: the overview, waiting times and totals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from l4queue.observe.overview import Overview, read_overview
from l4queue.protocol.calls import Call
from l4queue.protocol.executor import Executor
from l4queue.protocol.keys import Keys
from l4queue.protocol.parsing import planned_ms
from l4queue.protocol.reads import Reads

__all__ = ("ServerMemory", "Telemetry", "read_telemetry")

_SAMPLE = 100  # requests at the head of a queue that are asked for their age


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerMemory:
    """Memory of the Redis server; `limit_bytes` is 0 where none is set."""

    used_bytes: int
    limit_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """The deployment at one moment. Ages are by the server's clock.

    `waiting_s` is the age of the oldest of the first 100 requests of a queue in serving order; an older one can
    only be in a later priority class, or so long that ageing has not brought it forward yet.
    """

    overview: Overview
    inbox_age_s: float
    waiting_s: Mapping[str, float]
    histogram: Mapping[str, int]
    planned_ms: int | None  # when the last round of planning ended
    num_dead_letters: int
    memory: ServerMemory


def read_telemetry(executor: Executor, namespace: str) -> Telemetry:
    """Read it in four round trips; what it costs does not grow with the queues."""
    reads = Reads(Keys(namespace))
    overview = read_overview(executor, namespace)
    stages = [stage for stage, queue in overview.queues.items() if queue.num_requests]
    oldest, histogram, num_dead, memory, planner, *ids = executor.run_many(
        [
            reads.inbox_oldest(),
            reads.histogram(),
            Call(None, (), ("XLEN", reads.keys.dead), int),
            Call(None, (), ("INFO", "memory"), _memory),
            reads.planner_memory(),
            *(reads.queue_ids(stage, limit=_SAMPLE) for stage in stages),
        ]
    )
    ages = executor.run_many([reads.submitted_ms(i) for some in (oldest, *ids) for i in some])
    since_ms, accepted = next(iter(ages[: len(oldest)]), None), iter(ages[len(oldest) :])
    waiting_s = {}
    for stage, some in zip(stages, ids, strict=True):
        known = [ms for ms in (next(accepted) for _ in some) if ms is not None]
        waiting_s[stage] = _age_s(min(known, default=None), overview.now_ms)
    return Telemetry(
        overview=overview,
        inbox_age_s=_age_s(since_ms, overview.now_ms),
        waiting_s=waiting_s,
        histogram={name: int(float(value)) for name, value in histogram.items()},
        planned_ms=planned_ms(planner, key=reads.keys.memory),
        num_dead_letters=num_dead,
        memory=memory,
    )


def _age_s(since_ms: int | None, now_ms: int) -> float:
    return 0.0 if since_ms is None else max(0.0, (now_ms - since_ms) / 1000)


def _memory(reply: Any) -> ServerMemory:
    """From redis-py's parsed reply, or the text where it was not parsed."""
    if isinstance(reply, bytes):
        lines = (line.partition(":") for line in reply.decode().splitlines())
        reply = {name: value for name, _, value in lines}
    return ServerMemory(used_bytes=int(reply["used_memory"]), limit_bytes=int(reply.get("maxmemory", 0)))
