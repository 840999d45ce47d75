"""Files of a batch: input read twice, answers appended durably, the batch's identity kept beside them."""

from __future__ import annotations

import json
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from l4queue.client.batch.lines import MAX_LINE_BYTES
from l4queue.client.batch.locks import lock
from l4queue.errors import InvalidRequest
from l4queue.strict_json import JsonError, parse_json, read_json

__all__ = (
    "AnswerFile",
    "BatchIdentity",
    "IdentityFile",
    "InputFile",
    "RawLine",
    "answer_object",
    "new_beside",
)

_READ_BYTES = 2**20  # of one read or write
_MAX_ANSWER_BYTES = 2**30  # of a line that is parsed; far beyond any answer


@dataclass(frozen=True, slots=True, kw_only=True)
class RawLine:
    """One line as it stands in the file; `number` counts from 1, `offset` is in bytes."""

    number: int
    offset: int
    data: bytes


class InputFile:
    """A batch file that is read several times; it must not change while the batch runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():  # to open a pipe may wait for ever
                raise InvalidRequest(f"{path} is read twice and cannot be a pipe or a device", field="jsonl")
            self._file: BinaryIO = path.open("rb", buffering=_READ_BYTES)
        except OSError as error:
            raise InvalidRequest(f"cannot read {path}: {error.strerror}", field="jsonl") from None
        self.opened_version = self.version()

    def version(self) -> tuple[int, int]:
        """Changes when the file is changed: size in bytes, time of the last change in ns."""
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def lines(self) -> Iterator[RawLine]:
        """All lines from the start, with their ends; of one that is longer than any request its beginning."""
        offset = 0
        self._file.seek(0)
        for number in count(1):
            data = self._file.readline(MAX_LINE_BYTES + 1)
            if not data:
                return
            size, rest = len(data), data
            while size > MAX_LINE_BYTES and not rest.endswith(b"\n") and rest:
                rest = self._file.readline(_READ_BYTES)
                size += len(rest)
            yield RawLine(number=number, offset=offset, data=data)
            offset += size

    def again(self, number: int, offset: int, size: int) -> RawLine:
        """One line of `size` bytes again; does not disturb `lines`."""
        place = self._file.tell()
        self._file.seek(offset)
        data = self._file.read(size)
        self._file.seek(place)
        return RawLine(number=number, offset=offset, data=data)

    def close(self) -> None:
        """Close it."""
        self._file.close()


class AnswerFile:
    """A file of JSON lines that is only appended to, by one process at a time.

    Opening takes the lock (InvalidRequest when another process has it) and repairs a line torn by a crash: one
    that is complete but for its end gets its end, half a line is cut off. InvalidRequest, and nothing is cut, for
    the end of a file that is not from a batch.
    """

    def __init__(self, path: Path, *, field: str) -> None:
        self.path = path
        self._field = field
        try:
            self._file: BinaryIO = path.open("a+b", buffering=_READ_BYTES)
        except OSError as error:
            raise _cannot_write(path, error, field=field) from None
        if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            self._file.close()
            raise InvalidRequest(f"{path} is not a file", field=field)
        try:
            lock(self._file)
        except OSError:
            self._file.close()
            raise InvalidRequest(f"another process is writing {path}", field=field) from None
        try:
            self._repair()
        except InvalidRequest:
            self._file.close()
            raise

    @property
    def is_empty(self) -> bool:
        """Whether it has no answer yet."""
        return os.fstat(self._file.fileno()).st_size == 0

    def numbered(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Answers with their line numbers, from 1. InvalidRequest names a line that is not from a batch."""
        self._file.seek(0)
        for number, data in enumerate(self._file, 1):
            if not data.strip():
                continue
            answer = answer_object(data)
            if answer is None:
                raise self.unusable(number, "is not from a batch")
            yield number, answer

    def unusable(self, number: int, why: str) -> InvalidRequest:
        """The error that a line of this file cannot stand there, and what to do."""
        advice = "choose another file, or move this one away to have its lines computed again"
        return InvalidRequest(f"line {number} of {self.path} {why}; {advice}", field=self._field)

    def append(self, line: bytes) -> None:
        """Add one line, its end included. InvalidRequest where the disk is full, as in `flush` and `close`."""
        with self._writing():
            self._file.write(line)

    def flush(self) -> None:
        """Let others read what was appended."""
        with self._writing():
            self._file.flush()

    def sync(self) -> None:
        """Return once all that was appended is on disk. InvalidRequest when the file is no longer at its place."""
        with self._writing():
            self._file.flush()
            os.fsync(self._file.fileno())
        if not self._is_at_its_place():
            told = f"{self.path} was removed or replaced while the batch ran"
            raise InvalidRequest(f"{told}; run the command again", field=self._field)

    def close(self) -> None:
        """Write, unlock and close; safe to call twice."""
        with self._writing():
            self._file.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            told = f"cannot write {self.path}: {error.strerror or error}"
            raise InvalidRequest(f"{told}; make room and run the command again", field=self._field) from None

    def _is_at_its_place(self) -> bool:
        if os.name == "nt":  # an open file can neither be removed nor replaced there
            return True
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self._file.fileno()))
        except OSError:
            return False

    def _repair(self) -> None:
        """Add the end of line that a complete last line lacks, or cut off half a line."""
        size = self._file.seek(0, os.SEEK_END)
        end = _end_of_last_line(self._file, size)
        if end == size:
            return
        self._file.seek(end)
        torn = self._file.read()
        if answer_object(torn) is not None:
            self._file.write(b"\n")
            self._file.flush()
            return
        self._file.seek(0)
        is_ours = end == 0 or answer_object(self._file.readline()) is not None
        if not is_ours or not _may_be_torn(torn):
            raise self.unusable(self._num_lines(), "is not from a batch")
        self._file.truncate(end)
        self._file.seek(0, os.SEEK_END)

    def _num_lines(self) -> int:
        self._file.seek(0)
        return sum(1 for _ in self._file)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchIdentity:
    """Identity of an unfinished batch: its name in idempotency keys, and the last line that was enqueued."""

    batch_id: str
    num_submitted: int = 0


