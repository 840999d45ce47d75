"""The segment directory that the engines of one host share: bounded, self-cleaning, safe against crashes.

`<ticket>.kv` is a finished segment, `<ticket>.part` one that is being written. Its writer holds a lock on it, so a
sweep recognises the part of a dead writer. `<ticket>.cut` marks a request whose KV is to be kept. `<ticket>.need`
says how many bytes the moves of one engine need; that engine holds a lock on it.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from l4queue.errors import ConfigError
from workers.kv.budget import affordable_bytes

__all__ = ("PartFile", "SegmentStore", "default_directory", "is_ticket", "new_ticket")

_TICKET = re.compile(r"[0-9a-f]{24}")
_SHARED_MEMORY = Path("/dev/shm")
_LOCK_WAIT_S = 0.2  # for the lock; a request then moves without its KV
_LOCK_RETRY_S = 0.002  # between two tries
_MARK_TTL_S = 60.0  # of the mark of a cut request; it is used within seconds


def new_ticket() -> str:
    """A ticket that nobody can guess."""
    return secrets.token_hex(12)


def is_ticket(text: str) -> bool:
    """Whether this can be a ticket. What comes from Redis must not name other files."""
    return _TICKET.fullmatch(text) is not None


def default_directory(namespace: str) -> Path:
    """A directory in shared memory where there is any, else with the temporary files, of this user alone."""
    has_memory = _SHARED_MEMORY.is_dir() and os.access(_SHARED_MEMORY, os.W_OK)
    base = _SHARED_MEMORY if has_memory else Path(tempfile.gettempdir())
    return base / f"l4queue-kv-{os.geteuid()}-{namespace}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartFile:
    """A segment being written, of the right size already. Its lock ends with the file descriptor."""

    ticket: str
    fd: int


class SegmentStore:
    """One directory of segments. Any number of processes may use it at once.

    At most `limit_bytes` lie in it: the oldest segments go first. Without that, as many as the engines of the host
    need and its memory affords. Nothing lies longer than `ttl_s`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        limit_bytes: int | None,
        ttl_s: float = 60.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.directory = directory
        self.limit_bytes = limit_bytes
        self._affordable_bytes = 0
        self.ttl_s = ttl_s
        self._clock = clock
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = directory.lstat()
        except OSError as error:
            raise ConfigError(f"KV hand-over: {directory} cannot be used: {error.strerror}") from error
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise ConfigError(f"KV hand-over: {directory} is not a directory of this user alone; remove it")
        if limit_bytes is None:
            self._affordable_bytes = affordable_bytes(directory)

    def declare(self, needed_bytes: int) -> int:
        """Say what the moves of one more engine need; it counts while this file descriptor is open.

        OSError when the file system refuses, or when others hold the directory for too long.
        """
        with self._locked() as has_lock:
            if not has_lock:
                raise OSError("others hold its lock")
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(self.directory / f"{new_ticket()}.need", flags, 0o600)
            _lock(fd, wait_s=_LOCK_WAIT_S)  # somebody may just be looking whether it is abandoned
            os.write(fd, str(needed_bytes).encode())
        return fd

    def budget_bytes(self) -> int:
        """Most bytes of segments. OSError: the file system's."""
        if self.limit_bytes is not None:
            return self.limit_bytes
        needed = sum(map(_declared_bytes, self._needs()))
        return min(needed, self._affordable_bytes) if needed else self._affordable_bytes

    def room_bytes(self) -> int:
        """Room for one more segment beside all segments that wait to be fetched. OSError: the file system's."""
        used = sum(found.st_size for path, found in self._entries() if path.suffix != ".cut")
        return max(0, self.budget_bytes() - used)

    def path(self, ticket: str) -> Path:
        """Where the finished segment of a ticket lies."""
        return self.directory / f"{ticket}.kv"

    def create(self, ticket: str, total_bytes: int) -> PartFile | None:
        """Begin a segment of this size; makes room by dropping the oldest. None where it finds no place.

        OSError when the file system refuses.
        """
        with self._locked() as has_lock:
            if not has_lock or total_bytes > (budget_bytes := self.budget_bytes()):
                return None
            self._sweep()
            self._make_room(total_bytes, budget_bytes=budget_bytes)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(self._part(ticket), flags, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(fd, total_bytes)  # counts from now on; the memory is taken as it is written
            except BaseException:
                os.close(fd)
                raise
            return PartFile(ticket=ticket, fd=fd)

    def publish(self, part: PartFile) -> None:
        """Make a written segment visible, at once and whole. OSError when it was swept away meanwhile."""
        try:
            os.rename(self._part(part.ticket), self.path(part.ticket))
        finally:
            os.close(part.fd)

    def discard(self, part: PartFile) -> None:
        """Give up a segment that was begun."""
        _unlink(self._part(part.ticket))
        os.close(part.fd)

    def remove(self, ticket: str) -> None:
        """Remove a finished segment, used or of no use."""
        _unlink(self.path(ticket))

    def mark(self, ticket: str) -> None:
        """Say that the request of this ticket is being cut. OSError when the file system refuses."""
        os.close(os.open(self._mark(ticket), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))

    def take_mark(self, ticket: str) -> bool:
        """Whether the request was to be cut; True only once."""
        return _unlink(self._mark(ticket))

    def sweep(self) -> None:
        """Remove what is too old and what dead writers have left, unless somebody is at it already."""
        with self._locked(wait_s=0.0) as has_lock:
            if has_lock:
                self._sweep()

    def _part(self, ticket: str) -> Path:
        return self.directory / f"{ticket}.part"

    def _mark(self, ticket: str) -> Path:
        return self.directory / f"{ticket}.cut"

    @contextmanager
    def _locked(self, *, wait_s: float = _LOCK_WAIT_S) -> Iterator[bool]:
        """Hold the directory's lock; False when somebody has it for too long (stopped, perhaps)."""
        fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            yield _lock(fd, wait_s=wait_s)
        finally:
            os.close(fd)

    def _sweep(self) -> None:
        now_s = self._clock()
        for path, found in self._entries():
            age_s = now_s - found.st_mtime
            is_old = age_s > (_MARK_TTL_S if path.suffix == ".cut" else self.ttl_s)
            if is_old or (path.suffix == ".part" and _is_abandoned(path)):
                _unlink(path)
        for path in self._needs():
            if _is_abandoned(path):
                _unlink(path)

    def _needs(self) -> list[Path]:
        with os.scandir(self.directory) as entries:
            found = [Path(entry.path) for entry in entries]
        return [path for path in found if path.suffix == ".need" and is_ticket(path.stem)]

    def _make_room(self, total_bytes: int, *, budget_bytes: int) -> None:
        entries = [(path, found) for path, found in self._entries() if path.suffix != ".cut"]
        used = sum(found.st_size for _, found in entries)
        finished = [(path, found) for path, found in entries if path.suffix == ".kv"]
        for path, found in sorted(finished, key=lambda entry: entry[1].st_mtime_ns):
            if used + total_bytes <= budget_bytes:
                return
            _unlink(path)
            used -= found.st_size
        if used + total_bytes > budget_bytes:
            raise OSError(f"{used} bytes are being written, no room for {total_bytes}")

    def _entries(self) -> Iterator[tuple[Path, os.stat_result]]:
        with os.scandir(self.directory) as entries:
            for entry in entries:
                path = Path(entry.path)
                if path.suffix in (".kv", ".part", ".cut") and is_ticket(path.stem):
                    try:
                        yield path, entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue


def _lock(fd: int, *, wait_s: float) -> bool:
    deadline_s = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(_LOCK_RETRY_S)
        else:
            return True


def _is_abandoned(path: Path) -> bool:
    """Whether nobody writes this any more."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return _lock(fd, wait_s=0.0)
    finally:
        os.close(fd)


def _declared_bytes(path: Path) -> int:
    """What an engine that still runs needs; 0 of one that has ended."""
    if _is_abandoned(path):
        return 0
    try:
        return int(path.read_text("ascii"))
    except (OSError, ValueError):  # just written, or just gone
        return 0


def _unlink(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True
