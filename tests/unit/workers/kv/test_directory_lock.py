"""Who uses a directory of segments: nothing is left by the last one, nor by engines that were killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from workers.kv.directory_lock import enter
from workers.kv.store import SegmentStore, new_ticket

HOLD = (
    "import sys, pathlib, workers.kv.directory_lock as t; "
    "t.enter(pathlib.Path(sys.argv[1])); print(flush=True); input()"
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "kv"


def leave_behind(directory: Path) -> list[str]:
    """A segment, one that is being written, and a mark."""
    store = SegmentStore(directory, limit_bytes=1 << 20)
    store.mark(new_ticket())
    for is_finished in (True, False):
        part = store.create(new_ticket(), 100)
        assert part is not None
        if is_finished:
            store.publish(part)
        else:
            os.close(part.fd)
    return sorted(path.name for path in directory.iterdir())


def test_the_last_to_leave_removes_everything(directory: Path) -> None:
    first, second = enter(directory), enter(directory)
    leave_behind(directory)
    before = sorted(directory.iterdir())
    first.leave()
    first.leave()
    assert sorted(directory.iterdir()) == before
    second.leave()
    assert not directory.exists()


def test_what_a_killed_deployment_left_goes_when_the_next_one_comes(directory: Path) -> None:
    """Its lock ended with it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdin is not None
    with process, process.stdout, process.stdin:
        process.stdout.readline()
        left = leave_behind(directory)
        enter(directory).leave()
        assert sorted(path.name for path in directory.iterdir()) == left  # it is in use
        process.send_signal(signal.SIGKILL)
    tenancy = enter(directory)
    assert {path.suffix for path in directory.iterdir()} == {""}
    tenancy.leave()
    assert not directory.exists()


def test_other_files_are_left_alone(directory: Path) -> None:
    tenancy = enter(directory)
    (directory / "mine.txt").write_text("x")
    tenancy.leave()
    assert [path.name for path in directory.iterdir()] == ["mine.txt"]


def test_who_comes_while_the_last_one_removes_it_has_a_directory_of_its_own(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file was opened before it was removed: its lock would protect nothing."""
    last = enter(directory)
    real_open = os.open

    def open_then_removed(path: str | Path, flags: int, mode: int = 0o777) -> int:
        fd = real_open(path, flags, mode)
        if Path(path).name == "tenants":
            monkeypatch.setattr(os, "open", real_open)
            last.leave()
        return fd

    monkeypatch.setattr(os, "open", open_then_removed)
    newcomer = enter(directory)
    assert (directory / "tenants").exists()
    other = enter(directory)
    other.leave()
    assert directory.exists()
    newcomer.leave()
    assert not directory.exists()
