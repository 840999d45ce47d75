"""Whether anybody serves: workers with a lease, as Redis knows them, looked at once a second at most."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from l4queue.config import Settings
from l4queue.errors import ServiceUnavailable
from l4queue.protocol.calls import Call
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.keys import Keys
from l4queue.protocol.reads import Reads

__all__ = ("ServingCheck",)

_FRESH_S = 1.0
"""How old the last look may be, s. Chosen: a request for a fleet that has gone waits in the queue all the same."""


class ServingCheck:
    """The workers of the deployment. Belongs to one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._reads = Reads(Keys(settings.namespace))
        self._executor = AsyncExecutor(settings.redis_url, retry_s=0.0)
        self._lock = asyncio.Lock()
        self._seen_s = -_FRESH_S

    async def check(self) -> None:
        """Return where a worker serves. ServiceUnavailable where none does, or Redis is away."""
        if time.monotonic() - self._seen_s < _FRESH_S:
            return
        async with self._lock:
            if time.monotonic() - self._seen_s < _FRESH_S:
                return
            calls: list[Call[Any]] = [self._reads.server_time_ms(), self._reads.incarnations()]
            now_ms, incarnations = await self._executor.run_many(calls)
            if not any(expires_ms > now_ms for _, expires_ms in incarnations):
                raise ServiceUnavailable("no worker serves: see `l4queue stats`")
            self._seen_s = time.monotonic()

    async def close(self) -> None:
        """Close the connections."""
        await self._executor.close()
