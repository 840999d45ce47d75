"""The blocking client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from types import TracebackType
from typing import Any

from l4queue.client.batch import BatchProgress, BatchSummary, batch_options
from l4queue.client.compose import (
    Chunk,
    Composer,
    Follower,
    Prepared,
    Result,
    build_spec,
    check_outcome,
    checked_count,
    checked_id,
    known,
    spec_of,
)
from l4queue.client.story import Event, tell
from l4queue.client.waiting import RECHECK_S, deadline_after, time_left_s
from l4queue.config import Settings, load_settings
from l4queue.errors import QueueFull
from l4queue.models import TERMINAL, Plan, RequestSpec
from l4queue.policy.plan_json import plan_from_json
from l4queue.protocol.calls import Verdict
from l4queue.protocol.door import Door
from l4queue.protocol.overview import Overview, read_overview
from l4queue.protocol.reads import DeadLetter
from l4queue.protocol.records import RequestRecord

__all__ = ("Client", "Handle")

_BATCH = 256


class Client:
    """Enqueues requests and reads their results. Thread-safe; close it, or use it as a context manager.

    `url` overrides `L4_REDIS_URL`; other settings come from the environment or from `settings`.
    """

    def __init__(self, url: str | None = None, *, settings: Settings | None = None) -> None:
        self.settings = settings or load_settings()
        self._composer = Composer(self.settings)
        self._door = Door(url or self.settings.redis_url)

    def enqueue(self, prompt: str | None = None, **options: Any) -> Handle:
        """Accept one request and return its handle.

        Give one of `prompt`, `messages` (chat), `token_ids`; then sampling parameters (`max_tokens`,
        `temperature`, `top_p`, `stop`, ...), `priority` (lower first), `deadline_s`, `idempotency_key`,
        `metadata`. InvalidRequest names a bad one; QueueFull says when to try again.
        """
        prepared = self._composer.prepare(build_spec(prompt, **options))
        return Handle(self, self._composer.accepted(prepared, self._door.run(prepared.call)))

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
        far. When the backlog is full: wait for room (`block`) or raise QueueFull with what was accepted
        already queued.
        """
        prepared = [self._composer.prepare(spec_of(request, common)) for request in requests]
        handles: list[Handle] = []
        while len(handles) < len(prepared):
            batch = prepared[len(handles) : len(handles) + _BATCH]
            try:
                handles.extend(self._submit_prefix(batch))
            except QueueFull as full:
                if not block:
                    raise
                time.sleep(full.retry_after_s)
            if progress is not None:
                progress(len(handles))
        return handles

    def get(self, request_id: str) -> Handle:
        """The handle of an earlier request; UnknownRequest when there is no record of it."""
        handle = Handle(self, checked_id(request_id))
        handle.status()
        return handle

    def as_completed(self, handles: Iterable[Handle], *, timeout: float | None = None) -> Iterator[Handle]:
        """Handles of this client in the order in which they end; ResultTimeout after `timeout` seconds."""
        pending = {handle.id: handle for handle in handles}
        deadline = deadline_after(timeout)
        mailbox, last_id = self._composer.keys.mailbox(self._composer.client_id), "0-0"
        yield from self._ended(pending)
        checked = time.monotonic()
        while pending:
            left = time_left_s(deadline, f"{len(pending)} requests are not finished")
            found = self._door.wait({mailbox: last_id}, block_s=min(left, RECHECK_S), count=1000)
            for entry_id, values in found.get(mailbox, ()):
                last_id = entry_id.decode()
                handle = pending.pop(values[b"i"].decode(), None)
                if handle is not None:
                    yield handle
            if time.monotonic() - checked > RECHECK_S:
                yield from self._ended(pending)
                checked = time.monotonic()

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
            url=self._door.url,
            progress=progress,
            stop=stop,
        )

    def overview(self) -> Overview:
        """Plan, workers, queues and totals, now."""
        return read_overview(self._door, self.settings.namespace)

    def plan_history(self, *, count: int = 20) -> list[Plan]:
        """The latest published plans, newest first."""
        rows = self._door.run(self._composer.reads.plan_history(count=checked_count(count)))
        return [plan_from_json(body) for _, _, body in rows]

    def dead_letters(self, *, count: int = 100) -> list[DeadLetter]:
        """The latest requests that kill their worker and entries that cannot be read, newest first."""
        return self._door.run(self._composer.reads.dead_letters(count=checked_count(count)))

    def close(self) -> None:
        """Close all connections; safe to call twice."""
        self._door.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit_prefix(self, batch: Sequence[Prepared]) -> list[Handle]:
        """Submit a batch; handles of the accepted prefix. QueueFull only when not even the first fits."""
        replies = self._door.run_many([prepared.call for prepared in batch])
        handles: list[Handle] = []
        for prepared, reply in zip(batch, replies, strict=True):
            if reply.verdict is Verdict.FULL and handles:
                break
            handles.append(Handle(self, self._composer.accepted(prepared, reply)))
        return handles

    def _ended(self, pending: dict[str, Handle]) -> Iterator[Handle]:
        """Take out of `pending` and yield those whose record is terminal already."""
        for start in range(0, len(pending), 1000):
            ids = list(pending)[start : start + 1000]
            records = self._door.run_many([self._composer.reads.record(i) for i in ids])
            done = [i for i, record in zip(ids, records, strict=True) if known(i, record).state in TERMINAL]
            for request_id in done:
                yield pending.pop(request_id)


