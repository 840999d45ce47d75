"""The engine inside a Celery worker: one thread for life, started, drained and watched by bootsteps."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from celery import bootsteps
from celery.platforms import EX_FAILURE
from celery.utils.sysinfo import load_average
from celery.worker import heartbeat
from celery.worker import state as celery_state
from pydantic import JsonValue

from l4queue.errors import ConfigError
from l4queue.failure import EXIT_CONFIG, EXIT_FAILED
from workers.process.guard import end_process
from workers.telemetry.observer import RequestView
from workers.telemetry.snapshot import WorkerSnapshot

__all__ = ("EngineHost", "EngineThread", "ExitGuard", "RequestHeart", "WorkerLike")

log = logging.getLogger("l4queue.host")
_COLD_S = 1.0  # for the loop to end on a cold shutdown
_FAILURE_EXIT_S = 10.0  # for Celery to stop after the engine has failed


class WorkerLike(Protocol):
    """Interface of a worker as its host uses it; `workers.loop.worker.Worker` is the real one."""

    async def run(self) -> None: ...

    def request_stop(self) -> None: ...

    def request_cancel(self, request_id: str) -> None: ...

    def stats(self) -> dict[str, JsonValue]: ...

    def snapshots(self) -> list[WorkerSnapshot]: ...

    def active(self) -> list[RequestView]: ...


class ExitGuard:
    """Ends the process by force, children included, when it has not ended in time.

    `arm` is safe in signal handlers: it takes no lock.
    """

    def __init__(self) -> None:
        self._deadline_s = float("inf")
        self._exit_code = EXIT_FAILED
        self._pipe = os.pipe()
        threading.Thread(target=self._watch, name="l4-exit-guard", daemon=True).start()

    def arm(self, after_s: float, *, exit_code: int = EXIT_FAILED) -> None:
        """The process is to be gone in `after_s` seconds; the earliest deadline counts."""
        self._exit_code = self._exit_code if exit_code == EXIT_FAILED else exit_code
        self._deadline_s = min(self._deadline_s, time.monotonic() + after_s)
        os.write(self._pipe[1], b"x")

    def _watch(self) -> None:
        os.read(self._pipe[0], 1)
        while (left_s := self._deadline_s - time.monotonic()) > 0:
            if select.select([self._pipe[0]], [], [], left_s)[0]:
                os.read(self._pipe[0], 1)
        log.critical("still here after the deadline of its end")
        self.end_now()

    def end_now(self) -> NoReturn:
        """End this process and its children at once."""
        end_process(self._exit_code)


class EngineThread:
    """A worker with its engine on an event loop in a thread of its own, for the life of the process."""

    def __init__(self, make: Callable[[], WorkerLike], *, guard: ExitGuard) -> None:
        self._make = make
        self._guard = guard
        self._worker: WorkerLike | None = None
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="l4-engine", daemon=True)
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Build the worker and run it. A second start does nothing: the engine outlives every consumer."""
        if self._thread.ident is None and not self._is_stopping:
            self._thread.start()

    def request_stop(self) -> None:
        """Drain and end; safe in signal handlers, in any thread, at any time, and twice."""
        self._is_stopping = True
        if self._worker is not None:
            self._worker.request_stop()

    def join(self, timeout_s: float) -> bool:
        """Wait for the end; whether it has come."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def request_cancel(self, request_id: str) -> None:
        """Cancel a request, waiting or running, here or elsewhere."""
        if self._worker is not None and self._thread.is_alive():
            self._worker.request_cancel(request_id)

    def stats(self) -> dict[str, JsonValue]:
        """The worker's stats; before it is built only that it loads."""
        return {"engine": "loading"} if self._worker is None else self._worker.stats()

    def snapshots(self) -> list[WorkerSnapshot]:
        """Snapshots of the workers here, for metrics; none before they serve."""
        return [] if self._worker is None else self._worker.snapshots()

    def active(self) -> list[RequestView]:
        """The requests running here."""
        return [] if self._worker is None else self._worker.active()

    def _run(self) -> None:
        try:
            self._worker = self._make()
            if not self._is_stopping:
                asyncio.run(self._worker.run())
            if not self._is_stopping:
                raise RuntimeError("the engine's loop ended by itself")
        except ConfigError as error:  # told in full when the process ends
            log.critical("the engine cannot be set up: %s", error)
            self._end(error, exit_code=EXIT_CONFIG)
        except BaseException as error:  # whatever it was, this process has no engine any more and must end
            log.critical("the engine ended: %s: %s", type(error).__name__, error, exc_info=error)
            self._end(error, exit_code=EXIT_FAILED)

    def _end(self, error: BaseException, *, exit_code: int) -> None:
        self.failure = error
        self._guard.arm(_FAILURE_EXIT_S, exit_code=exit_code)
        celery_state.should_stop = EX_FAILURE


class EngineHost(bootsteps.StartStopStep):  # type: ignore[misc]  # celery has no types
    """Worker-level step: owns the engine thread. Lost brokers restart the consumer, never this."""

    label = "Engine"

    def __init__(
        self,
        parent: Any,
        *,
        engine: EngineThread,
        drain_s: float,
        stats: Callable[[], dict[str, JsonValue]],
        **_: Any,
    ) -> None:
        self.engine = engine
        self.drain_s = drain_s
        self.stats = stats
        super().__init__(parent)

    def start(self, parent: Any) -> None:
        """Start the engine; Celery's signal handlers are installed by now."""
        # Celery would re-execute this program on SIGHUP, which an engine does not survive.
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))
        self.engine.start()

    def close(self, parent: Any) -> None:
        """A shutdown begins: drain while Celery closes its own things."""
        self.engine.request_stop()

    def stop(self, parent: Any) -> None:
        """Warm shutdown: wait for the drain."""
        if not self.engine.join(self.drain_s):
            log.error("the engine has not drained in %.0f s", self.drain_s)

    def terminate(self, parent: Any) -> None:
        """Cold shutdown: give up fast; leases run out and others go on from what is written."""
        self.engine.join(_COLD_S)

    def info(self, parent: Any) -> dict[str, JsonValue]:
        """Stats for `celery inspect stats` and Flower's worker page, beside Celery's own."""
        return self.stats()


class _Heart(heartbeat.Heart):  # type: ignore[misc]  # celery has no types
    """Celery's heartbeats with our counts: requests running and finished."""

    def __init__(self, timer: Any, eventer: Any, engine: EngineThread) -> None:
        self._engine = engine
        super().__init__(timer, eventer)

    def _send(self, event: str, retry: bool = True) -> Any:
        stats = self._engine.stats()
        return self.eventer.send(
            event,
            freq=self.interval,
            active=stats.get("running", 0),
            processed=stats.get("finished", 0),
            loadavg=load_average(),
            retry=retry,
            **celery_state.SOFTWARE_INFO,
        )


class RequestHeart(bootsteps.StartStopStep):  # type: ignore[misc]  # celery has no types
    """Consumer-level step: borrows the consumer's event dispatcher for heartbeats."""

    requires = ("celery.worker.consumer.events:Events",)

    def __init__(self, consumer: Any, *, engine: EngineThread, **_: Any) -> None:
        self._engine = engine
        consumer.heart = None
        super().__init__(consumer)

    def start(self, consumer: Any) -> None:
        """Once for each connection to the broker."""
        consumer.heart = _Heart(consumer.timer, consumer.event_dispatcher, self._engine)
        consumer.heart.start()

    def stop(self, consumer: Any) -> None:
        """The connection is gone, or this is the end."""
        heart, consumer.heart = consumer.heart, None
        if heart is not None:
            heart.stop()

    shutdown = stop
