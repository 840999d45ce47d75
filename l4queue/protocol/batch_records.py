"""Records of the gateway's batches in Redis: values, the lease by which one gateway runs each, and the calls."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict

from l4queue.protocol.calls import Arg, Call
from l4queue.protocol.file_records import record_of, written
from l4queue.protocol.foreign import or_else, text
from l4queue.protocol.keys import Keys
from l4queue.protocol.replies import Verdict, parse_cancelled

__all__ = ("ENDED", "BatchCalls", "BatchRecord", "BatchState")


class BatchState(StrEnum):
    """State of a batch, as OpenAI names it."""

    VALIDATING = "validating"
    FAILED = "failed"  # its input cannot be used
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"  # its window passed
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


ENDED = frozenset({BatchState.FAILED, BatchState.COMPLETED, BatchState.EXPIRED, BatchState.CANCELLED})
"""States in which a batch stays."""


class BatchRecord(BaseModel):
    """A batch. `owner` is the name of an API key, "" where there are none; times are the server's.

    `metadata` and `errors` are JSON. `outcome` is how a finalizing batch ends.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    batch_id: str
    owner: str
    store: str
    input_file_id: str
    endpoint: str
    completion_window: str
    created_ms: int
    expires_ms: int
    output_ttl_s: int
    state: BatchState = BatchState.VALIDATING
    metadata: str | None = None
    errors: str | None = None
    outcome: BatchState | None = None
    in_progress_ms: int | None = None
    finalizing_ms: int | None = None
    cancelling_ms: int | None = None
    ended_ms: int | None = None
    num_lines: int = 0
    num_succeeded: int = 0
    num_failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    holder: str = ""
    held_until_ms: int = 0

    @property
    def shown_state(self) -> BatchState:
        """The state as its owner sees it: asked to cancel, it is cancelling."""
        is_early = self.state in (BatchState.VALIDATING, BatchState.IN_PROGRESS)
        return BatchState.CANCELLING if is_early and self.cancelling_ms is not None else self.state


class BatchCalls:
    """Builders of the calls about batches under one namespace. Pure."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys

    def begin(self, record: BatchRecord) -> tuple[Call[Any], ...]:
        """Record a new batch. In this order: nobody runs or lists a batch that has no record."""
        k, batch_id = self.keys, record.batch_id
        return (
            Call(None, (), ("HSET", k.batch(batch_id), *written(record)), int),
            Call(None, (), ("ZADD", k.open_batches(record.store), record.created_ms, batch_id), int),
            Call(None, (), ("ZADD", k.batches(record.owner), record.created_ms, batch_id), int),
        )

    def read(self, batch_id: str) -> Call[BatchRecord | None]:
        """One batch; None when there is none, or no longer."""
        return record_of(self.keys.batch(batch_id), BatchRecord)

    def hold(
        self, batch_id: str, *, token: str, lease_ms: int, is_renewal: bool = False
    ) -> Call[tuple[Verdict, str | None]]:
        """Take the lease of a batch that nobody runs, or extend it.

        OK comes with the time at which it was asked to cancel, ms, if it was; IS with the state in which it ended.
        LOST: another holder has it.
        """
        args = (token, lease_ms, int(is_renewal))
        return Call("hold_batch", (self.keys.batch(batch_id),), args, parse_cancelled)

    def note(
        self,
        batch_id: str,
        *,
        store: str,
        token: str,
        changes: Mapping[str, str | int] | None = None,
        parts: Mapping[str, int] | None = None,
        keep_ms: int | None = None,
    ) -> Call[tuple[Verdict, str | None]]:
        """Write what the holder did: fields of the record and parts of its files. LOST where it holds it no more.

        `keep_ms` says that the batch has ended, and how long its record is kept.
        """
        k, changes = self.keys, changes or {}
        args: list[Arg] = [batch_id, token, "" if keep_ms is None else keep_ms, len(changes)]
        for name, value in (*changes.items(), *(parts or {}).items()):
            args += [name, value]
        keys = (k.batch(batch_id), k.batch_parts(batch_id), k.open_batches(store))
        return Call("note_batch", keys, tuple(args), parse_cancelled)

    def cancel(self, batch_id: str) -> Call[tuple[Verdict, str | None]]:
        """Ask for the end of a batch. IS comes with the state in which it is too late for that."""
        return Call("cancel_batch", (self.keys.batch(batch_id),), (), parse_cancelled)

    def parts(self, batch_id: str) -> Call[dict[str, int]]:
        """Parts of the files of an unfinished batch, with their numbers of lines."""
        key = self.keys.batch_parts(batch_id)

        def parse(reply: Any) -> dict[str, int]:
            pairs = reply.items() if isinstance(reply, Mapping) else zip(reply[::2], reply[1::2], strict=True)
            return {name.decode(): int(value) for name, value in pairs}

        return Call(None, (), ("HGETALL", key), or_else(key, parse, dict))

    def unfinished(self, store: str, *, limit: int, skip: int = 0) -> Call[list[str]]:
        """The oldest unfinished batches whose files lie in this store, behind the first `skip` ones."""
        args = ("ZRANGE", self.keys.open_batches(store), skip, skip + limit - 1)
        return Call(None, (), args, lambda reply: [text(member) for member in reply])

    def num_unfinished(self, store: str) -> Call[int]:
        """How many there are."""
        return Call(None, (), ("ZCARD", self.keys.open_batches(store)), int)

    def forget(self, store: str, batch_id: str) -> Call[int]:
        """Take a batch without a record from the unfinished ones."""
        return self.unlist(self.keys.open_batches(store), batch_id)

    def unlist(self, key: str, batch_id: str) -> Call[int]:
        """Take a batch without a record from a list."""
        return Call(None, (), ("ZREM", key, batch_id), int)
