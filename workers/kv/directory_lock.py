"""The lock of a segment directory: its first and last users clear away abandoned segments."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

__all__ = ("DirectoryLock", "enter")

_FILE = "tenants"
_LEFT_OVER = (".kv", ".part", ".cut", ".need")
_WAIT_S = 2.0  # while another process clears the directory
_RETRY_S = 0.01  # between two tries


class DirectoryLock:
    """A shared lock on a file of the directory, held while an engine runs; it ends with the process."""

    def __init__(self, directory: Path, fd: int) -> None:
        self._directory = directory
        self._fd = fd

    def leave(self) -> None:
        """Give the directory up; the last one removes it with all that lies in it. Safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        try:
            if _try_lock(fd, fcntl.LOCK_EX):
                _clear(self._directory)
                for name in ("lock", _FILE):
                    (self._directory / name).unlink(missing_ok=True)
                with suppress(OSError):  # somebody else's file lies there
                    self._directory.rmdir()
        finally:
            os.close(fd)


def enter(directory: Path) -> DirectoryLock:
    """Use a directory, which is made if need be. What lies there and is nobody's is removed.

    OSError when the directory cannot be used.
    """
    while True:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(directory / _FILE, flags, 0o600)
        except FileNotFoundError:  # its last user has just removed it
            continue
        try:
            if _try_lock(fd, fcntl.LOCK_EX) and os.fstat(fd).st_nlink:
                _clear(directory)  # of engines that were killed
            _lock_shared(fd)
            if os.fstat(fd).st_nlink:
                return DirectoryLock(directory, fd)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # removed between opening and locking


def _lock_shared(fd: int) -> None:
    deadline_s = time.monotonic() + _WAIT_S
    while not _try_lock(fd, fcntl.LOCK_SH):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"another process has been clearing it for {_WAIT_S:g} s")
        time.sleep(_RETRY_S)


def _try_lock(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _clear(directory: Path) -> None:
    for path in directory.iterdir():
        if path.suffix in _LEFT_OVER:
            path.unlink(missing_ok=True)
