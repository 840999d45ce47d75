"""Signs of life that processes leave in Redis, for health checks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from l4queue.models import Routing
from l4queue.protocol.calls import Call
from l4queue.protocol.executor import Executor
from l4queue.protocol.keys import Keys
from l4queue.protocol.parsing import planned_ms
from l4queue.protocol.plans import is_of_a_newer_release, read_plan
from l4queue.protocol.reads import Reads

__all__ = (
    "CLOCK_TOLERANCE_S",
    "DISPATCHER_SILENT_S",
    "WorkerLife",
    "clock_ahead_s",
    "clock_note",
    "dispatcher_alive",
    "dispatcher_heard_s",
    "planner_idle_s",
    "worker_life",
)

CLOCK_TOLERANCE_S = 1.0
"""Clocks that differ by less are the same to a reader of logs."""
_LOOKS = 3  # at the clock; the fastest reply has the least error
_JITTER_S = 1.0  # clocks of servers may differ by as much after a failover
DISPATCHER_SILENT_S = 15.0
"""A dispatcher that said nothing for so long does not work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLife:
    """The lease of a worker that serves."""

    incarnation: str
    stage: int
    left_s: float


def worker_life(executor: Executor, namespace: str, worker_id: str) -> WorkerLife | None:
    """The valid lease of the worker with this name; None when it has none, and so serves nothing."""
    reads = Reads(Keys(namespace))
    now_ms, incarnations = executor.run_many([reads.server_time_ms(), reads.incarnations()])
    alive = [name for name, expires_ms in incarnations if expires_ms > now_ms]
    expiry = dict(incarnations)
    for view in executor.run_many([reads.worker(name, expiry[name]) for name in alive]):
        if view is not None and view.worker_id == worker_id:
            left_s = (view.expires_ms - now_ms) / 1000
            return WorkerLife(incarnation=view.incarnation, stage=view.load.stage, left_s=left_s)
    return None


def dispatcher_alive(keys: Keys, host: str) -> Call[None]:
    """Say that a dispatcher of this host routes; others hear it for `DISPATCHER_SILENT_S`."""
    args = ("SET", keys.dispatcher(host), "1", "PX", int(DISPATCHER_SILENT_S * 1000))
    return Call(None, (), args, lambda _: None)


def dispatcher_heard_s(executor: Executor, namespace: str, host: str) -> float | None:
    """Since when no dispatcher of this host said that it routes, in s; None when too long ago, or never."""
    left_ms: int = executor.run(Call(None, (), ("PTTL", Keys(namespace).dispatcher(host)), int))
    heard_s = DISPATCHER_SILENT_S - left_ms / 1000
    return heard_s if left_ms >= 0 and heard_s > -_JITTER_S else None  # from the future: the clock went back


def planner_idle_s(executor: Executor, namespace: str) -> float | None:
    """Since when no round of planning ended, in s; None when none did yet, 0 where there is nothing to plan."""
    reads = Reads(Keys(namespace))
    now_ms, (_, body), memory = executor.run_many([reads.server_time_ms(), reads.plan(), reads.planner_memory()])
    plan = read_plan(body, key=reads.keys.plan)
    if (plan is not None and plan.routing is not Routing.L4) or is_of_a_newer_release(body or ""):
        return 0.0
    at_ms = planned_ms(memory, key=reads.keys.memory)
    idle_s = None if at_ms is None else (now_ms - at_ms) / 1000
    return None if idle_s is None or idle_s < -_JITTER_S else max(0.0, idle_s)


def clock_ahead_s(executor: Executor, *, clock: Callable[[], float] = time.time) -> float:
    """By how much this host's clock is ahead of Redis's, in s; the best of a few looks, without their time."""
    looks = []
    for _ in range(_LOOKS):
        before_s, begun_s = clock(), time.monotonic()
        server_s = executor.run(Call(None, (), ("TIME",), lambda r: int(r[0]) + int(r[1]) / 1e6))
        took_s = time.monotonic() - begun_s
        looks.append((took_s, before_s + took_s / 2 - server_s))
    return min(looks)[1]


def clock_note(ahead_s: float) -> str | None:
    """Remark on a difference of clocks; None where it does no harm."""
    if abs(ahead_s) < CLOCK_TOLERANCE_S:
        return None
    way = "ahead of" if ahead_s > 0 else "behind"
    return f"this host's clock is {abs(ahead_s):.0f} s {way} Redis's: synchronise them (NTP)"
