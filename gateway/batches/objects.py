"""Records as the objects of OpenAI's API, by the types of the `openai` package."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from openai.types import Batch, BatchError, BatchRequestCounts, FileDeleted, FileObject
from openai.types.batch import Errors
from pydantic import BaseModel

from l4queue.protocol.batch_records import ENDED, BatchRecord, BatchState
from l4queue.protocol.file_records import FileRecord

__all__ = ("batch_object", "deleted_object", "file_object", "list_object")

_TIME_OF_END: Mapping[BatchState, str] = {
    BatchState.FAILED: "failed_at",
    BatchState.COMPLETED: "completed_at",
    BatchState.EXPIRED: "expired_at",
    BatchState.CANCELLED: "cancelled_at",
}


def file_object(record: FileRecord) -> dict[str, Any]:
    """A file."""
    found = FileObject(
        id=record.file_id,
        object="file",
        bytes=record.num_bytes,
        created_at=record.created_ms // 1000,
        expires_at=record.expires_ms // 1000,
        filename=record.name,
        purpose=record.purpose,
        status="processed",
    )
    return _dumped(found)


def deleted_object(file_id: str) -> dict[str, Any]:
    """The answer to a deletion."""
    return _dumped(FileDeleted(id=file_id, object="file", deleted=True))


def batch_object(record: BatchRecord) -> dict[str, Any]:
    """A batch."""
    times = {_TIME_OF_END[record.state]: _s(record.ended_ms)} if record.state in ENDED else {}
    found = Batch(
        id=record.batch_id,
        object="batch",
        endpoint=record.endpoint,
        input_file_id=record.input_file_id,
        completion_window=record.completion_window,
        status=record.shown_state.value,
        created_at=record.created_ms // 1000,
        expires_at=record.expires_ms // 1000,
        in_progress_at=_s(record.in_progress_ms),
        finalizing_at=_s(record.finalizing_ms),
        cancelling_at=_s(record.cancelling_ms),
        output_file_id=record.output_file_id,
        error_file_id=record.error_file_id,
        errors=_errors(record),
        metadata=None if record.metadata is None else json.loads(record.metadata),
        request_counts=BatchRequestCounts(
            total=record.num_lines, completed=record.num_succeeded, failed=record.num_failed
        ),
        **times,
    )
    return _dumped(found)


def list_object(items: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """A page of a list."""
    return {
        "object": "list",
        "data": list(items),
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": has_more,
    }


def _errors(record: BatchRecord) -> Errors | None:
    if record.errors is None:
        return None
    return Errors(object="list", data=[BatchError(**error) for error in json.loads(record.errors)])


def _s(time_ms: int | None) -> int | None:
    return None if time_ms is None else time_ms // 1000


def _dumped(found: BaseModel) -> dict[str, Any]:
    return found.model_dump(mode="json")
