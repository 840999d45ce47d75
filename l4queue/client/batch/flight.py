"""Batch requests in flight: submitted in bulk, reported by the mailbox, fetched in bulk."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from l4queue.client.core import ClientCore, Prepared
from l4queue.config import Settings
from l4queue.errors import QueueFull
from l4queue.models import TERMINAL, RequestState, WorkerLoad
from l4queue.observe.overview import read_overview
from l4queue.protocol.calls import Verdict
from l4queue.protocol.executor import Executor
from l4queue.protocol.foreign import text
from l4queue.protocol.records import OutputEntry, RequestRecord
from l4queue.protocol.retention import Retention

__all__ = ("Ended", "Flight", "Submission", "Ticket")

BACKLOG_SHARE = 0.5
"""Share of the bounded backlog that batches may fill: the rest is for those who wait for an answer."""
MIN_RESULT_TTL_S = 7 * 86_400.0  # a week in which an interrupted batch can be resumed
_LOOK_EVERY_S = 5.0  # between two looks at the records of silent requests
_LOOK_AFTER_S = 10.0  # of silence a record is looked at
_LOOK_AT = 500  # records of one look
_STOPPED = frozenset({RequestState.CANCELLED, RequestState.EXPIRED})  # not for a fault of the request


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """One line in flight: where it stands in the file, and what its answer repeats.

    `key_id` is made of its idempotency key. `request_id` is the same until the queue gives the key another one.
    """

    request_id: str
    key_id: str
    number: int
    offset: int
    size: int
    custom_id: str
    url: str
    model: str
    digest: str
    names: Mapping[str, str]  # of fields in the line, where ours differ
    by_gateway: bool = False  # which makes its answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A line that is ready to be sent."""

    ticket: Ticket
    prepared: Prepared
    is_again: bool = False  # nothing was known of it any more


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A line that is in flight no more. `record` is None when nothing is known of it: it has to be sent again."""

    ticket: Ticket
    record: RequestRecord | None
    outputs: Sequence[OutputEntry]
    is_found: bool


@dataclass(slots=True)
class _Pending:
    ticket: Ticket
    is_found: bool
    looked_s: float = field(default_factory=time.monotonic)


class Flight:
    """Talks to Redis for one batch. All runs of a batch share one mailbox, so that none misses an end.

    Every method may raise ServiceUnavailable and be called again: nothing is lost or sent twice by that.
    """

    def __init__(self, settings: Settings, *, url: str, batch_id: str) -> None:
        self.settings = settings.model_copy(
            update={
                "max_backlog_tokens": max(1, int(settings.max_backlog_tokens * BACKLOG_SHARE)),
                "max_backlog_bytes": max(1, int(settings.max_backlog_bytes * BACKLOG_SHARE)),
                "result_ttl_s": max(settings.result_ttl_s, MIN_RESULT_TTL_S),
            }
        )
        self.core = ClientCore(self.settings)
        self.core.client_id = "b" + hashlib.sha256(batch_id.encode()).hexdigest()[:31]
        self._mailbox = self.core.keys.mailbox(self.core.client_id)
        self._last_mail = "0-0"
        self._executor = Executor(url)
        self._pending: dict[str, _Pending] = {}  # in the order in which they were looked at
        self._ended: dict[str, None] = {}
        self._look_s = time.monotonic() + _LOOK_EVERY_S

    def __len__(self) -> int:
        """Requests in flight, ended ones that are not fetched included."""
        return len(self._pending)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._pending

    def submit(self, submissions: Sequence[Submission]) -> tuple[list[Submission], QueueFull | None, list[Ticket]]:
        """Send in one round trip. Returns the lines without room, the reason, and the lines known already.

        The same key with other options counts as known: that line was accepted by an earlier run.
        """
        refused: list[Submission] = []
        full: QueueFull | None = None
        known: list[Ticket] = []
        replies = self._executor.run_many([submission.prepared.call for submission in submissions])
        for submission, reply in zip(submissions, replies, strict=True):
            if reply.verdict is Verdict.FULL:
                refused.append(submission)
                try:
                    self.core.accepted(submission.prepared, reply)
                except QueueFull as error:
                    full = error
                continue
            ticket, is_found = submission.ticket, reply.verdict is not Verdict.OK
            if reply.request_id is not None:
                ticket = replace(ticket, request_id=reply.request_id)
            self._pending[ticket.request_id] = _Pending(ticket, is_found)
            if not is_found:
                self.core.accepted(submission.prepared, reply)
                continue
            known.append(ticket)
            if reply.state is not None and RequestState(reply.state) in TERMINAL:
                self._ended[ticket.request_id] = None
        return refused, full, known

    def workers(self) -> tuple[WorkerLoad, ...]:
        """What workers with a valid lease publish."""
        return read_overview(self._executor, self.core.settings.namespace).workers

    def wait(self, *, block_s: float) -> None:
        """Learn who has ended: by mail as soon as there is some, and by a look at those not heard of for long."""
        block_s = 0.001 if self._ended else block_s
        found = self._executor.wait({self._mailbox: self._last_mail}, block_s=block_s, count=1000)
        for entry_id, values in found.get(self._mailbox, ()):
            self._last_mail = entry_id.decode()
            request_id = text(values.get(b"i", b""))
            if request_id in self._pending:
                self._ended[request_id] = None
        if time.monotonic() >= self._look_s:
            self._look()
            self._look_s = time.monotonic() + _LOOK_EVERY_S

    def fetch(self, *, limit: int) -> list[Ended]:
        """Records and outputs of some that have ended, both or none. They stay in flight until `landed`."""
        ids = list(islice(self._ended, limit))
        reads = self.core.reads
        replies = self._executor.run_many([call for i in ids for call in (reads.record(i), reads.output(i))])
        ended, lost = [], []
        for request_id, record, outputs in zip(ids, replies[::2], replies[1::2], strict=True):
            del self._ended[request_id]
            pending = self._pending[request_id]
            if record is not None and record.state not in TERMINAL:  # forgotten and sent again meanwhile
                continue
            if record is not None and not _is_whole(record, outputs):  # expired, went early, or was deleted
                lost.append(request_id)
                record = None
            ended.append(Ended(ticket=pending.ticket, record=record, outputs=outputs, is_found=pending.is_found))
        self.forget(lost)  # their keys, so that they can be sent again
        return ended

    def landed(self, ticket: Ticket) -> None:
        """Its answer was written, or it is to be sent again."""
        self._pending.pop(ticket.request_id, None)

    def tickets(self) -> list[Ticket]:
        """Lines in flight."""
        return [pending.ticket for pending in self._pending.values()]

    def end(self, tickets: Sequence[Ticket], *, reason: str) -> list[Ended]:
        """Cancel these lines, in flight here, from an earlier run, or not at all.

        Those that had ended before come with their record; it is None for the others.
        """
        replies = self._executor.run_many([self.core.cancel(t.request_id, reason=reason) for t in tickets])
        verdicts = {t.request_id: verdict for t, (verdict, _) in zip(tickets, replies, strict=True)}
        self.forget([i for i, verdict in verdicts.items() if verdict is Verdict.OK])
        kept, reads = [i for i, verdict in verdicts.items() if verdict is Verdict.IS], self.core.reads
        found = self._executor.run_many([call for i in kept for call in (reads.record(i), reads.output(i))])
        known = {
            i: (record, outputs)
            for i, record, outputs in zip(kept, found[::2], found[1::2], strict=True)
            if record is not None and record.state not in _STOPPED and _is_whole(record, outputs)
        }
        for ticket in tickets:
            self.landed(ticket)
            self._ended.pop(ticket.request_id, None)
        return [
            Ended(ticket=t, record=record, outputs=outputs, is_found=True)
            for t in tickets
            for record, outputs in (known.get(t.request_id, (None, ())),)
        ]

    def forget(self, request_ids: Sequence[str]) -> None:
        """Delete what Redis still has of requests that have ended."""
        keeping = Retention(self.core.keys)
        chunks = (request_ids[start : start + 100] for start in range(0, len(request_ids), 100))
        self._executor.run_many([keeping.discard(chunk) for chunk in chunks])

    def cancel_all(self) -> int:
        """Cancel all in flight and forget them, so that they may be sent afresh; how many were cancelled."""
        ids, cancelled = list(self._pending), []
        for start in range(0, len(ids), 256):
            chunk = ids[start : start + 256]
            replies = self._executor.run_many([self.core.cancel(i, reason="the batch was stopped") for i in chunk])
            cancelled += [i for i, (verdict, _) in zip(chunk, replies, strict=True) if verdict is Verdict.OK]
        self.forget(cancelled)
        for request_id in cancelled:
            del self._pending[request_id]
        return len(cancelled)

    def close(self) -> None:
        """Close all connections."""
        self._executor.close()

    def _look(self) -> None:
        """Look at the records of those not heard of for longest: mail is a hint and may have been trimmed."""
        now_s = time.monotonic()
        ids = []
        for request_id, pending in islice(self._pending.items(), _LOOK_AT):
            if pending.looked_s > now_s - _LOOK_AFTER_S:
                break
            ids.append(request_id)
        records = self._executor.run_many([self.core.reads.record(i) for i in ids])
        for request_id, record in zip(ids, records, strict=True):
            if record is None or record.state in TERMINAL:
                self._ended[request_id] = None
            pending = self._pending.pop(request_id)
            pending.looked_s = now_s
            self._pending[request_id] = pending


def _is_whole(record: RequestRecord, outputs: Sequence[OutputEntry]) -> bool:
    """Whether all of the output of an ended request is there."""
    num_tokens = sum(len(entry.token_ids) for entry in outputs)
    return any(entry.state for entry in outputs) and num_tokens == record.offset
