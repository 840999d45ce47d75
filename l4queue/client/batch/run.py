"""The run of a batch: check the files, keep the window full, write answers durably, stop on demand."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain, islice

from l4queue.client.batch.answers import outcome_line, stopped_line
from l4queue.client.batch.files import AnswerFile, BatchIdentity, IdentityFile, InputFile
from l4queue.client.batch.flight import Ended, Flight, Submission, Ticket
from l4queue.client.batch.halves import Halves, HttpHalves, checked_gateway
from l4queue.client.batch.index import LineIndex, LineState
from l4queue.client.batch.line_limits import LineGate, LineLimits, NoLimits
from l4queue.client.batch.line_rate import LineRate
from l4queue.client.batch.options import BatchOptions, LineOptions
from l4queue.client.batch.places import BatchEnding, BatchPlaces
from l4queue.client.batch.progress import BatchProgress, BatchSummary, ThrottledProgress
from l4queue.client.batch.served import ServedModels
from l4queue.client.batch.source import LineSource, check_files
from l4queue.client.batch.totals import BatchTotals
from l4queue.client.batch.window import SubmissionWindow
from l4queue.config import Settings
from l4queue.errors import QueueFull, ServiceUnavailable
from l4queue.models import RequestState

__all__ = ("run_batch", "run_lines")

_CHUNK = 256  # requests sent or answers fetched at once
_CHUNK_BYTES = 8 * 2**20  # of one chunk, where prompts are long
_CHUNKS_PER_ROUND = 4  # sent before answers are looked at again
_BLOCK_S = 0.25  # a stop is seen within this time
_COMMIT_AT = 2048  # answers that are made durable together at most
_IDENTITY_EVERY_S = 5.0  # the count of submitted lines on disk is at most this old
_REDIS_PATIENCE_S = 300.0  # longer than a failover or a restart with a large AOF takes


def run_batch(
    settings: Settings,
    options: BatchOptions,
    *,
    url: str,
    progress: Callable[[BatchProgress], None] | None = None,
    stop: threading.Event | None = None,
) -> BatchSummary:
    """Run a batch, or go on with it. Returns when every line is finished, or soon after `stop` is set.

    InvalidRequest for files that cannot be used; ServiceUnavailable when Redis does not answer at first, or stays
    away for five minutes later. What is in flight then goes on: the same call continues.
    """
    with (
        closing(InputFile(options.path_in)) as lines,
        closing(AnswerFile(options.path_out, field="out")) as out,
        closing(AnswerFile(options.errors, field="errors")) as errors,
    ):
        places = BatchPlaces(
            lines=lines,
            out=out,
            errors=errors,
            identity=IdentityFile(options.identity),
            name_out=str(options.path_out),
            name_errors=str(options.errors),
        )
        key = settings.http_key.get_secret_value()
        halves = HttpHalves(checked_gateway(options.gateway), key=key) if options.gateway else None
        return run_lines(settings, options, places, url=url, halves=halves, progress=progress, stop=stop)


def run_lines(
    settings: Settings,
    options: LineOptions,
    places: BatchPlaces,
    *,
    url: str,
    halves: Halves | None = None,
    limits: LineLimits | None = None,
    progress: Callable[[BatchProgress], None] | None = None,
    stop: threading.Event | None = None,
) -> BatchSummary:
    """The same over places that are open and held by this run alone, within the limits of its owner."""
    stop = stop or threading.Event()
    show = ThrottledProgress(progress or (lambda _: None))
    started_s = time.monotonic()

    def checked(number: int) -> None:
        show.tell(BatchProgress(phase="checking", num_lines=0, num_finished=number))

    index = check_files(
        places.lines,
        places.out,
        places.errors,
        stop=stop,
        progress=checked,
        max_tokens=options.max_tokens,
        batch_id=places.identity.read().batch_id if places.identity.goes_on else None,
    )
    if index is None:
        stopped = BatchTotals()
        wall_s = _since(started_s)
        return stopped.summary(LineIndex(), places, is_complete=False, num_in_flight=0, wall_s=wall_s)
    gate = LineGate(limits or NoLimits())
    run = _Run(settings, options, places, url=url, halves=halves, gate=gate, show=show, stop=stop, index=index)
    return run.run(started_s=started_s)


class _Run:
    """One run over checked files that are locked."""

    def __init__(
        self,
        settings: Settings,
        options: LineOptions,
        places: BatchPlaces,
        *,
        url: str,
        halves: Halves | None,
        gate: LineGate,
        show: ThrottledProgress,
        stop: threading.Event,
        index: LineIndex,
    ) -> None:
        self._options = options
        self._halves, self._gate = halves, gate
        self._places = places
        self._show = show
        self._stop = stop
        self._index, self._out, self._errors = index, places.out, places.errors
        self._num_lines = len(index) - index.count(LineState.EMPTY)
        self._window = SubmissionWindow(most=options.max_in_flight)
        self._held: deque[Submission] = deque()
        self._uncommitted: list[str] = []
        self._totals = BatchTotals(num_earlier=self._num_finished())
        self._served = ServedModels(any_model=options.any_model)
        self._line_rate = LineRate()
        self._notice = ""
        self._not_before_s = self._committed_s = self._identity_s = 0.0
        self._began_s = time.monotonic()
        self._goes_on = places.identity.goes_on
        self._identity: BatchIdentity = places.identity.read()
        self._num_submitted = self._identity.num_submitted
        self._flight = Flight(settings, url=url, batch_id=self._identity.batch_id)

    def run(self, *, started_s: float) -> BatchSummary:
        """Until every line is finished or the stop is set."""
        self._source = LineSource(
            self._places.lines,
            self._index,
            options=self._options,
            batch_id=self._identity.batch_id,
            core=self._flight.core,
            served=self._served,
            halves=self._halves,
            fail=self._fail,
        )
        with closing(self._flight):
            if self._num_finished() < self._num_lines:
                self._write_identity()
                ending = self._drive()
                if ending is None:
                    self._leave()
                else:
                    self._end(ending)
                self._write_identity()
            is_complete = self._num_finished() == self._num_lines
            if is_complete:
                self._places.identity.remove()
            self._tell(now=True)
            return self._totals.summary(
                self._index,
                self._places,
                is_complete=is_complete,
                num_in_flight=len(self._flight),
                wall_s=_since(started_s),
            )

    def _drive(self) -> BatchEnding | None:
        """Until all is done, or the stop is set, or the batch is to end before its time: then how."""
        away_since_s: float | None = None
        was_reached = False
        while not self._stop.is_set():
            if (ending := self._places.ending()) is not None:
                return ending
            try:
                self._fill()
                if self._source.is_exhausted and not self._held and not len(self._flight):
                    break
                self._flight.wait(block_s=self._block_s())
                self._collect()
                self._commit()
            except ServiceUnavailable as error:
                if not was_reached:  # a wrong address or password, more likely than an outage
                    raise
                away_since_s = away_since_s or time.monotonic()
                if time.monotonic() - away_since_s > _REDIS_PATIENCE_S:
                    raise
                self._notice = str(error)
                self._stop.wait(1.0)
            else:
                was_reached = True
                if away_since_s is not None:
                    away_since_s, self._notice = None, ""
            if time.monotonic() - self._identity_s > _IDENTITY_EVERY_S:
                self._write_identity()
            self._tell()
        return None

    def _end(self, ending: BatchEnding) -> None:
        """Cancel what is in flight, keep what has ended, and make an error of every other open line."""
        held = [submission.ticket for submission in self._held]
        left = chain(self._flight.tickets(), held, (submission.ticket for submission in self._rest()))
        self._held.clear()
        while (tickets := list(islice(left, _CHUNK))) and not self._stop.is_set():
            found = self._flight.end(tickets, reason=ending.message)
            self._gate.settle(found, is_over=True)
            for ended in found:
                if ended.record is not None:
                    self._land(ended)
                    continue
                ticket = ended.ticket
                told = stopped_line(
                    ending.code,
                    ending.message,
                    request_id=ticket.request_id,
                    custom_id=ticket.custom_id,
                    digest=ticket.digest,
                )
                self._fail(ticket.number, told)
            self._commit()
            self._tell()
        self._commit(now=True)

    def _rest(self) -> Iterator[Submission]:
        while (submission := self._source.next()) is not None:
            yield submission

    def _leave(self) -> None:
        """Write what has ended; cancel the rest if so asked."""
        if len(self._flight):
            self._flight.wait(block_s=0.001)
            self._collect()
        self._commit(now=True)
        if self._options.cancel_on_exit and self._stop.is_set():
            self._flight.cancel_all()

    def _fill(self) -> None:
        """Send while the window has room, but a few chunks at most before results are looked at again."""
        if time.monotonic() < max(self._not_before_s, self._gate.closed_until_s):
            return
        if self._served.is_due():
            self._served.seen(self._flight.workers())
        for _ in range(_CHUNKS_PER_ROUND):
            room = min(_CHUNK, self._window.size - len(self._flight))
            self._hold(room)
            if room <= 0 or not self._held:
                return
            full = self._send(self._gate.admit(list(islice(self._held, room))))
            self._notice = self._gate.notice
            if full is not None:
                self._not_before_s = time.monotonic() + full.retry_after_s
                self._notice = str(full)
            if full is not None or self._gate.limited_by:
                return

    def _send(self, chunk: Sequence[Submission]) -> QueueFull | None:
        """Send the first of the lines that are held; why not all of them, where the backlog is full."""
        refused, full, known = self._flight.submit(chunk)
        for _ in chunk:
            self._held.popleft()
        self._held.extendleft(reversed(refused))
        self._count(chunk, refused, known)
        return full

    def _hold(self, room: int) -> None:
        """Have up to `room` lines ready, but not too many bytes of them."""
        num_bytes = sum(submission.ticket.size for submission in self._held)
        while len(self._held) < room and num_bytes < _CHUNK_BYTES and not self._source.is_exhausted:
            submission = self._source.next()
            if submission is not None:
                self._held.append(submission)
                num_bytes += submission.ticket.size

    def _count(self, chunk: Sequence[Submission], refused: list[Submission], known: list[Ticket]) -> None:
        waiting = {submission.ticket.request_id for submission in refused}
        found = {ticket.number for ticket in known}
        for submission in chunk:
            ticket = submission.ticket
            if ticket.request_id in waiting:
                continue
            if ticket.number in found:
                self._totals.num_found += self._goes_on and not submission.is_again
            elif submission.is_again or (self._goes_on and ticket.number <= self._identity.num_submitted):
                self._totals.num_recomputed += 1
        if chunk and not refused:
            self._num_submitted = max(self._num_submitted, chunk[-1].ticket.number)

    def _collect(self) -> None:
        while ended := self._flight.fetch(limit=_CHUNK):
            if self._served.is_due(one.record.worker for one in ended if one.record):
                self._served.seen(self._flight.workers())
            self._gate.settle(ended)
            for one in ended:
                self._land(one)
        self._out.flush()
        self._errors.flush()

    def _land(self, ended: Ended) -> None:
        """Write one answer, or hold its line to be sent again."""
        ticket, record = ended.ticket, ended.record
        if record is None:
            submission = self._source.again(ticket)
            self._flight.landed(ticket)
            if submission is not None:
                self._held.append(submission)
            return
        if record.state is RequestState.DONE:
            model = self._served.answered(record.worker, asked=ticket.model)
            line, is_success = self._source.answer(ticket, record, ended.outputs, model=model)
            self._totals.done(record)
        else:
            line = outcome_line(record, custom_id=ticket.custom_id, digest=ticket.digest, names=ticket.names)
            is_success = False
        self._flight.landed(ticket)
        if is_success:
            self._out.append(line)
            self._index.mark(ticket.number, LineState.SUCCEEDED)
        else:
            self._fail(ticket.number, line)
        self._uncommitted.append(ticket.request_id)
        if record.started_ms is not None and not ended.is_found:
            waited_s = max(0, record.started_ms - record.submitted_ms) / 1000
            self._window.ended(waited_s, in_flight=len(self._flight))

    def _fail(self, number: int, answer: bytes) -> None:
        self._errors.append(answer)
        self._index.mark(number, LineState.FAILED)

    def _commit(self, *, now: bool = False) -> None:
        """Make answers durable, then delete them from Redis. Not for each: that takes milliseconds and more."""
        every_s = self._places.commit_every_s(_since(self._began_s))
        is_due = _since(self._committed_s) > every_s or len(self._uncommitted) >= _COMMIT_AT
        if not now and not (self._uncommitted and is_due):
            return
        self._out.sync()
        self._errors.sync()
        if not self._options.keep_results:
            self._flight.forget(self._uncommitted)
        self._uncommitted.clear()
        self._committed_s = time.monotonic()

    def _write_identity(self) -> None:
        self._places.identity.write(replace(self._identity, num_submitted=self._num_submitted))
        self._identity_s = time.monotonic()

    def _block_s(self) -> float:
        """How long to wait for results while nothing can be sent; not at all while something can."""
        has_lines = bool(self._held) or not self._source.is_exhausted
        if has_lines and len(self._flight) < self._window.size:
            next_s = max(self._not_before_s, self._gate.closed_until_s)
            return min(_BLOCK_S, max(0.001, next_s - time.monotonic()))
        return _BLOCK_S

    def _num_finished(self) -> int:
        return self._index.count(LineState.SUCCEEDED) + self._index.count(LineState.FAILED)

    def _tell(self, *, now: bool = False) -> None:
        if not now and not self._show.is_due():
            return
        num_failed = self._index.count(LineState.FAILED)
        num_finished = self._num_finished()
        self._line_rate.saw(time.monotonic(), num_finished)
        progress = BatchProgress(
            phase="running",
            num_lines=self._num_lines,
            num_finished=num_finished,
            num_failed=num_failed,
            num_in_flight=len(self._flight),
            lines_per_s=self._line_rate.lines_per_s,
            left_s=self._line_rate.left_s(self._num_lines - num_finished),
            notice=self._notice,
            limited_by=self._gate.limited_by,
        )
        self._show.tell(progress, now=True)


def _since(start_s: float) -> float:
    return max(1e-9, time.monotonic() - start_s)
