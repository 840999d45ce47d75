"""The directory of segments: bounded, swept, safe against writers that die."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from l4queue.errors import ConfigError
from workers.kv.segment import Segment
from workers.kv.store import SegmentStore, default_directory, is_ticket, new_ticket

NOW_S = 1_000_000.0


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., SegmentStore]:
    """Stores on one directory."""

    def made(limit_bytes: int = 1000, ttl_s: float = 60.0, now_s: float = NOW_S) -> SegmentStore:
        return SegmentStore(tmp_path / "kv", limit_bytes=limit_bytes, ttl_s=ttl_s, clock=lambda: now_s)

    return made


def put(store: SegmentStore, num_bytes: int, *, age_s: float = 0.0) -> str:
    """A finished file of so many bytes."""
    ticket = new_ticket()
    part = store.create(ticket, num_bytes)
    assert part is not None
    store.publish(part)
    os.utime(store.path(ticket), (NOW_S - age_s, NOW_S - age_s))
    return ticket


def names(store: SegmentStore) -> set[str]:
    """What lies there, but for the lock."""
    return {path.name for path in store.directory.iterdir()} - {"lock"}


def test_the_oldest_make_room(make: Callable[..., SegmentStore]) -> None:
    """Never more than the limit, the youngest stay."""
    store = make(limit_bytes=1000)
    old, middle, young = (put(store, 400, age_s=age) for age in (3, 2, 1))
    assert names(store) == {f"{middle}.kv", f"{young}.kv"}
    assert put(store, 1000)
    assert len(names(store)) == 1
    assert old != middle


def test_what_can_never_fit_is_refused(make: Callable[..., SegmentStore]) -> None:
    """Nothing is dropped for it."""
    store = make(limit_bytes=1000)
    kept = put(store, 900)
    assert store.create(new_ticket(), 1001) is None
    assert names(store) == {f"{kept}.kv"}


def test_segments_being_written_count_and_are_not_dropped(make: Callable[..., SegmentStore]) -> None:
    """A third has to do without."""
    store = make(limit_bytes=1000)
    first, second = store.create(new_ticket(), 400), store.create(new_ticket(), 400)
    assert first is not None
    assert second is not None
    with pytest.raises(OSError, match="no room"):
        store.create(new_ticket(), 400)
    store.discard(first)
    third = store.create(new_ticket(), 400)
    assert third is not None
    for part in (second, third):
        store.publish(part)
    assert names(store) == {f"{second.ticket}.kv", f"{third.ticket}.kv"}


def test_the_old_and_the_abandoned_are_swept(make: Callable[..., SegmentStore]) -> None:
    """Finished segments live on without their writer, unfinished ones do not."""
    store = make(limit_bytes=10_000, ttl_s=60.0)
    young, _old = put(store, 10, age_s=59), put(store, 10, age_s=61)
    alive, dead, stuck = (store.create(new_ticket(), 10) for _ in range(3))
    assert alive is not None
    assert dead is not None
    assert stuck is not None
    for part, age_s in ((alive, 0), (dead, 0), (stuck, 61)):
        os.utime(part.fd, (NOW_S - age_s, NOW_S - age_s))
    os.close(dead.fd)
    store.mark(alive.ticket)
    os.utime(store.directory / f"{alive.ticket}.cut", (NOW_S, NOW_S))
    (store.directory / "README").write_text("not ours")

    store.sweep()

    assert names(store) == {f"{young}.kv", f"{alive.ticket}.part", f"{alive.ticket}.cut", "README"}
    with pytest.raises(FileNotFoundError):
        store.publish(stuck)  # it was stopped for too long: nobody waits for it any more
    store.publish(alive)
    assert Path(store.path(alive.ticket)).exists()


def test_a_lock_that_somebody_keeps_stops_nobody_for_long(make: Callable[..., SegmentStore]) -> None:
    """Its holder may be stopped."""
    store = make()
    fd = os.open(store.directory / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert store.create(new_ticket(), 10) is None
    store.sweep()
    os.close(fd)
    assert put(store, 10)


def test_a_mark_is_taken_once(make: Callable[..., SegmentStore]) -> None:
    """By whoever comes first."""
    store, ticket = make(), new_ticket()
    assert not store.take_mark(ticket)
    store.mark(ticket)
    assert store.take_mark(ticket)
    assert not store.take_mark(ticket)


def test_tickets_name_nothing_but_segments() -> None:
    """They come from Redis."""
    assert is_ticket(new_ticket())
    for text in ("", "../../etc/passwd", "a" * 24 + "\n", "A" * 24, "a" * 23, "emulated-1-1-00000000"):
        assert not is_ticket(text)


def test_a_directory_that_others_may_use_is_refused(tmp_path: Path) -> None:
    """Shared memory is open to everybody."""
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").write_text("")
    for name in ("open", "link", "file"):
        with pytest.raises(ConfigError, match=name):
            SegmentStore(tmp_path / name, limit_bytes=1)
    assert str(os.geteuid()) in default_directory("ns").name


WRITER = """
import sys
from pathlib import Path
import numpy as np
from workers.kv.segment import Layout, SegmentWriter
from workers.kv.store import SegmentStore, new_ticket
store = SegmentStore(Path(sys.argv[1]), limit_bytes=1 << 26)
made = Layout(fingerprint="m", num_layers=4, block_tokens=16, block_bytes=1 << 18, num_tokens=150)
print("ready", flush=True)
while True:
    part = store.create(new_ticket(), made.total_bytes)
    writer = SegmentWriter(part.fd, made, range(150))
    for piece in made.pieces():
        writer.write(piece, np.full((piece.num_blocks, made.block_bytes), 7, dtype=np.uint8))
    writer.seal()
    store.publish(part)
"""


def test_a_writer_killed_at_any_moment_leaves_whole_segments_and_rubbish_that_is_swept(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Six times, at random points of its loop."""
    folder = tmp_path / "kv"
    num_read = 0
    for _ in range(6):
        command = [sys.executable, "-c", WRITER, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            with pytest.raises(subprocess.TimeoutExpired):
                writer.wait(timeout=float(rng.uniform(0.02, 0.2)))
            writer.send_signal(signal.SIGKILL)
        store = SegmentStore(folder, limit_bytes=1 << 26)
        store.sweep()
        assert all(name.endswith(".kv") for name in names(store))
        for path in folder.glob("*.kv"):
            with Segment(path) as segment:
                scratch = np.empty((segment.layout.blocks_per_piece, 1 << 18), dtype=np.uint8)
                for piece in segment.layout.pieces():
                    assert (segment.read(piece, scratch) == 7).all()
                    num_read += 1
    assert num_read
