"""A worker whose engine misbehaves when it admits certain requests: `python slow_workers.py`, set by environment.

The first letter of a prompt says how: P pauses for `L4_TEST_PAUSE_S` without holding the interpreter, H computes
for so long and holds it, F never comes back, E raises. P and H do so once for each request.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import sys
import time
from typing import ClassVar

from l4queue.config import load_settings
from tests.services.pipeline import COST, MAX_LEN
from workers.engine.base import EngineRequest
from workers.engine.emulated.engine import EmulatedEngine
from workers.loop.text import no_text
from workers.loop.worker import Worker
from workers.telemetry.observer import NullObserver

PAUSE_S = float(os.environ.get("L4_TEST_PAUSE_S", "3"))


def hold(least_s: float) -> None:
    """Compute at least so long in one call that lets no other thread run: a pattern that backtracks."""
    num, began_s = 16, time.monotonic()
    while time.monotonic() - began_s < least_s:
        num, began_s = num + 1, time.monotonic()
        re.match(r"(a+)+$", "a" * num + "b")


class SlowEngine(EmulatedEngine):
    """Does on the loop what a foreign library may do there."""

    seen: ClassVar[set[str]] = set()

    async def add(self, request: EngineRequest) -> None:
        name, letter = request.request_id.rpartition(":")[0], chr(request.token_ids[0])
        if letter in "PH" and name not in self.seen:
            self.seen.add(name)
            print(f"admits {letter}", flush=True)
            time.sleep(PAUSE_S) if letter == "P" else hold(PAUSE_S)  # noqa: ASYNC251 - that is the fault
        while letter == "F":
            time.sleep(1.0)  # noqa: ASYNC251 - that is the fault
        if letter == "E":
            raise RuntimeError("no engine takes this")
        await super().add(request)


async def _serve() -> None:
    settings = load_settings()
    worker = Worker(
        settings=settings,
        engine=SlowEngine(COST, speed=settings.emulated_speed, max_model_len=MAX_LEN),
        observer=NullObserver(),
        worker_id=settings.worker_id,
        text=no_text,
        cost=COST,
    )
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.request_stop)
    await worker.run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(threadName)s %(message)s")
    asyncio.run(_serve())
    sys.exit(0)
