"""Names of workers that nobody else on the same Redis has."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from itertools import count, islice

from l4queue.observe.overview import read_overview_async
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.keys import Keys
from l4queue.protocol.reads import Reads

__all__ = ("free_names", "names_in_use")

_LOOK_S = 0.2  # between two looks at the leases; chosen: a lease lasts seconds
_REDIS_WAIT_S = 10.0
"""How long a Redis that runs elsewhere may be away at the start, s. Chosen: a restart of it takes less."""


def free_names(number: int, taken: Collection[str]) -> list[str]:
    """worker-0, worker-1, ... without the names that are taken."""
    return list(islice((name for name in map("worker-{}".format, count()) if name not in taken), number))


async def names_in_use(url: str, namespace: str) -> frozenset[str]:
    """Names of live workers, which renew their leases. ServiceUnavailable where there is no Redis.

    The lease of a worker that was killed holds for a while. It is waited for, so that its name is free again.
    """
    executor = AsyncExecutor(url, retry_s=_REDIS_WAIT_S)
    try:
        return await _renewing(executor, namespace)
    finally:
        await executor.close()


async def _renewing(executor: AsyncExecutor, namespace: str) -> frozenset[str]:
    reads = Reads(Keys(namespace))
    [leases] = await executor.run_many([reads.incarnations()])
    first = dict(leases)
    undecided, alive = set(first), set[str]()
    while undecided:
        leases, now_ms = await executor.run_many([reads.incarnations(), reads.server_time_ms()])
        expires_ms = dict(leases)
        alive |= {name for name in undecided if expires_ms.get(name, 0) > first[name]}
        undecided = {name for name in undecided - alive if expires_ms.get(name, 0) > now_ms}
        if undecided:
            await asyncio.sleep(_LOOK_S)
    overview = await read_overview_async(executor, namespace)
    return frozenset(load.worker_id for load in overview.workers if load.incarnation in alive)
