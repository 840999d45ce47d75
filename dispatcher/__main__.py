"""Entry point of one dispatcher: `python -m dispatcher`. SIGTERM and SIGINT end it after the round in progress."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence

from dispatcher.host import DispatcherHost
from l4queue.config import Settings, load_settings
from l4queue.errors import L4QueueError
from l4queue.failure import fail
from l4queue.logs import start_logging, take_log_format
from l4queue.metrics import MetricsServer


async def serve(settings: Settings) -> None:
    """Run one dispatcher until a signal."""
    host = await DispatcherHost.open(settings)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, host.stopping.set)
    with MetricsServer(settings, host.counters):
        await host.run()


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
