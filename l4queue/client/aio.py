"""The asyncio client: the same calls as the blocking one, awaited."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import suppress
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack, overload

from l4queue.client.arguments import build_spec, checked_count, checked_id, checked_patience, id_in_queue
from l4queue.client.batch import BatchProgress, BatchSummary, load_run_batch
from l4queue.client.bulk import Bulk
from l4queue.client.core import Chunk, ClientCore, Prepared, Result, check_outcome, known
from l4queue.client.demux import RequestWatch
from l4queue.client.handle import HandleBase, QueueAddress, client_at, forget, remember
from l4queue.client.listener import AsyncListener
from l4queue.client.options import EnqueueOptions, Messages, Params, RequestFields, TokenIds, with_options
from l4queue.client.read_marks import ReadMarks
from l4queue.client.status import RequestStatus
from l4queue.client.waiting import Ends, deadline_after, is_patient, time_left_s, wait_async
from l4queue.errors import L4QueueError
from l4queue.models import TERMINAL, Plan, RequestSpec, RequestState
from l4queue.observe.explain import Event, tell
from l4queue.protocol.plans import readable_plans
from l4queue.protocol.reads import DeadLetter
from l4queue.protocol.records import RequestRecord
from l4queue.protocol.retention import Retention

if TYPE_CHECKING:
    from l4queue.client.batch.options import BatchRunOptions
    from l4queue.config import Settings
    from l4queue.observe.overview import Overview

__all__ = ("AsyncClient", "AsyncHandle")


class AsyncClient:
    """Enqueues requests and reads their results on one event loop; close it, or use `async with`.

    `url` overrides `L4_REDIS_URL`; other settings come from the environment or from `settings`. Nothing connects
    before the first call; `ping` tries. `timeout_s` is how long each call tries to reach Redis before it raises
    ServiceUnavailable, by default 10 s; 0 is one try. A server that hangs is waited for once more at the end, for
    as long, but 5 s at most.
    """

    def __init__(
        self, url: str | None = None, *, timeout_s: float = 10.0, settings: Settings | None = None
    ) -> None:
        from l4queue.config import client_settings  # with redis-py as long to import as the rest of a client
        from l4queue.protocol.executor import AsyncExecutor

        patience_s = checked_patience(timeout_s)
        self.settings = client_settings(settings)
        self._core = ClientCore(self.settings)
        self._executor = AsyncExecutor(
            url or self.settings.redis_url, retry_s=patience_s, socket_timeout_s=patience_s
        )
        self._listener = AsyncListener(self._executor, self._core)
        self._marks = ReadMarks(Retention(self._core.keys), now_s=time.monotonic())
        self._place = QueueAddress.of(self._executor.url, self.settings.namespace)
        remember(self)

    def __repr__(self) -> str:
        return f"AsyncClient({self._place.url!r}, namespace={self._place.namespace!r})"

    async def ping(self) -> float:
        """The time of a round trip to Redis, s; ServiceUnavailable where it does not answer within `timeout_s`.

        >>> await AsyncClient(timeout_s=1).ping()
        """
        began_s = time.monotonic()
        await self._executor.run(self._core.ping())
        return time.monotonic() - began_s

    @overload
    async def enqueue(
        self, prompt: str, params: Params | None = None, **options: Unpack[EnqueueOptions]
    ) -> AsyncHandle: ...

    @overload
    async def enqueue(
        self, *, messages: Messages, params: Params | None = None, **options: Unpack[EnqueueOptions]
    ) -> AsyncHandle: ...

    @overload
    async def enqueue(
        self, *, token_ids: TokenIds, params: Params | None = None, **options: Unpack[EnqueueOptions]
    ) -> AsyncHandle: ...

    @overload
    async def enqueue(self, request: RequestSpec, /) -> AsyncHandle: ...

    @with_options
    async def enqueue(
        self, prompt: str | RequestSpec | None = None, params: Params | None = None, **options: Any
    ) -> AsyncHandle:
        """Accept one request and return its handle, before it is computed.

        Give one prompt: a text, `messages` (a chat, rendered by the model's template), or `token_ids`; or a whole
        RequestSpec. Then options, by name. `params` holds sampling parameters in one value; options beside it
        count more. numpy's numbers and arrays, lists and tuples are welcome.

        | option | values | default |
        |---|---|---|
        | `max_tokens` | 1 to 1,000,000 tokens | all that still fits the model |
        | `min_tokens` | tokens, up to `max_tokens` | 0 |
        | `temperature` | 0 (greedy) to 2 | 1 |
        | `top_p`, `min_p` | (0, 1], [0, 1] | 1, 0 |
        | `top_k` | tokens; 0 or -1: every one | 0 |
        | `seed` | 64 bits, signed | none |
        | `stop`, `stop_token_ids` | a text or up to 16; up to 64 ids | none |
        | `ignore_eos` | True, False | False |
        | `presence_penalty`, `frequency_penalty` | -2 to 2 | 0 |
        | `repetition_penalty` | above 0 | 1 |
        | `logprobs` | 0 to 20 others beside each token | none |
        | `structured_outputs` | one of `json`, `regex`, `choice`, `grammar`, `structural_tag` | none |
        | `logit_bias` | -100 to 100 by token id | none |
        | `allowed_token_ids`, `bad_words` | token ids; up to 256 texts | all, none |
        | `skip_special_tokens` | True, False | True |
        | `priority` | -100 to 100, lower is first | 0 |
        | `deadline_s` | s from now, up to 30 days | never |
        | `idempotency_key` | 1 to 512 characters | none |
        | `metadata` | comes back with the result | none |
        | `traceparent` | W3C trace context | the current span's |

        InvalidRequest names a bad one; QueueFull says when to try again; IdempotencyConflict: the key is known
        with another request; ServiceUnavailable after `timeout_s` without Redis.

        >>> handle = await client.enqueue("Once upon a time", max_tokens=64, stop="\\n\\n")
        >>> print((await handle.result()).text)
        """
        spec = build_spec(prompt, params, **options)
        return (await self._submit([self._core.prepare(spec)], block=False))[0]

    async def enqueue_many(
        self,
        requests: Iterable[str | RequestFields | RequestSpec],
        *,
        progress: Callable[[int], None] | None = None,
        block: bool = True,
        **common: Unpack[RequestFields],
    ) -> list[AsyncHandle]:
        """Accept many requests in few round trips; handles come back in order.

        Each is a prompt, a dictionary of `enqueue` arguments or a RequestSpec; `common` applies to the
        first two. All are validated before any is sent. `progress` is called with the number accepted so
        far. When the backlog is full: wait for room (`block`) or raise QueueFull. Whatever is raised has the
        handles of the accepted ones: see `L4QueueError`. A conflicting idempotency key ends the work with its
        batch of 256.

        >>> handles = await client.enqueue_many(["one", {"prompt": "two", "seed": 2}], max_tokens=64)
        """
        return await self._submit(self._core.prepare_many(requests, common), block=block, progress=progress)

    async def enqueue_as(self, requests: Mapping[str, RequestSpec]) -> list[AsyncHandle]:
        """Accept requests under ids of the caller's own, in one round trip; handles come back in order.

        While a request has a record, the same one under its id is found and not computed again; another one is an
        IdempotencyConflict. An idempotency key decides before the id. QueueFull when the backlog is full.
        """
        prepared = [self._core.prepare(spec, request_id=checked_id(name)) for name, spec in requests.items()]
        return await self._submit(prepared, block=False)

    async def get(self, request_id: str | AsyncHandle) -> AsyncHandle:
        """The handle of an earlier request, by its id or another handle of it; UnknownRequest without a record.

        The id may be that of an answer over HTTP: `chatcmpl-...`, `cmpl-...`, `resp_...`.
        """
        handle = AsyncHandle(
            self, id_in_queue(request_id.id if isinstance(request_id, AsyncHandle) else request_id)
        )
        await handle.status()
        return handle

    async def as_completed(
        self, handles: Iterable[AsyncHandle], *, timeout: float | None = None
    ) -> AsyncIterator[AsyncHandle]:
        """Handles in the order in which they end; ResultTimeout after `timeout` seconds.

        A handle that is given twice comes once. Other clients' handles and earlier ones may be among them.
        """
        event = asyncio.Event()
        deadline = deadline_after(timeout)
        asks = not is_patient(deadline)
        ends = Ends(handles, has_mail=lambda h: h._has_mail and h._client is self, event=event, asks=asks)
        try:
            await self._listener.begin(ends.watches)
            while ends.num_pending:
                event.clear()
                for handle in ends.take():
                    yield handle
                if ends.num_pending and not event.is_set():
                    left_s = ends.left_s(deadline)
                    await wait_async(event, left_s)
        finally:
            self._listener.end(ends.watches)

    async def run_batch(
        self,
        path_in: str | PathLike[str],
        path_out: str | PathLike[str],
        *,
        path_errors: str | PathLike[str] | None = None,
        progress: Callable[[BatchProgress], None] | None = None,
        **options: Unpack[BatchRunOptions],
    ) -> BatchSummary:
        """The same as `Client.run_batch`, in a thread of its own; `progress` is called there.

        Cancelling this task stops the batch cleanly: what has ended is written, the same call continues.
        """
        from l4queue.client.batch.options import batch_options

        run_batch = load_run_batch()
        stop = threading.Event()
        chosen = batch_options(path_in, path_out, path_errors, **options)
        running = asyncio.create_task(
            asyncio.to_thread(
                run_batch, self.settings, chosen, url=self._executor.url, progress=progress, stop=stop
            )
        )
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            stop.set()
            await asyncio.wait({running})
            raise

    async def overview(self) -> Overview:
        """Plan, workers, queues and totals, now."""
        from l4queue.observe.overview import read_overview_async

        return await read_overview_async(self._executor, self.settings.namespace)

    async def plan_history(self, *, count: int = 20) -> list[Plan]:
        """The latest published plans that this release can read, newest first."""
        rows = await self._executor.run(self._core.reads.plan_history(count=checked_count(count)))
        return readable_plans((body for _, _, body in rows), key=self._core.keys.plans)

    async def dead_letters(self, *, count: int = 100) -> list[DeadLetter]:
        """The latest requests that kill their worker and entries that cannot be read, newest first."""
        return await self._executor.run(self._core.reads.dead_letters(count=checked_count(count)))

    async def _has_read(self, request_id: str) -> None:
        """Note a result that was read; told to the server now and then, in one try."""
        report = self._marks.add(request_id, now_s=time.monotonic())
        if report is not None:
            with suppress(L4QueueError):
                await self._executor.offer(report)

    async def close(self) -> None:
        """Close all connections; safe to call twice."""
        forget(self)
        if (report := self._marks.rest()) is not None:
            with suppress(L4QueueError):
                await self._executor.offer(report)
        await self._listener.close()
        await self._executor.close()

    def _is_usable(self) -> bool:
        """Whether a handle that was pickled may use it here."""
        return self._executor.is_of_this_loop()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _submit(
        self,
        prepared: Iterable[Prepared],
        *,
        block: bool,
        progress: Callable[[int], None] | None = None,
    ) -> list[AsyncHandle]:
        bulk = Bulk(self._core, prepared, lambda i, has_mail: AsyncHandle(self, i, has_mail=has_mail))
        with bulk:
            while bulk.is_open:
                full = bulk.answered(await self._executor.run_many(bulk.next_batch()))
                if progress is not None:
                    progress(len(bulk.handles))
                if full is not None and not block:
                    raise full
                if full is not None:
                    await asyncio.sleep(full.retry_after_s)
        return bulk.handles


class AsyncHandle(HandleBase):
    """One accepted request. Any number of handles, in any process, may read the same request.

    Handles of one request are equal. Pickled, a handle is the id and the place of its queue, without passwords;
    where it is read, it connects when it is first used. `repr` tells the last that this handle has seen.
    """

    def __init__(self, client: AsyncClient, request_id: str, *, has_mail: bool = False) -> None:
        super().__init__(request_id, client._place, has_mail=has_mail)
        self._own: AsyncClient | None = client
        self._was_pickled = False

    @property
    def _client(self) -> AsyncClient:
        if self._own is None or (self._was_pickled and not self._own._is_usable()):
            self._own = client_at(
                self._place, AsyncClient, lambda url, settings: AsyncClient(url, settings=settings)
            )
        return self._own

    @classmethod
    def _at(cls, request_id: str, place: QueueAddress) -> AsyncHandle:
        handle = cls.__new__(cls)
        HandleBase.__init__(handle, request_id, place)
        handle._own, handle._was_pickled = None, True
        return handle

    async def status(self) -> RequestStatus:
        """Where the request is now: state, stage, worker, tokens, times in s; UnknownRequest without a record.

        >>> (await handle.status()).state
        """
        record = await self._record()
        self._noted(record)
        return RequestStatus.of(record)

    async def _record(self) -> RequestRecord:
        return known(self.id, await self._client._executor.run(self._client._core.reads.record(self.id)))

    def stream(self, *, after: int = 0, timeout: float | None = None) -> AsyncIterator[Chunk]:
        """Chunks as they are generated, from the first token or after `after` tokens.

        Ends with the request; an outcome other than done is raised after its last chunk. No token is ever
        repeated, skipped or changed, whatever happens to workers. ResultTimeout after `timeout` seconds;
        InvalidRequest for `after` beyond the end; OutputLost when output was deleted before its record.
        """
        return self._chunks(after=after, deadline=deadline_after(timeout))

    async def result(self, *, timeout: float | None = None) -> Result:
        """Wait for the outcome: the result of a done request, or the error that says how it ended.

        The result of a request that has ended is there whatever the timeout. OutputLost when its output is not.
        """
        deadline = deadline_after(timeout)
        while True:
            if self._seen_end is None:
                asks, wait = self._must_ask(deadline), self._client._listener.wait_for_end
                self._ended(await wait(self.id, has_mail=self._has_mail, asks=asks, deadline=deadline))
            found, entries = await self._client._listener.outcome(self.id, is_first=self._seen is None)
            record = known(self.id, found)
            self._noted(record)
            if record.state in TERMINAL:  # mail may tell of an end that a server has forgotten
                result = self._client._core.result(record, entries)
                await self._client._has_read(self.id)
                return result

    async def explain(self) -> tuple[Event, ...]:
        """The events of this request with their reasons, in order: routing, steals, hand-overs, crashes."""
        record = await self._record()
        reads = self._client._core.reads
        calls = (reads.routed_because(self.id), reads.ledger(self.id))
        why, ledger = await self._client._executor.run_many(calls)
        return tell(record, why=why, ledger=ledger)

    async def cancel(self, *, reason: str = "cancelled by its client") -> bool:
        """End the request, waiting or running, for a reason of at most 1,000 characters.

        False when it had ended already.
        """
        verdict, _ = await self._client._executor.run(self._client._core.cancel(self.id, reason=reason))
        return self._was_cancelled(verdict)

    async def _chunks(self, *, after: int, deadline: float | None) -> AsyncIterator[Chunk]:
        """Chunks after the first `after` tokens until the end."""
        event, listener = asyncio.Event(), self._client._listener
        asks = self._must_ask(deadline)
        watch = RequestWatch(self.id, wake=event.set, after=after, has_mail=self._has_mail, asks=asks)
        try:
            await listener.begin([watch])
            while True:
                event.clear()
                chunks, must_read, is_all = watch.take()
                for chunk in chunks:
                    self._seen_tokens = chunk.offset
                    yield chunk
                if is_all:
                    self._ended(watch.state)
                    break
                if must_read:
                    await listener.read(watch)
                    continue
                await wait_async(event, time_left_s(deadline, f"request {self.id} is not finished"))
        finally:
            listener.end([watch])
        if watch.state is not RequestState.DONE:
            check_outcome(await self._record())
