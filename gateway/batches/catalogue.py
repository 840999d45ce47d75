"""Catalogue of files and batches: made, shown, listed, cancelled and deleted, each for its owner alone."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from http import HTTPStatus
from typing import Any, TypeVar

from gateway.batches.bodies import ENDPOINTS, BatchBody, BatchPage, ExpiresAfter, FilePage, window_s
from gateway.batches.objects import batch_object, deleted_object, file_object, list_object
from gateway.batches.store import FileStore, file_name
from gateway.refusals import HttpRefused
from l4queue.config import Settings
from l4queue.errors import InvalidRequest, ServiceUnavailable
from l4queue.protocol.batch_records import BatchCalls, BatchRecord
from l4queue.protocol.calls import Call, Verdict
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.file_records import FileCalls, FileRecord, page, place_of
from l4queue.protocol.keys import Keys
from l4queue.protocol.reads import Reads

__all__ = ("Catalogue",)

R = TypeVar("R", FileRecord, BatchRecord)
MAX_UNFINISHED = 10_000  # batches of a store; chosen: their records take 10 MB of Redis
_PAGE = 500  # records of one read of a long list


class Catalogue:
    """Files and batches of one store. Belongs to one event loop; `begun` is called with each new batch."""

    def __init__(
        self,
        settings: Settings,
        store: FileStore,
        executor: AsyncExecutor,
        *,
        begun: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._store = store
        self._begun = begun
        self._keys = Keys(settings.namespace)
        self._files, self._batches = FileCalls(self._keys), BatchCalls(self._keys)
        self._reads = Reads(self._keys)
        self._executor = executor

    # files --------------------------------------------------------------------------------------
    async def add_file(
        self, owner: str, name: str, purpose: str, chunks: Iterable[bytes], expires_after: ExpiresAfter | None
    ) -> dict[str, Any]:
        """Store a file, then record it."""
        file_id = f"file-{uuid.uuid4().hex}"
        store_id = await self._store_id()
        num_bytes = await asyncio.to_thread(self._store.put, file_name(file_id), chunks)
        now_ms = await self._executor.run(self._reads.server_time_ms())
        ttl_s = self._settings.http_files_ttl_s
        if expires_after is not None:
            ttl_s = min(ttl_s, expires_after.seconds)
        record = FileRecord(
            file_id=file_id,
            owner=owner,
            store=store_id,
            name=name,
            purpose=purpose,
            num_bytes=num_bytes,
            created_ms=now_ms,
            expires_ms=now_ms + int(ttl_s * 1000),
        )
        await self._executor.run_many(self._files.keep(record))
        return file_object(record)

    async def file(self, owner: str, file_id: str) -> dict[str, Any]:
        """One file."""
        return file_object(await self._file(owner, file_id))

    async def content(self, owner: str, file_id: str) -> tuple[FileRecord, Iterator[bytes]]:
        """A file and its contents."""
        record = await self._file(owner, file_id)
        await self._check_store(record.store)
        try:
            return record, await asyncio.to_thread(self._store.chunks, file_name(file_id))
        except FileNotFoundError:
            raise _unknown("file", file_id) from None

    async def files(self, owner: str, asked: FilePage) -> dict[str, Any]:
        """A page of the files of an owner."""
        is_newest_first = asked.order == "desc"
        found = self._listed(
            self._keys.files(owner), asked.after, self._files.read, is_newest_first=is_newest_first, what="file"
        )
        chosen = (record async for record in found if asked.purpose in (None, record.purpose))
        items = await _first(chosen, asked.limit + 1)
        return list_object([file_object(r) for r in items[: asked.limit]], has_more=len(items) > asked.limit)

    async def delete_file(self, owner: str, file_id: str) -> dict[str, Any]:
        """Forget a file, then remove its contents. A batch that still needs it is a conflict."""
        record = await self._file(owner, file_id)
        await self._check_store(record.store)
        for batch in await self._unfinished():
            if batch.input_file_id == file_id:
                told = f"batch {batch.batch_id} still reads this file"
                raise HttpRefused(HTTPStatus.CONFLICT, told, field="file_id")
        await self._executor.run_many(self._files.drop(record))
        await asyncio.to_thread(self._store.delete, file_name(file_id))
        return deleted_object(file_id)

    # batches ------------------------------------------------------------------------------------
    async def begin_batch(self, owner: str, body: BatchBody) -> dict[str, Any]:
        """Record a batch; any gateway with this store runs it."""
        if body.endpoint not in ENDPOINTS:
            raise InvalidRequest(f"must be {' or '.join(ENDPOINTS)}", field="endpoint")
        length_s = window_s(body.completion_window)
        try:
            file = await self._file(owner, body.input_file_id)
        except HttpRefused as error:
            raise InvalidRequest(str(error), field="input_file_id") from None
        await self._check_store(file.store)
        now_ms, num_unfinished = await self._executor.run_many(
            [self._reads.server_time_ms(), self._batches.num_unfinished(file.store)]
        )
        if num_unfinished >= MAX_UNFINISHED:
            told = f"{num_unfinished} batches are unfinished; try again when some have ended"
            raise HttpRefused(HTTPStatus.TOO_MANY_REQUESTS, told)
        ttl_s = int(self._settings.http_files_ttl_s)
        if body.output_expires_after is not None:
            ttl_s = min(ttl_s, body.output_expires_after.seconds)
        record = BatchRecord(
            batch_id=f"batch_{uuid.uuid4().hex}",
            owner=owner,
            store=file.store,
            input_file_id=file.file_id,
            endpoint=body.endpoint,
            completion_window=body.completion_window,
            created_ms=now_ms,
            expires_ms=now_ms + length_s * 1000,
            output_ttl_s=max(1, ttl_s),
            metadata=None if body.metadata is None else json.dumps(body.metadata),
        )
        await self._executor.run_many(self._batches.begin(record))
        self._begun()
        return batch_object(record)

    async def batch(self, owner: str, batch_id: str) -> dict[str, Any]:
        """One batch."""
        return batch_object(await self._batch(owner, batch_id))

    async def batches(self, owner: str, asked: BatchPage) -> dict[str, Any]:
        """A page of the batches of an owner, newest first."""
        found = self._listed(
            self._keys.batches(owner), asked.after, self._batches.read, is_newest_first=True, what="batch"
        )
        items = await _first(found, asked.limit + 1)
        return list_object([batch_object(r) for r in items[: asked.limit]], has_more=len(items) > asked.limit)

    async def cancel_batch(self, owner: str, batch_id: str) -> dict[str, Any]:
        """Ask for the end of a batch; what is finished is kept."""
        await self._batch(owner, batch_id)
        verdict, state = await self._executor.run(self._batches.cancel(batch_id))
        if verdict is Verdict.IS:
            raise HttpRefused(HTTPStatus.CONFLICT, f"a batch that is {state} cannot be cancelled")
        self._begun()  # the gateway that runs it may be this one
        return batch_object(await self._batch(owner, batch_id))

    # what both need -----------------------------------------------------------------------------
    async def _file(self, owner: str, file_id: str) -> FileRecord:
        record = await self._executor.run(self._files.read(file_id))
        if record is None or record.owner != owner:
            raise _unknown("file", file_id)
        return record

    async def _batch(self, owner: str, batch_id: str) -> BatchRecord:
        record = await self._executor.run(self._batches.read(batch_id))
        if record is None or record.owner != owner:
            raise _unknown("batch", batch_id)
        return record

    async def _unfinished(self) -> list[BatchRecord]:
        ids = await self._executor.run(self._batches.unfinished(await self._store_id(), limit=MAX_UNFINISHED))
        records = await self._executor.run_many([self._batches.read(batch_id) for batch_id in ids])
        return [record for record in records if record is not None]

    async def _listed(
        self,
        key: str,
        after: str | None,
        read: Callable[[str], Call[R | None]],
        *,
        is_newest_first: bool,
        what: str,
    ) -> AsyncIterator[R]:
        """Records of a list behind `after`; names without a record leave the list."""
        start = 0
        if after is not None:
            place = await self._executor.run(place_of(key, after, is_newest_first=is_newest_first))
            if place is None:
                raise InvalidRequest(f"there is no {what} {after}", field="after")
            start = place + 1
        while True:
            ids = await self._executor.run(page(key, start=start, count=_PAGE, is_newest_first=is_newest_first))
            records = await self._executor.run_many([read(name) for name in ids])
            for record in records:
                if record is not None:
                    yield record
            lost = [name for name, record in zip(ids, records, strict=True) if record is None]
            await self._executor.run_many([self._batches.unlist(key, name) for name in lost])
            start += len(ids) - len(lost)
            if len(ids) < _PAGE:
                return

    async def _store_id(self) -> str:
        return await asyncio.to_thread(lambda: self._store.store_id)

    async def _check_store(self, store_id: str) -> None:
        if store_id != await self._store_id():
            raise ServiceUnavailable(
                "this file lies in the store of another gateway: L4_HTTP_FILES must name one that all share"
            )


async def _first(found: AsyncIterator[R], count: int) -> list[R]:
    items: list[R] = []
    async for record in found:
        items.append(record)
        if len(items) == count:
            break
    return items


def _unknown(what: str, name: str) -> HttpRefused:
    return HttpRefused(HTTPStatus.NOT_FOUND, f"there is no {what} {name[:128]}", field=f"{what}_id")