def new_beside(path: Path) -> Path:
    """Where the new contents of a file are written before they replace it."""
    return path.with_name(path.name + ".new")


class IdentityFile:
    """Keeps the identity of a batch from its first request to its last answer."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def goes_on(self) -> bool:
        """Whether there is an unfinished batch."""
        return self.path.exists()

    def read(self) -> BatchIdentity:
        """The identity of the batch that goes on, or a new one. InvalidRequest for a broken file."""
        try:
            if self.path.exists() and not self.path.is_file():  # a pipe without a writer would be waited for
                raise JsonError("no file")
            found = BatchIdentity(**read_json(self.path.read_bytes()))
            if not isinstance(found.batch_id, str) or not found.batch_id or type(found.num_submitted) is not int:
                raise JsonError("no identity")
            return found
        except FileNotFoundError:
            return BatchIdentity(batch_id=uuid.uuid4().hex)
        except (OSError, JsonError, TypeError):
            message = (
                f"{self.path} is broken; without it, requests in flight are computed again: delete it for that"
            )
            raise InvalidRequest(message, field="out") from None

    def write(self, identity: BatchIdentity) -> None:
        """Replace it durably. InvalidRequest where it cannot be written."""
        beside = new_beside(self.path)
        try:
            beside.unlink(missing_ok=True)  # of a run that crashed, or no file at all
            with beside.open("xb") as file:
                file.write(json.dumps(asdict(identity)).encode())
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
        except OSError as error:
            raise _cannot_write(beside, error, field="out") from None

    def remove(self) -> None:
        """The batch is finished."""
        self.path.unlink(missing_ok=True)


def _cannot_write(path: Path, error: OSError, *, field: str) -> InvalidRequest:
    return InvalidRequest(f"cannot write {path}: {error.strerror or error}", field=field)


def answer_object(data: bytes) -> dict[str, Any] | None:
    """A line of a batch's output, or None when it is something else, such as a request."""
    try:
        answer = parse_json(data, max_bytes=_MAX_ANSWER_BYTES)
    except JsonError:
        return None
    if not isinstance(answer, dict) or not isinstance(answer.get("custom_id"), str | None):
        return None
    is_answer = answer.get("response") is not None or answer.get("error") is not None
    return answer if "custom_id" in answer and is_answer else None


def _may_be_torn(data: bytes) -> bool:
    """Whether this may be the beginning of an answer, or what a crash leaves of one: not a document of its own."""
    try:
        parse_json(data, max_bytes=_MAX_ANSWER_BYTES)
    except JsonError:
        return data.startswith((b"{", b"\0"))
    return False


def _end_of_last_line(file: BinaryIO, size: int) -> int:
    """Offset after the last end of line; 0 when there is none."""
    end = size
    while end > 0:
        start = max(0, end - _READ_BYTES)
        file.seek(start)
        place = file.read(end - start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        end = start
    return 0
