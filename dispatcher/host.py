"""A dispatcher on the event loop of its process: that of `python -m dispatcher`, or a gateway's."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from contextlib import suppress

from dispatcher.routing.metrics import RouterCounters
from dispatcher.routing.service import Dispatcher
from dispatcher.routing.tokenizer import PromptTokenizer
from l4queue.config import Settings
from l4queue.errors import ServiceUnavailable
from l4queue.model_config import trusts_remote_code, with_model_facts
from l4queue.observe.health import dispatcher_alive
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.upkeep import Upkeep

__all__ = ("DispatcherHost", "keep_up")

log = logging.getLogger("l4queue.dispatcher")
_SLOW_ROUND_S = 5.0
"""Period of repair, of the measured drain and of a look at the longest request, s. A dispatcher whose routing
has stood still for so long does not call itself alive. Chosen: a repair looks at many records, and only broken
ones wait for it."""


async def keep_up(
    dispatcher: Dispatcher, upkeep: Upkeep, executor: AsyncExecutor, stopping: asyncio.Event
) -> None:
    """Upkeep beside routing, until stopped."""
    loop = asyncio.get_running_loop()
    next_slow = loop.time()
    while not stopping.is_set():
        try:
            await upkeep.run_once(dispatcher.plan)
            await dispatcher.adopt_once()
            if dispatcher.idle_s < _SLOW_ROUND_S:
                await executor.offer(dispatcher_alive(dispatcher.keys, socket.gethostname()))
            if loop.time() >= next_slow:
                next_slow = loop.time() + _SLOW_ROUND_S
                await dispatcher.look_at_engines()
                await upkeep.measure_drain()
                await upkeep.repair_once()
        except ServiceUnavailable as error:
            log.warning("upkeep failed: %s", error)
        with suppress(TimeoutError):
            async with asyncio.timeout(upkeep.interval_s):
                await stopping.wait()


class DispatcherHost:
    """A dispatcher with its upkeep. `run` serves until `stopping` is set, then ends the round in progress."""

    def __init__(self, settings: Settings, tokenizer: PromptTokenizer) -> None:
        self._settings = settings
        self._executor = AsyncExecutor(settings.redis_url, retry_s=None)
        self.stopping = asyncio.Event()
        self.dispatcher = Dispatcher(
            settings=settings,
            executor=self._executor,
            tokenizer=tokenizer,
            name=f"{socket.gethostname()}-{os.getpid()}",
        )

    @classmethod
    async def open(cls, settings: Settings) -> DispatcherHost:
        """Load what it counts with, in a thread. ConfigError where the model or its tokenizer cannot be read."""
        settings = await asyncio.to_thread(with_model_facts, settings)
        tokenizer = await asyncio.to_thread(
            PromptTokenizer,
            settings.tokenizer or settings.model,
            max_model_len=settings.max_model_len,
            trust_remote_code=trusts_remote_code(settings),
        )
        return cls(settings, tokenizer)

    @property
    def counters(self) -> RouterCounters:
        """Counts for metrics."""
        return self.dispatcher.counters

    async def run(self) -> None:
        """Route and keep up until `stopping` is set. Raises what ended either of them before."""
        settings, dispatcher = self._settings, self.dispatcher
        path = settings.tokenizer or settings.model
        limit = settings.max_model_len
        log.info("dispatcher %s ready: tokenizer %s, limit %d tokens", dispatcher.name, path, limit)
        upkeep = Upkeep(settings=settings, executor=self._executor)
        try:
            routing = asyncio.create_task(dispatcher.run())
            keeping = asyncio.create_task(keep_up(dispatcher, upkeep, self._executor, self.stopping))
            stop = asyncio.create_task(self.stopping.wait())
            await asyncio.wait({routing, keeping, stop}, return_when=asyncio.FIRST_COMPLETED)
            dispatcher.request_stop()
            self.stopping.set()
            await stop
            await _end(routing, keeping, within_s=settings.drain_s)
        finally:
            await self._executor.close()


async def _end(*tasks: asyncio.Task[None], within_s: float) -> None:
    """Wait for what is in progress; what Redis holds up longer is for other dispatchers, who adopt it."""
    ended, late = await asyncio.wait(tasks, timeout=within_s)
    if late:
        log.warning("not finished within %.0f s, as Redis does not serve: others adopt it", within_s)
        for task in late:
            task.cancel()
        await asyncio.wait(late)
    for task in ended:
        task.result()
