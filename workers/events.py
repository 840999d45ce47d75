"""Requests as Celery task events, for Flower, sent from a bounded queue by a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Any

from l4queue.config import Settings
from workers.app import TASK_NAME
from workers.observer import RequestView

__all__ = ("EventSender",)

log = logging.getLogger("l4queue.events")
_QUEUE_LIMIT = 20_000
_BATCH = 500
_PAUSE_S = 0.05
_RETRY_S = 1.0
_OUTCOMES = frozenset({"task-succeeded", "task-failed", "task-revoked"})

Event = dict[str, Any]


class EventSender:
    """An Observer that sends task events. Its callbacks only append to a queue.

    When events come faster than they leave (the broker is away, or Flower's 7,000 a second are exceeded), the
    oldest are dropped and counted in `num_dropped`. Above `sample_above_per_s` only outcomes are sent, for all
    requests: each still appears once, with its final state.
    """

    def __init__(self, settings: Settings, app: Any, *, hostname: str) -> None:
        self._app = app
        self._hostname = hostname
        self._shows_text = settings.flower_show_prompts
        self._sample_above_per_s = settings.flower_sample_above_per_s
        self._queue: deque[tuple[str, Event]] = deque(maxlen=_QUEUE_LIMIT)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="l4-events", daemon=True)
        self._second = 0
        self._num_this_second = 0
        self.num_sent = 0
        self.num_dropped = 0

    def start(self) -> None:
        """Begin sending."""
        self._thread.start()

    def stop(self, *, timeout_s: float) -> None:
        """Send what is queued, for at most `timeout_s`, and end."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def request_started(self, view: RequestView) -> None:
        """The request appears as received and started."""
        if self._is_crowded():
            return
        self._received(view)
        self._put("task-started", view)

    def request_succeeded(self, view: RequestView, *, output_tokens: int, runtime_s: float, text: str) -> None:
        """SUCCESS with a short result."""
        result = f"{output_tokens} tokens in {runtime_s:.2f} s"
        if self._shows_text and text:
            result += f": {text}"
        if self._is_crowded():
            self._received(view)
        self._put("task-succeeded", view, result=result, runtime=runtime_s)

    def request_failed(self, view: RequestView, *, error: str, runtime_s: float) -> None:
        """FAILURE with the error."""
        self._put("task-failed", view, exception=error, traceback="", runtime=runtime_s)

    def request_cancelled(self, view: RequestView) -> None:
        """REVOKED."""
        self._put("task-revoked", view, terminated=True, signum=None, expired=False)

    def request_moved(self, view: RequestView, *, why: str) -> None:
        """RETRY: another worker goes on with it."""
        self._put("task-retried", view, exception=f"continues elsewhere: {why}", traceback="")

    def _received(self, view: RequestView) -> None:
        arguments = {
            "prompt_tokens": view.prompt_tokens,
            "max_tokens": view.max_tokens,
            "stage": view.stage,
            "range": view.range_text,
            "resumed_at": view.num_resumed,
        }
        if view.prompt is not None:
            arguments["prompt"] = view.prompt
        self._put(
            "task-received",
            view,
            name=TASK_NAME,
            args="()",
            kwargs=repr(arguments),
            retries=view.epoch - 1,
            eta=None,
            expires=None,
            root_id=view.request_id,
            parent_id=None,
        )

    def _put(self, kind: str, view: RequestView, **fields: Any) -> None:
        if len(self._queue) == _QUEUE_LIMIT:
            self.num_dropped += 1
        self._queue.append((kind, {"uuid": view.request_id, "timestamp": time.time(), **fields}))

    def _is_crowded(self) -> bool:
        """Whether this second has seen more requests than are shown in detail."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._num_this_second = second, 0
        self._num_this_second += 1
        return self._num_this_second > self._sample_above_per_s

    def _run(self) -> None:
        while not (self._stopping.is_set() and not self._queue):
            try:
                with self._app.connection_for_write() as connection:
                    self._send_on(connection)
            except Exception as error:  # whatever the broker does, the engine goes on
                log.warning("events wait for the broker: %s", error)
                if self._stopping.wait(_RETRY_S):
                    return

    def _send_on(self, connection: Any) -> None:
        dispatcher = self._app.events.Dispatcher(connection, hostname=self._hostname, buffer_while_offline=False)
        while True:
            for _ in range(min(_BATCH, len(self._queue))):
                kind, fields = self._queue[0]
                dispatcher.send(kind, **fields)
                self._queue.popleft()
                self.num_sent += 1
            if not self._queue and self._stopping.wait(_PAUSE_S):
                return
