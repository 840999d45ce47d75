"""The blocking client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from os import PathLike
from types import TracebackType
from typing import Any

from l4queue.client.arguments import build_spec, checked_count, checked_id
from l4queue.client.batch import BatchProgress, BatchSummary, batch_options
from l4queue.client.bulk import Bulk
from l4queue.client.core import Chunk, ClientCore, Prepared, Result, check_outcome, known
from l4queue.client.demux import RequestWatch
from l4queue.client.handle import HandleBase
from l4queue.client.listener import Listener
from l4queue.client.read_marks import ReadMarks
from l4queue.client.waiting import Ends, deadline_after, time_left_s
from l4queue.config import Settings, load_settings
from l4queue.errors import L4QueueError
from l4queue.models import TERMINAL, Plan, RequestSpec, RequestState
from l4queue.observe.explain import Event, tell
from l4queue.observe.overview import Overview, read_overview
from l4queue.protocol.executor import Executor
from l4queue.protocol.plans import readable_plans
from l4queue.protocol.reads import DeadLetter
from l4queue.protocol.records import RequestRecord
from l4queue.protocol.retention import Retention

__all__ = ("Client", "Handle")


class Client:
    """Enqueues requests and reads their results. Thread-safe; close it, or use it as a context manager.

    `url` overrides `L4_REDIS_URL`; other settings come from the environment or from `settings`.
    """

    def __init__(self, url: str | None = None, *, settings: Settings | None = None) -> None:
        self.settings = settings or load_settings()
        self._core = ClientCore(self.settings)
        self._executor = Executor(url or self.settings.redis_url)
        self._listener = Listener(self._executor, self._core)
        self._marks = ReadMarks(Retention(self._core.keys), now_s=time.monotonic())

    def enqueue(self, prompt: str | None = None, **options: Any) -> Handle:
        """Accept one request and return its handle.

        Give one of `prompt`, `messages` (chat), `token_ids`; then sampling parameters (`max_tokens`,
        `temperature`, `top_p`, `stop`, ...), `priority` (lower first), `deadline_s`, `idempotency_key`,
        `metadata`. InvalidRequest names a bad one; QueueFull says when to try again.
        """
        return self._submit([self._core.prepare(build_spec(prompt, **options))], block=False)[0]

    def enqueue_many(
        self,
        requests: Iterable[str | dict[str, Any] | RequestSpec],
        *,
        progress: Callable[[int], None] | None = None,
        block: bool = True,
        **common: Any,
    ) -> list[Handle]:
        """Accept many requests in few round trips; handles come back in order.

        Each is a prompt, a dictionary of `enqueue` arguments or a RequestSpec; `common` applies to the
        first two. All are validated before any is sent. `progress` is called with the number accepted so
        far. When the backlog is full: wait for room (`block`) or raise QueueFull. Whatever is raised has the
        handles of the accepted ones: see `L4QueueError`. A conflicting idempotency key ends the work with its
        batch of 256.
        """
        return self._submit(self._core.prepare_many(requests, common), block=block, progress=progress)

    def get(self, request_id: str) -> Handle:
        """The handle of an earlier request; UnknownRequest when there is no record of it."""
        handle = Handle(self, checked_id(request_id))
        handle.status()
        return handle

    def as_completed(self, handles: Iterable[Handle], *, timeout: float | None = None) -> Iterator[Handle]:
        """Handles in the order in which they end; ResultTimeout after `timeout` seconds.

        A handle that is given twice comes once. Other clients' handles and earlier ones may be among them.
        """
        event = threading.Event()
        ends = Ends(handles, has_mail=lambda h: h._has_mail and h._client is self, event=event)
        deadline = deadline_after(timeout)
        try:
            self._listener.begin(ends.watches)
            while ends.num_pending:
                event.clear()
                yield from ends.take()
                if ends.num_pending and not event.is_set():
                    left_s = time_left_s(deadline, f"{ends.num_pending} requests are not finished")
                    event.wait(left_s)
        finally:
            self._listener.end(ends.watches)

    def run_batch(
        self,
        path_in: str | PathLike[str],
        path_out: str | PathLike[str],
        *,
        path_errors: str | PathLike[str] | None = None,
        progress: Callable[[BatchProgress], None] | None = None,
        stop: threading.Event | None = None,
        **options: Any,
    ) -> BatchSummary:
        """Run a file of requests in OpenAI's batch format, or go on with it; returns when it is finished.

        Answers go to `path_out`, errors to `path_errors`; set `stop` from elsewhere to end early. `options` are
        those of `BatchOptions`: `priority`, `max_tokens`, `max_in_flight`, `cancel_on_exit`, `keep_results`.
        InvalidRequest for files and options that cannot be used.
        """
        from l4queue.client.batch.run import run_batch  # brings numpy, which nobody else here needs

        return run_batch(
            self.settings,
            batch_options(path_in, path_out, path_errors, **options),
            url=self._executor.url,
            progress=progress,
            stop=stop,
        )

    def overview(self) -> Overview:
        """Plan, workers, queues and totals, now."""
        return read_overview(self._executor, self.settings.namespace)

    def plan_history(self, *, count: int = 20) -> list[Plan]:
        """The latest published plans that this release can read, newest first."""
        rows = self._executor.run(self._core.reads.plan_history(count=checked_count(count)))
        return readable_plans((body for _, _, body in rows), key=self._core.keys.plans)

    def dead_letters(self, *, count: int = 100) -> list[DeadLetter]:
        """The latest requests that kill their worker and entries that cannot be read, newest first."""
        return self._executor.run(self._core.reads.dead_letters(count=checked_count(count)))

    def _has_read(self, request_id: str) -> None:
        """Note a result that was read; told to the server now and then, in one try."""
        report = self._marks.add(request_id, now_s=time.monotonic())
        if report is not None:
            with suppress(L4QueueError):
                self._executor.offer(report)

    def close(self) -> None:
        """Close all connections, which ends what still waits; safe to call twice."""
        if (report := self._marks.rest()) is not None:
            with suppress(L4QueueError):
                self._executor.offer(report)
        self._listener.close()
        self._executor.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(
        self,
        prepared: Iterable[Prepared],
        *,
        block: bool,
        progress: Callable[[int], None] | None = None,
    ) -> list[Handle]:
        bulk = Bulk(self._core, prepared, lambda i, has_mail: Handle(self, i, has_mail=has_mail))
        with bulk:
            while bulk.is_open:
                full = bulk.answered(self._executor.run_many(bulk.next_batch()))
                if progress is not None:
                    progress(len(bulk.handles))
                if full is not None and not block:
                    raise full
                if full is not None:
                    time.sleep(full.retry_after_s)
        return bulk.handles


class Handle(HandleBase["Client"]):
    """One accepted request. Any number of handles, in any process, may read the same request."""

    def status(self) -> RequestRecord:
        """Where the request is now: state, stage, worker, tokens, times."""
        return known(self.id, self._client._executor.run(self._client._core.reads.record(self.id)))

    def stream(self, *, after: int = 0, timeout: float | None = None) -> Iterator[Chunk]:
        """Chunks as they are generated, from the first token or after `after` tokens.

        Ends with the request; an outcome other than done is raised after its last chunk. No token is ever
        repeated, skipped or changed, whatever happens to workers. ResultTimeout after `timeout` seconds;
        InvalidRequest for `after` beyond the end; OutputLost when output was deleted before its record.
        """
        return self._chunks(after=after, deadline=deadline_after(timeout))

    def result(self, *, timeout: float | None = None) -> Result:
        """Wait for the outcome: the result of a done request, or the error that says how it ended.

        The result of a request that has ended is there whatever the timeout. OutputLost when its output is not.
        """
        deadline = deadline_after(timeout)
        while True:
            for _ in self._chunks(after=None, deadline=deadline):
                pass
            found, entries = self._client._listener.output(self.id)
            record = known(self.id, found)
            if record.state in TERMINAL:  # mail may tell of an end that a server has forgotten
                result = self._client._core.result(record, entries)
                self._client._has_read(self.id)
                return result

    def explain(self) -> tuple[Event, ...]:
        """The events of this request with their reasons, in order: routing, steals, hand-overs, crashes."""
        record = self.status()
        reads = self._client._core.reads
        found = self._client._executor.run_many([reads.routed_because(self.id), reads.ledger(self.id)])
        why, ledger = found
        return tell(record, why=why, ledger=ledger)

    def cancel(self, *, reason: str = "cancelled by its client") -> bool:
        """End the request, waiting or running, for a reason of at most 1,000 characters.

        False when it had ended already.
        """
        verdict, _ = self._client._executor.run(self._client._core.cancel(self.id, reason=reason))
        return self._was_cancelled(verdict)

    def _chunks(self, *, after: int | None, deadline: float | None) -> Iterator[Chunk]:
        """Chunks after the first `after` tokens until the end; with None only the end is awaited."""
        event, listener = threading.Event(), self._client._listener
        watch = RequestWatch(self.id, wake=event.set, after=after, has_mail=self._has_mail)
        try:
            listener.begin([watch])
            while True:
                event.clear()
                chunks, must_read, is_all = listener.take(watch)
                yield from chunks
                if is_all:
                    break
                if must_read:
                    listener.read(watch)
                    continue
                left_s = time_left_s(deadline, f"request {self.id} is not finished")
                event.wait(left_s)
        finally:
            listener.end([watch])
        if after is not None and watch.state is not RequestState.DONE:
            check_outcome(self.status())
