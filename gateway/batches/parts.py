"""Answers of an unfinished batch in the store: parts that the holder of the batch's lease has recorded.

Stores of objects cannot append. A part is written whole, and counts once it is recorded in Redis under the lease.
So a gateway that has lost its lease adds nothing. Answers leave the queue only when their part is recorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gateway.batches.store import FileStore, batch_folder
from l4queue.client.batch.files import BatchIdentity, answer_object
from l4queue.errors import InvalidRequest, L4QueueError
from l4queue.protocol.batch_records import BatchCalls, BatchRecord
from l4queue.protocol.calls import Verdict
from l4queue.protocol.executor import Executor

__all__ = ("ERRORS", "OUTPUT", "BatchLease", "LeaseLost", "PartedAnswers", "RecordedIdentity")

OUTPUT, ERRORS = "output", "errors"
_MAX_BUFFER_BYTES = 16 * 2**20  # of answers that are not durable yet; chosen: thousands of usual ones


class LeaseLost(L4QueueError):
    """Another gateway runs this batch now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLease:
    """The lease of one batch under `token`; notes count while it holds."""

    record: BatchRecord
    token: str
    executor: Executor
    calls: BatchCalls

    def note(
        self,
        changes: Mapping[str, str | int] | None = None,
        *,
        parts: Mapping[str, int] | None = None,
        keep_ms: int | None = None,
    ) -> None:
        """Note changes of the record or new parts. LeaseLost where another gateway runs the batch."""
        record = self.record
        note = self.calls.note(
            record.batch_id,
            store=record.store,
            token=self.token,
            changes=changes,
            parts=parts,
            keep_ms=keep_ms,
        )
        verdict, _ = self.executor.run(note)
        if verdict is not Verdict.OK:
            raise LeaseLost(f"batch {record.batch_id} is run by another gateway")


class PartedAnswers:
    """The answers of one kind, OUTPUT or ERRORS. `parts` are those recorded so far, with their lines."""

    def __init__(self, kind: str, parts: Mapping[str, int], *, lease: BatchLease, store: FileStore) -> None:
        self._kind, self._lease, self._store = kind, lease, store
        self._batch_id = lease.record.batch_id
        self._parts = {name: lines for name, lines in parts.items() if name.startswith(f"{kind}-")}
        self._buffer: list[bytes] = []
        self._buffer_bytes = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing is recorded."""
        return not self._parts

    @property
    def num_lines(self) -> int:
        """Recorded answers."""
        return sum(self._parts.values())

    def lines(self) -> Iterator[bytes]:
        """Recorded answers, in the order in which they were recorded."""
        for name in sorted(self._parts):
            yield from self._store.lines(self._path(name))

    def chunks(self) -> Iterator[bytes]:
        """The same as larger pieces."""
        for name in sorted(self._parts):
            yield from self._store.chunks(self._path(name))

    def numbered(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """See `AnswerFile.numbered`."""
        for number, data in enumerate(self.lines(), 1):
            answer = answer_object(data)
            if answer is None:
                raise self.unusable(number, "is not from a batch")
            yield number, answer

    def unusable(self, number: int, why: str) -> InvalidRequest:
        """See `AnswerFile.unusable`."""
        return InvalidRequest(f"line {number} of {self._kind} of {self._batch_id} {why}", field="out")

    def append(self, line: bytes) -> None:
        """Add one line, its end included."""
        self._buffer.append(line)
        self._buffer_bytes += len(line)
        if self._buffer_bytes >= _MAX_BUFFER_BYTES:
            self.sync()

    def flush(self) -> None:
        """Nothing: nobody reads parts that are not recorded."""

    def sync(self) -> None:
        """Write a part and record it. LeaseLost where another gateway runs the batch: then it does not count."""
        if not self._buffer:
            return
        name = f"{self._kind}-{len(self._parts):06d}-{self._lease.token}"
        self._store.put(self._path(name), self._buffer)
        self._lease.note(parts={name: len(self._buffer)})
        self._parts[name] = len(self._buffer)
        self._buffer, self._buffer_bytes = [], 0

    def _path(self, name: str) -> str:
        return f"{batch_folder(self._batch_id)}/{name}"


class RecordedIdentity:
    """The identity of a batch is the id of its record."""

    goes_on = True

    def __init__(self, batch_id: str) -> None:
        self._batch_id = batch_id

    def read(self) -> BatchIdentity:
        """Its id; which lines were enqueued the queue itself knows."""
        return BatchIdentity(batch_id=self._batch_id)

    def write(self, identity: BatchIdentity) -> None:
        """Nothing: it does not change."""

    def remove(self) -> None:
        """Nothing: the record says that the batch has ended."""
