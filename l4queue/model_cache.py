"""The user's folder of models made on this machine: each is built once, by one process, and appears whole."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ("build_in_place", "cache_directory")


def cache_directory() -> Path:
    """Where models that were made here are kept for this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "l4queue"


def build_in_place(target: Path, *, marker: str, build: Callable[[Path], object]) -> Path:
    """Have `build` fill a directory that becomes `target`, unless that has its `marker` file already.

    A second builder waits for the first and takes over its result. A builder that dies leaves no `target`; the
    next one removes its remains. On a file system without locks both build, and the first one to finish wins.
    """
    if (target / marker).exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent) as is_alone:
        if (target / marker).exists():
            return target
        if is_alone:
            for remains in target.parent.glob(f"{target.name}-*.part"):
                shutil.rmtree(remains, ignore_errors=True)
        _build_aside(target, marker=marker, build=build)
    return target


def _build_aside(target: Path, *, marker: str, build: Callable[[Path], object]) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f"{target.name}-", suffix=".part", dir=target.parent))
    try:
        build(aside)
        for file in aside.iterdir():
            file.chmod(0o644)  # made for their owner alone, used by every process of the machine
        aside.chmod(0o755)
        try:
            aside.rename(target)
        except OSError:  # another builder was first
            if not (target / marker).exists():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Holds the lock of a directory, which ends with the process; False where its file system has none."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)
