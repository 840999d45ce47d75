"""Requests that no worker tells of, for Flower: waiting ones, and ones that ended before a worker took them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from l4queue.config import Settings
from l4queue.errors import L4QueueError
from l4queue.models import RequestState
from l4queue.observe.task_view import task_arguments, task_name
from l4queue.protocol.executor import Executor
from l4queue.protocol.keys import Keys
from l4queue.protocol.reads import FinishedRequest, Reads
from l4queue.protocol.records import RequestRecord

__all__ = ("ENDED", "WAITING", "QueueFollower")

log = logging.getLogger("l4queue.flower")
WAITING, ENDED = "l4-waiting", "l4-ended"
"""Types of the events that this makes; they exist in Flower's process only."""
_LOOK_S = 1.0  # chosen: Flower's own page is refreshed less often
_MOST_WAITING = 300
"""Waiting requests of one queue that are shown, from its head. Chosen: each costs a read, a page shows fewer."""
_MOST_ENDED = 5_000  # of one look: beyond it only the latest
_MOST_OPEN = 50_000  # waiting requests whose end is told; chosen: some MB
Event = dict[str, Any]


class QueueFollower:
    """Looks at the queue every second and emits what is new: `WAITING` and `ENDED` events, oldest first.

    An end is emitted one look late: the worker that settled it, if there was one, is first. `emit` is called on
    this object's thread.
    """

    def __init__(self, settings: Settings, emit: Callable[[Event], None]) -> None:
        self._reads = Reads(Keys(settings.namespace))
        self._executor = Executor(settings.redis_url, retry_s=0.0)
        self._emit = emit
        self._name = task_name(settings)
        self._told: set[str] = set()
        self._open: set[str] = set()  # told to wait, and not told to have ended
        self._last_id: str | None = None
        self._ended: list[FinishedRequest] = []
        self._thread = threading.Thread(target=self._run, name="queue-follower", daemon=True)

    def start(self) -> None:
        """Begin to look; it ends with the process."""
        self._thread.start()

    def look(self) -> None:
        """Look once; L4QueueError where Redis does not serve."""
        if self._last_id is None:
            self._last_id = self._executor.run(self._reads.last_finished_id())
        self._look_at_waiting()
        late, self._ended = self._ended, []
        newest, ended = self._executor.run(self._reads.latest_finished(self._last_id, count=_MOST_ENDED))
        self._last_id = newest
        self._ended = ended[::-1]
        self._tell_ended(late)

    def _run(self) -> None:
        while True:
            try:
                self.look()
            except L4QueueError as error:  # Flower shows what workers tell meanwhile
                log.debug("the queue cannot be read: %s", error)
            time.sleep(_LOOK_S)

    def _look_at_waiting(self) -> None:
        [backlog] = self._executor.run_many([self._reads.backlog()])
        calls = [self._reads.inbox_ids(limit=_MOST_WAITING)]
        calls += [self._reads.queue_ids(stage, limit=_MOST_WAITING) for stage in backlog]
        waiting = [name for names in self._executor.run_many(calls) for name in names]
        new = [name for name in waiting if name not in self._told]
        self._told.intersection_update(waiting)
        for record in self._records(new):
            if record.state in (RequestState.SUBMITTED, RequestState.QUEUED):
                self._told.add(record.request_id)
                self._open.add(record.request_id)
                self._emit({"type": WAITING, **self._about(record), "received": record.submitted_ms / 1000})

    def _tell_ended(self, ended: Iterable[FinishedRequest]) -> None:
        """Facts of a `done` one stand in the stream of outcomes, those of others in its record.

        Workers tell the ends of all `done` ones that they have shown, so that only those shown here are left.
        """
        ended = [one for one in ended if one.state != RequestState.DONE or one.request_id in self._open]
        self._open.difference_update(one.request_id for one in ended)
        if len(self._open) > _MOST_OPEN:  # the ends of some have been missed
            self._open.clear()
        others = {
            record.request_id: record
            for record in self._records(e.request_id for e in ended if e.state != RequestState.DONE)
        }
        for one in ended:
            record = others.get(one.request_id) or RequestRecord(
                request_id=one.request_id,
                state=RequestState(one.state),
                prompt_tokens=one.prompt_tokens,
                offset=one.output_tokens,
                stage=one.stage,
                submitted_ms=one.submitted_ms,
                started_ms=one.started_ms,
                finished_ms=one.finished_ms,
            )
            self._emit({"type": ENDED, **self._about(record), **_outcome(record)})

    def _records(self, request_ids: Iterable[str]) -> list[RequestRecord]:
        found = self._executor.run_many([self._reads.record(name) for name in request_ids])
        return [record for record in found if record is not None]

    def _about(self, record: RequestRecord) -> Event:
        told: dict[str, object] = {"stage": record.stage, "prompt_tokens": record.prompt_tokens}
        told["max_tokens"] = record.max_tokens
        arguments = "not counted yet"
        if record.prompt_tokens is not None and record.stage:
            started_ms = record.started_ms
            waited_s = None if started_ms is None else max(0.0, (started_ms - record.submitted_ms) / 1000)
            arguments = task_arguments(
                prompt_tokens=record.prompt_tokens,
                max_tokens=record.max_tokens or 0,
                stage=record.stage,
                waited_s=waited_s,
            )
        return {
            "uuid": record.request_id,
            "name": self._name,
            "args": arguments,
            "kwargs": repr(told),
            "retries": max(0, record.epoch - 1),
        }


def _outcome(record: RequestRecord) -> Event:
    """Celery's event of this end, with its fields."""
    times: Event = {"received": record.submitted_ms / 1000}
    finished_ms = record.finished_ms or record.submitted_ms
    if record.started_ms is not None:
        runtime_s = max(0.0, (finished_ms - record.started_ms) / 1000)
        times |= {"started": record.started_ms / 1000, "runtime": round(runtime_s, 4)}
    if record.state is RequestState.DONE:
        result = f"{record.offset} tokens, {times.get('runtime', 0.0):.1f} s"
        return {**times, "as": "task-succeeded", "result": result}
    if record.state in (RequestState.CANCELLED, RequestState.EXPIRED):
        is_expired = record.state is RequestState.EXPIRED
        return {**times, "as": "task-revoked", "terminated": False, "signum": None, "expired": is_expired}
    told = [f"{record.field}:" if record.field else "", record.error or record.state.value]
    return {**times, "as": "task-failed", "exception": " ".join(filter(None, told))[:2000]}
