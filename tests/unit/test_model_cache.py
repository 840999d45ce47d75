"""The cache of models: built once, whole or absent, also where a builder dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from l4queue.model_cache import build_in_place

BUILDERS = 4
fork = multiprocessing.get_context("fork")


def build(target: Path, builds: Path, start: Barrier) -> None:
    """Build a model of one file, and note that it was built."""

    def fill(aside: Path) -> None:
        with builds.open("a") as file:
            file.write(f"{os.getpid()}\n")
        (aside / "weights").write_bytes(b"x" * 1_000_000)
        (aside / "weights").chmod(0o600)

    start.wait()
    build_in_place(target, marker="weights", build=fill)
    assert (target / "weights").stat().st_size == 1_000_000


def die_half_way(target: Path) -> None:
    def fill(aside: Path) -> None:
        (aside / "weights").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    build_in_place(target, marker="weights", build=fill)


def test_processes_that_start_at_once_build_once(tmp_path: Path) -> None:
    """All find the whole model, which all may read; nothing else is left."""
    target, builds = tmp_path / "cache" / "model", tmp_path / "builds"
    start = fork.Barrier(BUILDERS)
    processes = [fork.Process(target=build, args=(target, builds, start)) for _ in range(BUILDERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    assert [process.exitcode for process in processes] == [0] * BUILDERS
    assert len(builds.read_text().split()) == 1
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == 0o755
    assert (target / "weights").stat().st_mode & 0o777 == 0o644


def test_a_killed_builder_leaves_no_model_and_the_next_one_clears_up(tmp_path: Path) -> None:
    target = tmp_path / "model"
    process = fork.Process(target=die_half_way, args=(target,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not target.exists()
    assert len(list(tmp_path.iterdir())) == 1  # what it had begun

    build_in_place(target, marker="weights", build=lambda aside: (aside / "weights").write_bytes(b"whole"))
    assert list(tmp_path.iterdir()) == [target]
    assert (target / "weights").read_bytes() == b"whole"


def test_a_builder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(aside: Path) -> None:
        (aside / "weights").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build_in_place(tmp_path / "model", marker="weights", build=fail)
    assert list(tmp_path.iterdir()) == []
