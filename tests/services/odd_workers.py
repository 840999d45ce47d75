"""Workers that misbehave, hosted as real ones are: `python odd_workers.py dies|hangs|ends|fails`."""

from __future__ import annotations

import asyncio
import logging
import sys
import time

from pydantic import JsonValue

from l4queue.config import Settings, load_settings
from l4queue.errors import ConfigError
from workers.__main__ import serve
from workers.engine.base import EngineDied
from workers.telemetry.observer import Observer, RequestView
from workers.telemetry.snapshot import WorkerSnapshot


class OddWorker:
    """Ready at once; then it does what its name says. A cancellation is its cue."""

    def __init__(self, fate: str) -> None:
        self._fate = fate
        self._cue = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self) -> None:
        self._loop = asyncio.get_running_loop()
        if self._fate == "hangs":
            child = await asyncio.create_subprocess_exec("sleep", "600")
            print(f"child {child.pid}", flush=True)
        await self._cue.wait()
        if self._fate == "dies":
            raise EngineDied("the engine's core has ended")
        while self._fate == "hangs":
            time.sleep(1)  # noqa: ASYNC251 - the loop itself hangs, as it does in a stuck kernel

    def request_stop(self) -> None:
        self.request_cancel("")

    def request_cancel(self, request_id: str) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._cue.set)

    def stats(self) -> dict[str, JsonValue]:
        return {"engine": "odd"}

    def snapshots(self) -> list[WorkerSnapshot]:
        return []

    def active(self) -> list[RequestView]:
        return []


def make(settings: Settings, observer: Observer) -> OddWorker:
    """The worker that the command line names."""
    if sys.argv[1] == "fails":
        raise ConfigError("no such model: set L4_MODEL")
    return OddWorker(sys.argv[1])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    sys.exit(serve(load_settings(), make=make, margin_s=1.0))
