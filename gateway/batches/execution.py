"""Execution of one batch under its lease: validate, run its lines, make its files. Goes on wherever it was left.

Blocks, in a thread of its own. The next gateway does again what is not noted in Redis, with the same result: files
have ids made of the batch's, and requests are found in the queue by theirs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

from gateway.batches.owner_limits import OwnerLimits
from gateway.batches.parts import ERRORS, OUTPUT, BatchLease, PartedAnswers, RecordedIdentity
from gateway.batches.store import FileStore, batch_folder, file_name
from gateway.batches.validation import InputError, validate
from gateway.keys import ApiKeys
from l4queue.client.batch import BatchProgress
from l4queue.client.batch.files import InputFile
from l4queue.client.batch.halves import Halves
from l4queue.client.batch.options import LineOptions
from l4queue.client.batch.places import BatchEnding, BatchPlaces
from l4queue.client.batch.run import run_lines
from l4queue.config import Settings
from l4queue.protocol.batch_records import BatchCalls, BatchRecord, BatchState
from l4queue.protocol.executor import Executor
from l4queue.protocol.file_records import FileCalls, FileRecord
from l4queue.protocol.keys import Keys
from l4queue.protocol.reads import Reads

__all__ = ("BatchControl", "BatchExecution")

log = logging.getLogger("l4queue.gateway.batches")
_CANCELLED = BatchEnding(
    code="batch_cancelled", message="the batch was cancelled before this request was computed"
)
_EXPIRED = BatchEnding(
    code="batch_expired", message="the completion window ended before this request was computed"
)
_COMMIT_EVERY_S, _COMMIT_SHARE = 2.0, 0.01  # s, and of the age: a day's batch makes some hundred parts, not 40,000


@dataclass(slots=True, kw_only=True)
class BatchControl:
    """What the runner and the execution of one batch tell each other. Each field has one writer.

    The runner sets `stop` (leave it to another gateway) and `is_cancelling`; the execution tells its progress.
    """

    token: str
    stop: threading.Event = field(default_factory=threading.Event)
    is_cancelling: bool = False
    progress: BatchProgress | None = None
    ended_by: BatchEnding | None = None


class BatchExecution:
    """One batch in the hands of one gateway. LeaseLost when it is no longer."""

    def __init__(
        self,
        settings: Settings,
        store: FileStore,
        executor: Executor,
        record: BatchRecord,
        control: BatchControl,
        *,
        halves: Halves | None,
        api_keys: ApiKeys,
    ) -> None:
        self._settings, self._store, self._executor, self._halves = settings, store, executor, halves
        self._record, self._control = record, control
        keys = Keys(settings.namespace)
        self._batches, self._files, self._reads = BatchCalls(keys), FileCalls(keys), Reads(keys)
        self._limits = OwnerLimits(record.owner, keys=api_keys, names=keys, executor=executor)
        self._lease = BatchLease(record=record, token=control.token, executor=executor, calls=self._batches)
        now_ms = executor.run(self._reads.server_time_ms())
        self._ends_s = time.monotonic() + (record.expires_ms - now_ms) / 1000

    def run(self) -> BatchState | None:
        """The state in which it ended; None when it was told to stop."""
        record = self._record
        if record.state is BatchState.VALIDATING and self._control.is_cancelling:
            return self._end(BatchState.CANCELLED)
        with ExitStack() as stack:
            try:
                path = stack.enter_context(self._store.as_path(file_name(record.input_file_id)))
            except FileNotFoundError:
                told = InputError(code="file_not_found", message="the input file is no longer there")
                return self._fail((told,))
            lines = stack.enter_context(closing(InputFile(path)))
            if record.state is BatchState.VALIDATING:
                errors = self._validate(lines)
                if errors:
                    return self._fail(errors)
            return self._run_lines(lines)

    def _validate(self, lines: InputFile) -> tuple[InputError, ...]:
        found = validate(lines, endpoint=self._record.endpoint)
        if not found.errors:
            now_ms = self._executor.run(self._reads.server_time_ms())
            state = BatchState.IN_PROGRESS.value
            self._lease.note({"state": state, "in_progress_ms": now_ms, "num_lines": found.num_lines})
        return found.errors

    def _run_lines(self, lines: InputFile) -> BatchState | None:
        out, errors = self._answers()
        places = BatchPlaces(
            lines=lines,
            out=out,
            errors=errors,
            identity=RecordedIdentity(self._record.batch_id),
            name_out=OUTPUT,
            name_errors=ERRORS,
            commit_every_s=lambda age_s: max(_COMMIT_EVERY_S, _COMMIT_SHARE * age_s),
            ending=self._ending,
        )
        summary = run_lines(
            self._settings,
            LineOptions(),
            places,
            url=self._settings.redis_url,
            halves=self._halves,
            limits=self._limits,
            progress=self._progressed,
            stop=self._control.stop,
        )
        if not summary.is_complete:
            return None
        outcome = self._record.outcome or self._outcome()
        changes: dict[str, Any] = {
            "num_lines": summary.num_lines,
            "num_succeeded": summary.num_succeeded,
            "num_failed": summary.num_failed,
        }
        if outcome is not BatchState.CANCELLED:  # that is cancelling until its end
            now_ms = self._executor.run(self._reads.server_time_ms())
            state = BatchState.FINALIZING.value
            self._lease.note({"state": state, "outcome": outcome.value, "finalizing_ms": now_ms, **changes})
        for name, answers in (("output_file_id", out), ("error_file_id", errors)):
            if not answers.is_empty:
                changes[name] = self._make_file(answers, name.partition("_")[0])
        return self._end(outcome, **changes)

    def _answers(self) -> tuple[PartedAnswers, PartedAnswers]:
        parts = self._executor.run(self._batches.parts(self._record.batch_id))
        out, errors = (
            PartedAnswers(kind, parts, lease=self._lease, store=self._store) for kind in (OUTPUT, ERRORS)
        )
        return out, errors

    def _ending(self) -> BatchEnding | None:
        """Asked while lines are open."""
        if self._control.is_cancelling:
            self._control.ended_by = _CANCELLED
        elif time.monotonic() >= self._ends_s:
            self._control.ended_by = _EXPIRED
        return self._control.ended_by

    def _outcome(self) -> BatchState:
        outcomes = {_CANCELLED: BatchState.CANCELLED, _EXPIRED: BatchState.EXPIRED}
        ended_by = self._control.ended_by
        return BatchState.COMPLETED if ended_by is None else outcomes[ended_by]

    def _progressed(self, progress: BatchProgress) -> None:
        if progress.phase == "running":
            self._control.progress = progress

    def _make_file(self, answers: PartedAnswers, what: str) -> str:
        """One file of all parts. Its id is the batch's, so that making it again replaces it by the same."""
        record = self._record
        file_id = "file-" + hashlib.sha256(f"{record.batch_id}:{what}".encode()).hexdigest()[:32]
        num_bytes = self._store.put(file_name(file_id), answers.chunks())
        now_ms = self._executor.run(self._reads.server_time_ms())
        file = FileRecord(
            file_id=file_id,
            owner=record.owner,
            store=record.store,
            name=f"{record.batch_id}_{what}.jsonl",
            purpose="batch_output",
            num_bytes=num_bytes,
            created_ms=now_ms,
            expires_ms=now_ms + record.output_ttl_s * 1000,
        )
        self._executor.run_many(self._files.keep(file))
        return file_id

    def _fail(self, errors: tuple[InputError, ...]) -> BatchState:
        told = json.dumps([error.fields for error in errors])
        return self._end(BatchState.FAILED, errors=told)

    def _end(self, state: BatchState, **changes: str | int) -> BatchState:
        keep_ms = int(self._settings.http_files_ttl_s * 1000)
        self._lease.note({"state": state.value, **changes}, keep_ms=keep_ms)
        self._store.delete(batch_folder(self._record.batch_id))
        return state
