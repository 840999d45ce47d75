"""A dispatcher in the gateway's process (`L4_HTTP_DISPATCHER`): one process less, and one process to restart."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prometheus_client import REGISTRY

from dispatcher.host import DispatcherHost
from l4queue.config import Settings

__all__ = ("own_dispatcher",)

log = logging.getLogger("l4queue.gateway")


@asynccontextmanager
async def own_dispatcher(settings: Settings) -> AsyncIterator[None]:
    """Within it a dispatcher serves on this loop, where the settings ask for one; its counters are at /metrics.

    Where the dispatcher fails, the process is asked to end as by SIGTERM, and the error is raised at the end. At
    the end the round in progress is finished first.
    """
    if not settings.http_dispatcher:
        yield
        return
    host = await DispatcherHost.open(settings)
    REGISTRY.register(host.counters)

    def ended(running: asyncio.Task[None]) -> None:
        if not running.cancelled() and running.exception() is not None:
            log.error("the dispatcher of this gateway has failed", exc_info=running.exception())
            signal.raise_signal(signal.SIGTERM)

    running = asyncio.create_task(host.run())
    running.add_done_callback(ended)
    try:
        yield
    finally:
        REGISTRY.unregister(host.counters)
        host.stopping.set()
        await running
