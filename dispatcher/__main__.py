"""Entry point of one dispatcher: `python -m dispatcher`. SIGTERM and SIGINT end it after the round in progress."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress

from dispatcher.routing.service import Dispatcher
from dispatcher.routing.tokenizer import PromptTokenizer
from l4queue.config import Settings, load_settings
from l4queue.errors import L4QueueError, ServiceUnavailable
from l4queue.failure import fail
from l4queue.logs import start_logging, take_log_format
from l4queue.metrics import MetricsServer
from l4queue.model_config import trusts_remote_code, with_model_facts
from l4queue.observe.health import dispatcher_alive
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.upkeep import Upkeep

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


async def serve(settings: Settings) -> None:
    """Run one dispatcher until a signal."""
    settings = await asyncio.to_thread(with_model_facts, settings)
    path = settings.tokenizer or settings.model
    tokenizer = await asyncio.to_thread(
        PromptTokenizer,
        path,
        max_model_len=settings.max_model_len,
        trust_remote_code=trusts_remote_code(settings),
    )
    executor = AsyncExecutor(settings.redis_url, retry_s=None)
    name = f"{socket.gethostname()}-{os.getpid()}"
    dispatcher = Dispatcher(settings=settings, executor=executor, tokenizer=tokenizer, name=name)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    try:
        with MetricsServer(settings, dispatcher.counters):
            log.info("dispatcher %s ready: tokenizer %s, limit %d tokens", name, path, settings.max_model_len)
            routing = asyncio.create_task(dispatcher.run())
            upkeep = asyncio.create_task(
                keep_up(dispatcher, Upkeep(settings=settings, executor=executor), executor, stopping)
            )
            stop = asyncio.create_task(stopping.wait())
            await asyncio.wait({routing, upkeep, stop}, return_when=asyncio.FIRST_COMPLETED)
            dispatcher.request_stop()
            stopping.set()
            await _end(routing, upkeep, within_s=settings.drain_s)
    finally:
        await executor.close()


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


def main(arguments: Sequence[str] = ()) -> int:
    """Entry point; the exit code says whether it ended well. `--log-format` wins over L4_LOG_FORMAT."""
    take_log_format(arguments)
    try:
        settings = load_settings()
        start_logging(settings.log_format)
        asyncio.run(serve(settings))
    except L4QueueError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
