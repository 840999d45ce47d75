"""Lock of an answer file, so that one process writes it: `flock` on POSIX, a byte range on Windows."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any, BinaryIO

__all__ = ("lock",)

_LOCKED_BYTE = 2**31 - 2
"""A byte that no file of answers reaches soon: Windows keeps other processes from reading what is locked."""


def lock(file: BinaryIO) -> None:
    """Take the lock until the file is closed; OSError where another process has it."""
    try:
        import fcntl
    except ModuleNotFoundError:
        _lock_windows(file)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lock_windows(file: BinaryIO) -> None:
    try:
        msvcrt: Any = import_module("msvcrt")
    except ModuleNotFoundError:  # neither: a platform without locks
        return
    number = file.fileno()
    os.lseek(number, _LOCKED_BYTE, os.SEEK_SET)
    try:
        msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
    finally:
        os.lseek(number, 0, os.SEEK_END)