class Handle:
    """One accepted request. Any number of handles, in any process, may read the same request."""

    def __init__(self, client: Client, request_id: str) -> None:
        self._client = client
        self.id = request_id

    def __repr__(self) -> str:
        return f"Handle({self.id!r})"

    def status(self) -> RequestRecord:
        """Where the request is now: state, stage, worker, tokens, times."""
        return known(self.id, self._client._door.run(self._client._composer.reads.record(self.id)))

    def stream(self, *, after: int = 0, timeout: float | None = None) -> Iterator[Chunk]:
        """Chunks as they are generated, from the first token or after `after` tokens.

        Ends with the request; an outcome other than done is raised after its last chunk. No chunk is ever
        repeated, skipped or changed, whatever happens to workers. ResultTimeout after `timeout` seconds.
        """
        yield from self._chunks(after=after, timeout=timeout)
        check_outcome(self.status())

    def result(self, *, timeout: float | None = None) -> Result:
        """Wait for the outcome: the result of a done request, or the error that says how it ended."""
        chunks = list(self._chunks(after=0, timeout=timeout))
        return self._client._composer.result(self.status(), chunks)

    def explain(self) -> tuple[Event, ...]:
        """What befell this request and why, in order: routing, steals, hand-overs, crashes."""
        record = self.status()
        reads = self._client._composer.reads
        why = self._client._door.run(reads.routed_because(self.id))
        ledger = self._client._door.run(reads.ledger(self.id))
        return tell(record, why=why, ledger=ledger)

    def cancel(self, *, reason: str = "cancelled by its client") -> bool:
        """End the request, waiting or running, for a reason of at most 1,000 characters.

        False when it had ended already.
        """
        verdict, _ = self._client._door.run(self._client._composer.cancel(self.id, reason=reason))
        if verdict is Verdict.UNKNOWN:
            known(self.id, None)
        return verdict is Verdict.OK

    def _chunks(self, *, after: int, timeout: float | None) -> Iterator[Chunk]:
        follower, deadline = Follower(self.id, after=after), deadline_after(timeout)
        key = self._client._composer.keys.output(self.id)
        while follower.ended is None:
            left = time_left_s(deadline, f"request {self.id} is not finished")
            found = self._client._door.wait({key: follower.last_id}, block_s=min(left, RECHECK_S))
            if not found:
                self.status()  # raises when the record is gone
            yield from follower.feed(found.get(key, ()))
