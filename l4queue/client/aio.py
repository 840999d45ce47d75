"""The asyncio client: the blocking one, awaited."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
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
from l4queue.client.mailbox import Mailbox
from l4queue.client.story import Event, tell
from l4queue.client.waiting import RECHECK_S, deadline_after, time_left_s
from l4queue.config import Settings, load_settings
from l4queue.errors import QueueFull
from l4queue.models import TERMINAL, Plan, RequestSpec
from l4queue.policy.plan_json import plan_from_json
from l4queue.protocol.calls import SubmitReply, Verdict
from l4queue.protocol.door import AsyncDoor
from l4queue.protocol.overview import Overview, read_overview_async
from l4queue.protocol.reads import DeadLetter
from l4queue.protocol.records import RequestRecord

__all__ = ("AsyncClient", "AsyncHandle")

_BATCH = 256


class AsyncClient:
    """Enqueues requests and reads their results on one event loop; close it, or use `async with`.

    `url` overrides `L4_REDIS_URL`; other settings come from the environment or from `settings`.
    """

    def __init__(self, url: str | None = None, *, settings: Settings | None = None) -> None:
        self.settings = settings or load_settings()
        self._composer = Composer(self.settings)
        self._door = AsyncDoor(url or self.settings.redis_url)
        self._mailbox = Mailbox(self._door, self._composer.keys.mailbox(self._composer.client_id))

    async def enqueue(self, prompt: str | None = None, **options: Any) -> AsyncHandle:
        """Accept one request and return its handle.

        Give one of `prompt`, `messages` (chat), `token_ids`; then sampling parameters (`max_tokens`,
        `temperature`, `top_p`, `stop`, ...), `priority` (lower first), `deadline_s`, `idempotency_key`,
        `metadata`. InvalidRequest names a bad one; QueueFull says when to try again.
        """
        prepared = self._composer.prepare(build_spec(prompt, **options))
        return self._handle(prepared, await self._door.run(prepared.call))

    async def enqueue_many(
        self,
        requests: Iterable[str | dict[str, Any] | RequestSpec],
        *,
        progress: Callable[[int], None] | None = None,
        block: bool = True,
        **common: Any,
    ) -> list[AsyncHandle]:
        """Accept many requests in few round trips; handles come back in order.

        Each is a prompt, a dictionary of `enqueue` arguments or a RequestSpec; `common` applies to the
        first two. All are validated before any is sent. `progress` is called with the number accepted so
        far. When the backlog is full: wait for room (`block`) or raise QueueFull with what was accepted
        already queued.
        """
        prepared = [self._composer.prepare(spec_of(request, common)) for request in requests]
        handles: list[AsyncHandle] = []
        while len(handles) < len(prepared):
            batch = prepared[len(handles) : len(handles) + _BATCH]
            try:
                handles.extend(await self._submit_prefix(batch))
            except QueueFull as full:
                if not block:
                    raise
                await asyncio.sleep(full.retry_after_s)
            if progress is not None:
                progress(len(handles))
        return handles

    async def get(self, request_id: str) -> AsyncHandle:
        """The handle of an earlier request; UnknownRequest when there is no record of it."""
        handle = AsyncHandle(self, checked_id(request_id))
        await handle.status()
        return handle

    async def as_completed(
        self, handles: Iterable[AsyncHandle], *, timeout: float | None = None
    ) -> AsyncIterator[AsyncHandle]:
        """Handles of this client in the order in which they end; ResultTimeout after `timeout` seconds."""
        pending = {handle.id: handle for handle in handles}
        deadline = deadline_after(timeout)
        mailbox, last_id = self._composer.keys.mailbox(self._composer.client_id), "0-0"
        async for handle in self._ended(pending):
            yield handle
        checked = time.monotonic()
        while pending:
            left = time_left_s(deadline, f"{len(pending)} requests are not finished")
            found = await self._door.wait({mailbox: last_id}, block_s=min(left, RECHECK_S), count=1000)
            for entry_id, values in found.get(mailbox, ()):
                last_id = entry_id.decode()
                ended = pending.pop(values[b"i"].decode(), None)
                if ended is not None:
                    yield ended
            if time.monotonic() - checked > RECHECK_S:
                async for handle in self._ended(pending):
                    yield handle
                checked = time.monotonic()

    async def run_batch(
        self,
        path_in: str | PathLike[str],
        path_out: str | PathLike[str],
        *,
        path_errors: str | PathLike[str] | None = None,
        progress: Callable[[BatchProgress], None] | None = None,
        **options: Any,
    ) -> BatchSummary:
        """The same as `Client.run_batch`, in a thread of its own; `progress` is called there.

        Cancelling this task stops the batch cleanly: what has ended is written, the same call continues.
        """
        from l4queue.client.batch.run import run_batch  # brings numpy, which nobody else here needs

        stop = threading.Event()
        chosen = batch_options(path_in, path_out, path_errors, **options)
        running = asyncio.create_task(
            asyncio.to_thread(run_batch, self.settings, chosen, url=self._door.url, progress=progress, stop=stop)
        )
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            stop.set()
            await asyncio.wait({running})
            raise

    async def overview(self) -> Overview:
        """Plan, workers, queues and totals, now."""
        return await read_overview_async(self._door, self.settings.namespace)

    async def plan_history(self, *, count: int = 20) -> list[Plan]:
        """The latest published plans, newest first."""
        rows = await self._door.run(self._composer.reads.plan_history(count=checked_count(count)))
        return [plan_from_json(body) for _, _, body in rows]

    async def dead_letters(self, *, count: int = 100) -> list[DeadLetter]:
        """The latest requests that kill their worker and entries that cannot be read, newest first."""
        return await self._door.run(self._composer.reads.dead_letters(count=checked_count(count)))

    async def close(self) -> None:
        """Close all connections; safe to call twice."""
        await self._mailbox.close()
        await self._door.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _submit_prefix(self, batch: Sequence[Prepared]) -> list[AsyncHandle]:
        """Submit a batch; handles of the accepted prefix. QueueFull only when not even the first fits."""
        replies = await self._door.run_many([prepared.call for prepared in batch])
        handles: list[AsyncHandle] = []
        for prepared, reply in zip(batch, replies, strict=True):
            if reply.verdict is Verdict.FULL and handles:
                break
            handles.append(self._handle(prepared, reply))
        return handles

    def _handle(self, prepared: Prepared, reply: SubmitReply) -> AsyncHandle:
        request_id = self._composer.accepted(prepared, reply)
        return AsyncHandle(self, request_id, has_mail=reply.verdict is Verdict.OK)

    async def _ended(self, pending: dict[str, AsyncHandle]) -> AsyncIterator[AsyncHandle]:
        """Take out of `pending` and yield those whose record is terminal already."""
        for start in range(0, len(pending), 1000):
            ids = list(pending)[start : start + 1000]
            records = await self._door.run_many([self._composer.reads.record(i) for i in ids])
            done = [i for i, record in zip(ids, records, strict=True) if known(i, record).state in TERMINAL]
            for request_id in done:
                yield pending.pop(request_id)


class AsyncHandle:
    """One accepted request. Any number of handles, in any process, may read the same request."""

    def __init__(self, client: AsyncClient, request_id: str, *, has_mail: bool = False) -> None:
        self._client = client
        self._has_mail = has_mail  # whether this very client is told of the end
        self.id = request_id

    def __repr__(self) -> str:
        return f"AsyncHandle({self.id!r})"

    async def status(self) -> RequestRecord:
        """Where the request is now: state, stage, worker, tokens, times."""
        return known(self.id, await self._client._door.run(self._client._composer.reads.record(self.id)))

    async def stream(self, *, after: int = 0, timeout: float | None = None) -> AsyncIterator[Chunk]:
        """Chunks as they are generated, from the first token or after `after` tokens.

        Ends with the request; an outcome other than done is raised after its last chunk. No chunk is ever
        repeated, skipped or changed, whatever happens to workers. ResultTimeout after `timeout` seconds.
        """
        async for chunk in self._chunks(after=after, deadline=deadline_after(timeout)):
            yield chunk
        check_outcome(await self.status())

    async def result(self, *, timeout: float | None = None) -> Result:
        """Wait for the outcome: the result of a done request, or the error that says how it ended."""
        deadline = deadline_after(timeout)
        if self._has_mail:
            await self._client._mailbox.until(
                self.id,
                self._has_ended,
                time_left_s=lambda: time_left_s(deadline, f"request {self.id} is not finished"),
            )
        chunks = [chunk async for chunk in self._chunks(after=0, deadline=deadline)]
        return self._client._composer.result(await self.status(), chunks)

    async def explain(self) -> tuple[Event, ...]:
        """What befell this request and why, in order: routing, steals, hand-overs, crashes."""
        record = await self.status()
        reads = self._client._composer.reads
        why = await self._client._door.run(reads.routed_because(self.id))
        ledger = await self._client._door.run(reads.ledger(self.id))
        return tell(record, why=why, ledger=ledger)

    async def cancel(self, *, reason: str = "cancelled by its client") -> bool:
        """End the request, waiting or running, for a reason of at most 1,000 characters.

        False when it had ended already.
        """
        verdict, _ = await self._client._door.run(self._client._composer.cancel(self.id, reason=reason))
        if verdict is Verdict.UNKNOWN:
            known(self.id, None)
        return verdict is Verdict.OK

    async def _has_ended(self) -> bool:
        return (await self.status()).state in TERMINAL

    async def _chunks(self, *, after: int, deadline: float | None) -> AsyncIterator[Chunk]:
        follower = Follower(self.id, after=after)
        key = self._client._composer.keys.output(self.id)
        while follower.ended is None:
            left = time_left_s(deadline, f"request {self.id} is not finished")
            found = await self._client._door.wait({key: follower.last_id}, block_s=min(left, RECHECK_S))
            if not found:
                await self.status()  # raises when the record is gone
            for chunk in follower.feed(found.get(key, ())):
                yield chunk
