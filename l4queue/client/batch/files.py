"""The files of a batch: input read twice, answers appended durably, the identity kept beside them."""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from l4queue.errors import InvalidRequest

__all__ = ("AnswerFile", "BatchIdentity", "IdentityFile", "InputFile", "RawLine")

_READ_BYTES = 2**20


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
            self._file: BinaryIO = path.open("rb", buffering=_READ_BYTES)
        except OSError as error:
            raise InvalidRequest(f"cannot read {path}: {error.strerror}", field="jsonl") from None
        if not self._file.seekable():
            self._file.close()
            raise InvalidRequest(f"{path} is read twice and cannot be a pipe", field="jsonl")

    def version(self) -> tuple[int, int]:
        """Changes when the file is changed: size in bytes, time of the last change in ns."""
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def lines(self) -> Iterator[RawLine]:
        """All lines from the start, with their ends."""
        offset = 0
        self._file.seek(0)
        for number, data in enumerate(self._file, 1):
            yield RawLine(number=number, offset=offset, data=data)
            offset += len(data)

    def again(self, number: int, offset: int, size: int) -> RawLine:
        """One line of `size` bytes again; does not disturb `lines`."""
        return RawLine(number=number, offset=offset, data=os.pread(self._file.fileno(), size, offset))

    def close(self) -> None:
        """Close it."""
        self._file.close()


class AnswerFile:
    """A file of JSON lines that is only appended to, by one process at a time.

    Opening takes the lock (InvalidRequest when another process has it) and repairs a line torn by a crash: one
    that is complete but for its end gets its end, half a line is cut off.
    """

    def __init__(self, path: Path, *, field: str) -> None:
        self.path = path
        self._field = field
        try:
            self._file: BinaryIO = path.open("a+b", buffering=_READ_BYTES)
        except OSError as error:
            raise InvalidRequest(f"cannot write {path}: {error.strerror}", field=field) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise InvalidRequest(f"another process is writing {path}", field=field) from None
        self.num_repaired_bytes = self._repair()

    def answers(self) -> Iterator[dict[str, Any]]:
        """What the file has. InvalidRequest names a line that is not one of a batch."""
        self._file.seek(0)
        for number, data in enumerate(self._file, 1):
            if not data.strip():
                continue
            answer = _answer(data)
            if answer is None:
                message = f"line {number} of {self.path} is not from a batch; move the file away or choose another"
                raise InvalidRequest(message, field=self._field)
            yield answer

    def append(self, line: bytes) -> None:
        """Add one line, its end included."""
        self._file.write(line)

    def flush(self) -> None:
        """Let others read what was appended."""
        self._file.flush()

    def sync(self) -> None:
        """Return once all that was appended is on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write, unlock and close; safe to call twice."""
        self._file.close()

    def _repair(self) -> int:
        """Bytes cut off the end (positive), or -1 for an end of line that was added."""
        size = self._file.seek(0, os.SEEK_END)
        end = _end_of_last_line(self._file, size)
        if end == size:
            return 0
        self._file.seek(end)
        if _answer(self._file.read()) is not None:
            self._file.write(b"\n")
            self._file.flush()
            return -1
        self._file.truncate(end)
        self._file.seek(0, os.SEEK_END)
        return size - end


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchIdentity:
    """What an unfinished batch is: its name in idempotency keys, and up to which line it was enqueued."""

    batch_id: str
    num_submitted: int = 0


class IdentityFile:
    """Keeps the identity of a batch from its first request to its last answer."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> BatchIdentity:
        """The identity of the batch that goes on, or a new one. InvalidRequest for a broken file."""
        try:
            return BatchIdentity(**json.loads(self.path.read_bytes()))
        except FileNotFoundError:
            return BatchIdentity(batch_id=uuid.uuid4().hex)
        except (OSError, ValueError, TypeError):
            message = (
                f"{self.path} is broken; without it, requests in flight are computed again: delete it for that"
            )
            raise InvalidRequest(message, field="out") from None

    def write(self, identity: BatchIdentity) -> None:
        """Replace it durably."""
        beside = self.path.with_name(self.path.name + ".new")
        with beside.open("wb") as file:
            file.write(json.dumps(asdict(identity)).encode())
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)

    def remove(self) -> None:
        """The batch is finished."""
        self.path.unlink(missing_ok=True)


def _answer(data: bytes) -> dict[str, Any] | None:
    """A line of a batch's output, or None when it is something else."""
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(answer, dict) or not isinstance(answer.get("custom_id"), str | None):
        return None
    return answer if "custom_id" in answer else None


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
