"""ResourceCounts around a stretch of work: CPU time by process, and what Redis counts itself."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil

from l4queue.cli.bench.queue.raw import RawConnection
from l4queue.redis_url import SecretUrl

__all__ = ("ResourceCounts", "ResourcesSpent", "commands_of", "look", "spent", "used_bytes")

T = TypeVar("T")
_OWN = frozenset({"info", "monitor", "auth", "hello", "client", "ping", "select", "config", "command"})
"""Commands of this benchmark, and of connections that are being made: not counted."""
_SEEN = re.compile(rb'[\d.]+ \[\d+ (lua|[^\]]*)\] "([^"]*)"(?: "([^"]*)")?')
_LAST_WORD = "l4queue-bench-is-done"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceCounts:
    """Counters at one moment."""

    at_s: float
    cpu_s: Mapping[str, float]
    machine_busy_s: float
    own_cpu_s: float
    commands: Mapping[str, int]
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourcesSpent:
    """Differences between two moments. `foreign_cores`: cores that processes of others kept busy meanwhile."""

    wall_s: float
    cpu_s: Mapping[str, float]
    foreign_cores: float
    num_commands: int
    bytes_in: int
    bytes_out: int


async def look(redis: RawConnection, pids: Mapping[str, Iterable[int]]) -> ResourceCounts:
    """All counters, now; `pids` by the name of the process, its children included."""
    info = await _info(redis)
    times, own = psutil.cpu_times(), psutil.Process().cpu_times()
    return ResourceCounts(
        at_s=time.perf_counter(),
        cpu_s={name: sum(map(_cpu_s, group)) for name, group in pids.items()},
        machine_busy_s=times.user + times.system + getattr(times, "nice", 0.0),
        own_cpu_s=own.user + own.system,
        commands={name: calls for name, calls in _calls(info) if name not in _OWN},
        bytes_in=int(info["total_net_input_bytes"]),
        bytes_out=int(info["total_net_output_bytes"]),
    )


def spent(before: ResourceCounts, after: ResourceCounts) -> ResourcesSpent:
    """What lies between."""
    wall_s = after.at_s - before.at_s
    cpu_s = {name: after.cpu_s[name] - before.cpu_s[name] for name in after.cpu_s}
    ours_s = sum(cpu_s.values()) + after.own_cpu_s - before.own_cpu_s
    foreign_s = after.machine_busy_s - before.machine_busy_s - ours_s
    return ResourcesSpent(
        wall_s=wall_s,
        cpu_s=cpu_s,
        foreign_cores=max(0.0, foreign_s / wall_s),
        num_commands=sum(after.commands.values()) - sum(before.commands.values()),
        bytes_in=after.bytes_in - before.bytes_in,
        bytes_out=after.bytes_out - before.bytes_out,
    )


async def commands_of(
    url: SecretUrl, work: Awaitable[T], *, scripts: Mapping[str, str] | None = None
) -> tuple[Counter[str], Counter[str], T]:
    """Commands that clients send while this work is done, those inside scripts, and the work's own result.

    `scripts` has names by digests: an EVALSHA of these counts as `script <name>`.
    By MONITOR, which names the scripts' commands as such; it slows Redis down, so nothing is timed meanwhile.
    """
    watch, last = await RawConnection.open(url), await RawConnection.open(url)
    sent: Counter[str] = Counter()
    inside: Counter[str] = Counter()
    await watch.call("MONITOR")

    async def count() -> None:
        async for line in watch.pushed():
            if _LAST_WORD.encode() in line[-200:]:
                return
            found = _SEEN.match(line)
            if found is not None and (name := found[2].decode().lower()) not in _OWN:
                script = (scripts or {}).get((found[3] or b"").decode(errors="replace"))
                (inside if found[1] == b"lua" else sent)[f"script {script}" if script else name] += 1

    counting = asyncio.create_task(count())
    try:
        done = await work
        await last.call("PING", _LAST_WORD)
        await counting
    finally:
        counting.cancel()
        await asyncio.gather(counting, return_exceptions=True)
        await watch.close()
        await last.close()
    return sent, inside, done


async def used_bytes(redis: RawConnection) -> int:
    """Memory of the data: without buffers of clients and of the AOF."""
    info = await _info(redis)
    buffers = ("mem_clients_normal", "mem_aof_buffer")
    return int(info["used_memory"]) - sum(int(info[name]) for name in buffers)


async def _info(redis: RawConnection) -> dict[str, str]:
    text: bytes = await redis.call("INFO", "everything")
    lines = (line.partition(":") for line in text.decode().splitlines() if not line.startswith("#"))
    return {name: value for name, _, value in lines}


def _calls(info: Mapping[str, str]) -> Sequence[tuple[str, int]]:
    """Calls by command; those of a subcommand count for the whole."""
    prefix, found = "cmdstat_", []
    for name, value in info.items():
        if name.startswith(prefix):
            number = re.search(r"calls=(\d+)", value)
            found.append((name.removeprefix(prefix).partition("|")[0], int(number[1]) if number else 0))
    totals: Counter[str] = Counter()
    for name, number_of_calls in found:
        totals[name] += number_of_calls
    return list(totals.items())


def _cpu_s(pid: int) -> float:
    """CPU time of a process and its children so far; 0 of one that is gone."""
    total = 0.0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            times: Any = one.cpu_times()
            total += times.user + times.system
    return total
