"""Budget of a host: what its engines need, within what it has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from l4queue.hardware import memory_limit_bytes
from workers.kv import budget
from workers.kv.budget import affordable_bytes, needed_bytes
from workers.kv.store import SegmentStore, new_ticket

MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SegmentStore:
    """On a host whose memory affords 100 MiB."""
    monkeypatch.setattr(budget, "memory_limit_bytes", lambda: 400 * MIB)
    return SegmentStore(tmp_path / "kv", limit_bytes=None)


def test_an_engine_needs_three_moves_of_its_longest_request() -> None:
    """Llama-3.1-8B with 131,072 tokens."""
    assert needed_bytes(longest_tokens=131_072, kv_bytes_per_token=131_072) == 3 * 16 * 2**30


def test_each_engine_that_runs_counts_up_to_what_memory_affords(store: SegmentStore) -> None:
    """40 MiB each: 40, 80, 100 MiB; what has ended no longer counts, and its file goes."""
    assert store.budget_bytes() == 100 * MIB
    engines = []
    for expected in (40, 80, 100):
        engines.append(store.declare(40 * MIB))
        assert store.budget_bytes() == expected * MIB
    for engine in engines[1:]:
        os.close(engine)
    assert store.budget_bytes() == 40 * MIB
    store.sweep()
    assert len(list(store.directory.glob("*.need"))) == 1
    os.close(engines[0])


def test_all_stores_of_a_directory_have_one_budget(store: SegmentStore) -> None:
    """Engines that began earlier, too; one that is set stays."""
    other, fixed = (SegmentStore(store.directory, limit_bytes=limit) for limit in (None, 7 * MIB))
    engine = store.declare(30 * MIB)

    assert store.budget_bytes() == other.budget_bytes() == 30 * MIB
    assert fixed.budget_bytes() == 7 * MIB
    os.close(engine)


def test_room_is_what_segments_leave(store: SegmentStore) -> None:
    """Those that are being written count whole."""
    engine = store.declare(10 * MIB)
    part = store.create(new_ticket(), 4 * MIB)
    assert part is not None

    assert store.room_bytes() == 6 * MIB
    assert store.create(new_ticket(), 11 * MIB) is None
    store.publish(part)
    assert store.room_bytes() == 6 * MIB
    store.remove(part.ticket)
    assert store.room_bytes() == 10 * MIB
    os.close(engine)


def test_a_host_affords_a_quarter_of_its_memory_and_half_of_its_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lesser of the two."""
    found = os.statvfs(tmp_path)
    half = found.f_blocks * found.f_frsize // 2
    for memory_bytes in (400 * MIB, 400 * half):
        monkeypatch.setattr(budget, "memory_limit_bytes", lambda known=memory_bytes: known)
        assert affordable_bytes(tmp_path) == min(memory_bytes // 4, half)


@pytest.mark.parametrize(("text", "is_less"), [("1048576\n", True), ("max\n", False), (f"{2**60}\n", False)])
def test_a_container_may_be_held_to_less_memory(tmp_path: Path, text: str, is_less: bool) -> None:
    """By the kernel's file; without one the machine's memory counts."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (tmp_path / "memory.max").write_text(text)

    assert memory_limit_bytes(tmp_path / "memory.max") == (MIB if is_less else total)
    assert memory_limit_bytes(tmp_path / "none") == total
