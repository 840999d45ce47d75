"""The ceiling of any queue on Redis: a stream that is written, read by a group, acknowledged and emptied."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from l4queue.cli.bench.queue.raw import RawConnection, packed
from l4queue.cli.stack.embedded import EmbeddedRedis

__all__ = ("Ceiling", "fsync_times_ms", "measure_ceiling")

_BATCH = 64  # commands of a pipeline, as many as requests run in a worker
_NUM_BATCHES = 400  # about a second
_MOST_BYTES = 100_000_000  # in all; large prompts come less often
_NUM_FSYNCS, _APPEND_BYTES = 200, 400  # a second at most on a usual disk; what one short command writes
_STREAM, _GROUP = "ceiling", "g"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """XADD, XACK and XDEL for each request and an XREADGROUP for 64, in pipelines over one connection.

    `requests_per_s` is by the clock and shares the cores with the process that asks; `redis_cpu_s_per_1000` is
    what Redis needs, and 1,000 divided by it what it could serve with a core of its own.
    """

    prompt_bytes: int
    num_requests: int
    requests_per_s: float
    redis_cpu_s_per_1000: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def fsync_times_ms(folder: Path) -> list[float]:
    """Times of an append of a few hundred bytes and its fdatasync, as Redis does with `appendfsync always`, ms."""
    found = []
    with (folder / "fsync").open("ab", buffering=0) as file:
        for _ in range(_NUM_FSYNCS):
            began_s = time.perf_counter()
            file.write(b"x" * _APPEND_BYTES)
            os.fdatasync(file)
            found.append((time.perf_counter() - began_s) * 1000)
    return found


async def measure_ceiling(prompt_bytes: int, folder: Path) -> Ceiling:
    """On a redis-server of its own (AOF once a second)."""
    with EmbeddedRedis(folder, durability="fast", port=0) as redis:
        connection = await RawConnection.open(redis.url)
        await connection.call("XGROUP", "CREATE", _STREAM, _GROUP, "$", "MKSTREAM")
        adding = packed("XADD", _STREAM, "*", "p", "x" * prompt_bytes) * _BATCH
        reading = packed("XREADGROUP", "GROUP", _GROUP, "c", "COUNT", _BATCH, "STREAMS", _STREAM, ">")
        process = psutil.Process(redis.pid)
        num_batches = max(2, min(_NUM_BATCHES, _MOST_BYTES // (prompt_bytes * _BATCH)))
        before, began_s = process.cpu_times(), time.perf_counter()
        for _ in range(num_batches):
            await connection.pipeline(adding, num_replies=_BATCH)
            ((_, entries),) = (await connection.pipeline(reading, num_replies=1))[0]
            ids = [entry[0] for entry in entries]
            gone = b"".join(packed("XACK", _STREAM, _GROUP, i) + packed("XDEL", _STREAM, i) for i in ids)
            await connection.pipeline(gone, num_replies=2 * len(ids))
        wall_s, after = time.perf_counter() - began_s, process.cpu_times()
        await connection.close()
    count = num_batches * _BATCH
    cpu_s = after.user + after.system - before.user - before.system
    return Ceiling(
        prompt_bytes=prompt_bytes,
        num_requests=count,
        requests_per_s=count / wall_s,
        redis_cpu_s_per_1000=cpu_s / count * 1000,
    )
