"""Requests as Celery task events for Flower: bounded, batched, off the engine's loop."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from celery import Celery
from celery.events.dispatcher import EventDispatcher
from pydantic import JsonValue

from l4queue.compat import TOTALS
from l4queue.observe.task_view import task_arguments
from workers.telemetry.observer import LEASE_ENDED, PREVIEW_CHARS, RequestView

__all__ = ("Budget", "EventSender")

log = logging.getLogger("l4queue.events")
CAPACITY = 10_000
"""Most events that wait to be sent; beyond it the oldest are dropped and counted."""
SAMPLE_ABOVE_PER_S = 500.0
"""Requests per second whose start is shown; beyond it a request appears with its outcome."""
OUTCOMES_FACTOR = 4
"""So many times that, successes are left out too. Failures, revocations and retries never are."""
_COUNTED = ("task-received", "task-succeeded", "task-failed", "task-revoked", "task-retried")
_TOTALS_S = 1.0  # between two events with changed totals
_REPEAT_S = 5.0  # for a Flower that has just begun
_FLUSH_S = 0.1  # in which events gather for one message
_BATCH = 200  # events of one message
_RETRY_S = 1.0  # between two tries to reach the broker
_LISTEN_S = 1.0  # between two looks whether anybody listens; a Flower that begins misses so much

Event = dict[str, Any]


class Budget:
    """A token bucket of one second's burst. Not thread-safe."""

    def __init__(self, rate_per_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate_per_s = rate_per_s
        self._clock = clock
        self._left = rate_per_s
        self._at_s = clock()

    def take(self) -> bool:
        """Whether one more fits now; if so it is counted."""
        now_s = self._clock()
        self._left = min(self._rate_per_s, self._left + (now_s - self._at_s) * self._rate_per_s)
        self._at_s = now_s
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


class EventSender:
    """An Observer whose callbacks only append to a bounded queue; a thread of its own sends in batches.

    It has its own broker connection, so neither a lost broker nor a restart of Celery's consumer is felt by
    the engine, and nothing piles up beyond `capacity`. Outcome events repeat what the start said: they are
    complete when the start was dropped or left out. While nobody listens, starts and successes are not made.
    """

    def __init__(
        self,
        app: Celery,
        *,
        hostname: str,
        task_name: str,
        show_outputs: bool = False,
        capacity: int = CAPACITY,
        sample_above_per_s: float = SAMPLE_ABOVE_PER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._hostname = hostname
        self._task_name = task_name
        self._show_outputs = show_outputs
        self._waiting: deque[Event] = deque(maxlen=capacity)
        self._detail = Budget(sample_above_per_s, clock=clock)
        self._outcomes = Budget(sample_above_per_s * OUTCOMES_FACTOR, clock=clock)
        self._shown: set[str] = set()
        self._run_id = uuid.uuid4().hex
        self._totals = Counter(dict.fromkeys(_COUNTED, 0))  # keys never change: another thread copies it
        self._told: Counter[str] = Counter()
        self._told_s = float("-inf")
        self._is_away = False
        self._is_heard = True  # until the first look
        self._looked_s = float("-inf")
        self._wake = threading.Event()
        self._urgent = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="l4-events", daemon=True)
        self._unsent: list[Event] = []
        self._num_sent = 0
        self._num_dropped = 0
        self._num_left_out = 0
        self._num_outages = 0

    # -- Observer: called on the engine's event loop

    def request_started(self, view: RequestView) -> None:
        """task-received and task-started, within the detail budget."""
        self._count("task-received")
        if not self._is_heard:
            return
        if not self._detail.take():
            self._num_left_out += 2
            return
        self._shown.add(view.request_id)
        now_s = time.time()
        about = self._about(view, started_s=now_s)
        self._put("task-received", view, at_s=now_s, received=_accepted_s(view, now_s), **about)
        self._put("task-started", view, at_s=now_s)

    def request_succeeded(self, view: RequestView, *, output_tokens: int, runtime_s: float, text: str) -> None:
        """task-succeeded with a short result, without the text unless it may be shown.

        A request that is shown to run is shown to end.
        """
        self._count("task-succeeded")
        is_shown = self._forget(view)
        if not self._is_heard:
            return
        if not self._outcomes.take() and not is_shown:
            self._num_left_out += 1
            return
        result = f"{output_tokens} tokens, {runtime_s:.1f} s"
        if self._show_outputs and text:
            result += f": {text[:PREVIEW_CHARS]!r}"
        self._put_outcome("task-succeeded", view, runtime_s=runtime_s, result=result, runtime=round(runtime_s, 4))

    def request_failed(self, view: RequestView, *, error: str, runtime_s: float) -> None:
        """task-failed."""
        self._count("task-failed")
        self._forget(view)
        self._put_outcome(
            "task-failed", view, runtime_s=runtime_s, exception=error[:2000], runtime=round(runtime_s, 4)
        )

    def request_cancelled(self, view: RequestView) -> None:
        """task-revoked."""
        self._count("task-revoked")
        self._forget(view)
        about = self._about(view, started_s=None)
        self._put("task-revoked", view, terminated=True, signum=None, expired=False, **about)

    def request_moved(self, view: RequestView, *, why: str) -> None:
        """task-retried, sent at once: the next worker's events must not be overtaken by it.

        A worker that has lost its lease says nothing: the request may long be finished elsewhere, and Flower
        takes a retry for the latest state whenever it comes.
        """
        self._forget(view)
        if why != LEASE_ENDED:
            self._count("task-retried")
            self._put("task-retried", view, exception=why, traceback=None)
            self._urgent.set()

    # -- Life

    def start(self) -> None:
        """Begin to send. Events put before are kept."""
        self._thread.start()

    def close(self, timeout_s: float = 2.0) -> None:
        """Send what waits, if the broker is there, and end. Safe to call twice, or before `start`."""
        self._stopping.set()
        self._urgent.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def stats(self) -> dict[str, JsonValue]:
        """Counters: sent, waiting, dropped (queue full), left out (above the rates), broker outages."""
        return {
            "events_sent": self._num_sent,
            "events_waiting": len(self._waiting) + len(self._unsent),
            "events_dropped": self._num_dropped,
            "events_left_out": self._num_left_out,
            "events_outages": self._num_outages,
        }

    # -- Private

    def _count(self, type_: str) -> None:
        self._totals[type_] += 1

    def _forget(self, view: RequestView) -> bool:
        """Whether the start of this request was shown; it has ended here."""
        is_shown = view.request_id in self._shown
        self._shown.discard(view.request_id)
        return is_shown

    def _about(self, view: RequestView, *, started_s: float | None) -> Event:
        """The facts of a request; also how long it waited, where this is its first worker."""
        waited_s = None
        if started_s is not None and view.epoch <= 1:
            waited_s = started_s - _accepted_s(view, started_s)
        told: dict[str, object] = {
            "stage": view.stage,
            "range": view.range_text,
            "prompt_tokens": view.prompt_tokens,
            "max_tokens": view.max_tokens,
        }
        if view.num_resumed:
            told["resumed_tokens"] = view.num_resumed
        if waited_s is not None:
            told["waited_s"] = round(waited_s, 3)
        return {
            "name": self._task_name,
            "args": task_arguments(
                prompt_tokens=view.prompt_tokens,
                max_tokens=view.max_tokens,
                stage=str(view.stage),
                waited_s=waited_s,
                more=f" ({view.range_text})",
            ),
            "kwargs": repr(told),
            "retries": max(0, view.epoch - 1),
        }

    def _put_outcome(self, type_: str, view: RequestView, *, runtime_s: float, **fields: Any) -> None:
        now_s = time.time()
        started_s = now_s - runtime_s
        began = {"received": _accepted_s(view, started_s), "started": started_s}
        self._put(type_, view, at_s=now_s, **began, **self._about(view, started_s=started_s), **fields)

    def _put(self, type_: str, view: RequestView, *, at_s: float | None = None, **fields: Any) -> None:
        if len(self._waiting) == self._waiting.maxlen:
            self._num_dropped += 1
        stamp = time.time() if at_s is None else at_s
        self._waiting.append({"type": type_, "uuid": view.request_id, "timestamp": stamp, **fields})
        if not self._wake.is_set():
            self._wake.set()

    def _run(self) -> None:
        """Collect for a moment, send, repeat. What the broker did not take is sent again, in order."""
        dispatcher: EventDispatcher | None = None
        while not self._stopping.is_set() or self._waiting or self._must_tell():
            if not self._stopping.is_set():
                self._wake.wait(_TOTALS_S)
                self._urgent.wait(_FLUSH_S)
            self._wake.clear()
            self._urgent.clear()
            try:
                if time.monotonic() - self._looked_s > _LISTEN_S:
                    dispatcher = dispatcher or self._connect()
                    self._listen(dispatcher)
                while self._unsent or self._waiting:
                    self._unsent = self._unsent or self._next_batch()
                    dispatcher = dispatcher or self._connect()
                    self._send(dispatcher, self._unsent)
                    self._unsent = []
                if self._must_tell():
                    dispatcher = dispatcher or self._connect()
                    self._tell(dispatcher)
                self._is_away = False
            except Exception as error:  # the edge of this loop: whatever the broker does, the engine goes on
                self._num_outages += 1
                level = logging.DEBUG if self._is_away else logging.WARNING
                log.log(level, "events wait, the broker cannot be reached: %s", error)
                self._is_away = True
                _close(dispatcher)
                dispatcher = None
                self._wake.set()
                if self._stopping.wait(_RETRY_S):
                    break
        _close(dispatcher)

    def _must_tell(self) -> bool:
        """Totals are told when they have changed, at the end, and now and then."""
        if not self._is_heard:
            return False
        age_s = time.monotonic() - self._told_s
        has_changed = self._totals != self._told
        return age_s > _REPEAT_S or (has_changed and (age_s > _TOTALS_S or self._stopping.is_set()))

    def _listen(self, dispatcher: EventDispatcher) -> None:
        """See whether anybody listens. Who has just begun is told the totals at once."""
        is_heard, self._looked_s = _has_listeners(dispatcher), time.monotonic()
        if is_heard and not self._is_heard:
            self._told_s = float("-inf")
        self._is_heard = is_heard

    def _tell(self, dispatcher: EventDispatcher) -> None:
        totals = Counter(self._totals)
        dispatcher.send(TOTALS, run=self._run_id, totals=dict(totals))
        self._told, self._told_s = totals, time.monotonic()

    def _next_batch(self) -> list[Event]:
        return [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]

    def _connect(self) -> EventDispatcher:
        # Timeouts, because a broker that swallows packets must not hold this thread for ever.
        connection = self._app.connection_for_write(
            transport_options={"socket_timeout": 5.0, "socket_connect_timeout": 5.0}
        )
        return EventDispatcher(
            connection,
            hostname=self._hostname,
            app=self._app,
            buffer_while_offline=False,
            buffer_group=frozenset({"task"}),
            buffer_limit=_BATCH + 1,
        )

    def _send(self, dispatcher: EventDispatcher, events: list[Event]) -> None:
        for event in events:
            fields = dict(event)
            dispatcher.send(fields.pop("type"), **fields)
        dispatcher.flush(errors=False)
        self._num_sent += len(events)


def _accepted_s(view: RequestView, started_s: float) -> float:
    """When a request was accepted, for Flower's "received"; not after its start, as two clocks may have it."""
    return min(started_s, view.submitted_ms / 1000)


def _has_listeners(dispatcher: EventDispatcher) -> bool:
    """Whether a queue is bound to the exchange of events, where the broker's transport knows that."""
    channel = dispatcher.connection.default_channel
    if not hasattr(channel, "get_table"):
        return True
    try:
        return bool(channel.get_table(dispatcher.exchange.name))
    except KeyError:  # nobody has declared it
        return False


def _close(dispatcher: EventDispatcher | None) -> None:
    if dispatcher is not None:
        connection = dispatcher.connection
        dispatcher.close()
        connection.release()
