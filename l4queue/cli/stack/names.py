"""Names of workers that nobody else on the same Redis has."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable
from contextlib import suppress
from itertools import count

from l4queue.errors import L4QueueError
from l4queue.observe.overview import read_overview_async
from l4queue.protocol.claims import claim, extend_claim, give_back, left_ms
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.keys import Keys
from l4queue.protocol.reads import Reads

__all__ = ("NameClaims",)

_LOOK_S = 0.2  # between two looks at the leases; chosen: a lease lasts seconds
_REDIS_WAIT_S = 10.0
"""How long a Redis that runs elsewhere may be away at the start, s. Chosen: a restart of it takes less."""
_CLAIM_MS = 10_000  # how long a claim outlives its process; chosen: as long as a worker's lease
_RENEW_S = 2.5  # between renewals of a claim; chosen: three may be late


class NameClaims:
    """Names that one `l4queue up` has on its Redis until `close`, for two may start at the same moment.

    `choose` sets `workers`, `planner` and `others`, the workers seen there. Belongs to one event loop.
    """

    def __init__(self, url: str, namespace: str) -> None:
        self.workers: list[str] = []
        self.planner = ""
        self.others: list[str] = []
        self._namespace = namespace
        self._executor = AsyncExecutor(url, retry_s=_REDIS_WAIT_S, says_outages=False)
        self._keys = Keys(namespace)
        self._token = secrets.token_hex(8)
        self._ours: list[str] = []
        self._alive: set[str] = set()
        self._passed: list[str] = []
        self._keeping = asyncio.create_task(self._keep(), name="keep-names")

    async def choose(self, num_workers: int, *, is_shared: bool) -> None:
        """Take worker-0, worker-1, ... and planner without names of others. ServiceUnavailable without Redis.

        A Redis that `is_shared` may have workers that were started one by one, without a claim. A claim that is
        not renewed is waited for until it ends, so that its name is free again after a crash.
        """
        used = await _names_in_use(self._executor, self._namespace) if is_shared else frozenset()
        free = (name for name in map("worker-{}".format, count()) if name not in used)
        self.workers = await self._take(free, num_workers)
        self.others = sorted(used.union(self._passed))
        planners = (f"planner-{i}" if i else "planner" for i in count(1 if used else 0))
        [self.planner] = await self._take(planners, 1)  # names of Celery's nodes are one for each broker

    async def _take(self, names: Iterable[str], number: int) -> list[str]:
        """The first `number` of these names that no other process has."""
        found: list[str] = []
        for name in names:
            if len(found) == number:
                break
            if await self._has_taken(name):
                found.append(name)
            else:
                self._passed.append(name)
        return found

    async def close(self) -> None:
        """Let others have the names."""
        self._keeping.cancel()
        await asyncio.gather(self._keeping, return_exceptions=True)
        with suppress(L4QueueError):
            owned = await self._renewed()
            if owned:
                await self._executor.offer(give_back(self._keys, owned))
        await self._executor.close()

    async def _has_taken(self, name: str) -> bool:
        longest_ms = 0
        while True:
            calls = [*claim(self._keys, name, token=self._token, ttl_ms=_CLAIM_MS), left_ms(self._keys, name)]
            _, owner, ttl_ms = await self._executor.run_many(calls)
            if owner == self._token:
                self._ours.append(name)
                return True
            if longest_ms and ttl_ms > longest_ms:
                self._alive.add(owner)
            if owner in self._alive:
                return False
            longest_ms = ttl_ms
            await asyncio.sleep(_LOOK_S)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(_RENEW_S)
            with suppress(L4QueueError):  # Redis is away; workers that run have leases
                await self._renewed()

    async def _renewed(self) -> list[str]:
        """The names that are still ours, renewed."""
        claims = [claim(self._keys, name, token=self._token, ttl_ms=_CLAIM_MS) for name in self._ours]
        replies = await self._executor.run_many([call for pair in claims for call in pair])
        owned = [name for name, owner in zip(self._ours, replies[1::2], strict=True) if owner == self._token]
        await self._executor.run_many([extend_claim(self._keys, name, ttl_ms=_CLAIM_MS) for name in owned])
        return owned


async def _names_in_use(executor: AsyncExecutor, namespace: str) -> frozenset[str]:
    """Names of live workers, which renew their leases. ServiceUnavailable where there is no Redis.

    The lease of a worker that was killed holds for a while. It is waited for, so that its name is free again.
    """
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
