"""A GPU worker is a Celery worker: a bootstep owns the engine's thread, control commands reach into it."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from typing import Any, Protocol

from celery import bootsteps, signals
from celery.worker import state as celery_state
from celery.worker.control import Panel
from pydantic import JsonValue

from l4queue.config import Settings
from workers.app import TASK_NAME
from workers.events import EventSender
from workers.observer import Observer, RequestView

__all__ = ("Host", "WorkerLike")

log = logging.getLogger("l4queue.worker")
_MARGIN_S = 10.0


class WorkerLike(Protocol):
    """What a host needs of a worker."""

    async def run(self) -> None:
        """Serve until stopped."""

    def request_stop(self) -> None:
        """Thread-safe."""

    def request_cancel(self, request_id: str) -> None:
        """Thread-safe."""

    def stats(self) -> dict[str, JsonValue]:
        """Thread-safe."""

    def active(self) -> list[RequestView]:
        """Thread-safe."""


class Host:
    """Runs one worker on a thread with its own event loop for the life of the process.

    Celery's consumer may lose its broker and come back: the engine does not notice. When the worker ends by
    itself the process ends too, with exit code 1 unless it had been asked to stop.
    """

    def __init__(self, settings: Settings, app: Any, make: Callable[[Observer], WorkerLike], *, name: str) -> None:
        self._settings = settings
        self._app = app
        self._make = make
        self.nodename = name
        self.failure: BaseException | None = None
        self._events = EventSender(settings, app, hostname=name)
        self._worker: WorkerLike | None = None
        self._stop_requested = threading.Event()
        self._thread = threading.Thread(target=self._run, name="l4-engine", daemon=True)

    def install(self) -> None:
        """Hook into Celery: the bootstep, the control commands, the moment a shutdown begins."""
        host = self

        class EngineStep(bootsteps.StartStopStep):  # type: ignore[misc] # Celery is untyped
            """Starts and stops the engine with the Celery worker."""

            requires = ("celery.worker.components:Pool",)

            def start(self, parent: Any) -> None:
                host.start()

            def stop(self, parent: Any) -> None:
                host.stop()

            terminate = stop

        self._app.steps["worker"].add(EngineStep)
        Panel.data["revoke"] = self._revoke
        Panel.data["active"] = Panel.data["dump_active"] = self._active
        Panel.data["stats"] = self._stats
        signals.worker_shutting_down.connect(self._on_shutting_down, weak=False)

    def start(self) -> None:
        """Start the threads; the engine loads while Celery already answers."""
        self._events.start()
        self._thread.start()

    def stop(self) -> None:
        """Drain and wait, at most the drain deadline and a margin."""
        self._ask_to_stop()
        if self._thread.is_alive():
            self._thread.join(self._settings.drain_s + _MARGIN_S)
        self._events.stop(timeout_s=2.0)

    def _run(self) -> None:
        try:
            self._worker = self._make(self._events)
            if not self._stop_requested.is_set():
                asyncio.run(self._worker.run())
        except BaseException as error:  # the thread's edge: the process must not live on without its engine
            self.failure = error
            log.error("worker ends: %s", error, exc_info=error)
        if not self._stop_requested.is_set():
            celery_state.should_stop = 1
            self._exit_after(_MARGIN_S)

    def _ask_to_stop(self) -> None:
        self._stop_requested.set()
        if self._worker is not None:
            self._worker.request_stop()

    def _on_shutting_down(self, **_: Any) -> None:
        """A signal or a remote shutdown has arrived: drain at once, and never hang."""
        if not self._stop_requested.is_set():
            self._ask_to_stop()
            self._exit_after(self._settings.drain_s + 2 * _MARGIN_S)

    def _exit_after(self, seconds: float) -> None:
        timer = threading.Timer(seconds, os._exit, (1,))
        timer.daemon = True
        timer.start()

    def _revoke(self, state: Any, task_id: Any, **_: Any) -> dict[str, str]:
        """`revoke` from Flower or `celery control`: cancels the request, waiting or running."""
        ids = [task_id] if isinstance(task_id, str) else list(task_id)
        for request_id in ids:
            if self._worker is not None:
                self._worker.request_cancel(request_id)
        return {"ok": f"cancelling {', '.join(ids)}"}

    def _active(self, state: Any, **_: Any) -> list[dict[str, Any]]:
        """`inspect active`: the requests that run in the engine."""
        return [
            {
                "id": view.request_id,
                "name": TASK_NAME,
                "type": TASK_NAME,
                "args": [],
                "kwargs": {
                    "prompt_tokens": view.prompt_tokens,
                    "max_tokens": view.max_tokens,
                    "stage": view.stage,
                },
                "hostname": self.nodename,
                "time_start": None,
                "acknowledged": True,
                "delivery_info": {"routing_key": f"stage {view.stage}"},
                "worker_pid": os.getpid(),
            }
            for view in (self._worker.active() if self._worker else [])
        ]

    def _stats(self, state: Any, **_: Any) -> dict[str, Any]:
        """`inspect stats`: Celery's, with what the engine does."""
        known: dict[str, Any] = dict(state.consumer.controller.stats())
        own = self._worker.stats() if self._worker else {"engine": "loading"}
        events = {"events_sent": self._events.num_sent, "events_dropped": self._events.num_dropped}
        return {**known, **{f"l4_{name}": value for name, value in {**own, **events}.items()}}
