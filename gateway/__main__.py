"""Entry point of the gateway: `python -m gateway [options of vLLM's server]`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from gateway.server import serve
from l4queue.config import load_settings
from l4queue.errors import L4QueueError
from l4queue.logs import start_logging, take_log_format

__all__ = ("main",)


def main(arguments: Sequence[str] = ()) -> int:
    """Serve until a signal; the exit code says whether it ended well. `--log-format` wins over L4_LOG_FORMAT."""
    options = take_log_format(arguments)
    try:
        settings = load_settings()
        start_logging(settings.log_format)
        asyncio.run(serve(settings, options))
    except L4QueueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
