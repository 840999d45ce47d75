"""The front end: waiting for copies, counters, what tells models apart."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from workers.kv.frontend import KVFrontend, model_fingerprint
from workers.kv.scheduler import TransferLog
from workers.kv.store import SegmentStore


@pytest.fixture
def store(tmp_path: Path) -> SegmentStore:
    """An empty directory."""
    return SegmentStore(tmp_path / "kv", limit_bytes=1000)


@pytest.fixture
def desk(store: SegmentStore) -> KVFrontend:
    """Of an engine."""
    return KVFrontend(store)


@pytest.mark.parametrize("is_kept", [True, False])
async def test_a_cut_waits_for_the_connector(desk: KVFrontend, store: SegmentStore, is_kept: bool) -> None:
    """And says whether there is KV."""
    params = desk.admit("a", "from")
    assert params["l4_from"] == "from"
    desk.started("a")
    ticket = desk.begin_cut("a")
    assert ticket == params["l4_own"]
    desk.left("a")
    waiting = asyncio.create_task(desk.finish_cut(ticket))
    await asyncio.sleep(0)
    assert not waiting.done()
    assert store.take_mark(ticket)
    desk.take(asdict(TransferLog(kept=[ticket] if is_kept else [], dropped=[] if is_kept else [ticket])))
    assert await waiting == (ticket if is_kept else "")


async def test_a_copy_that_is_there_is_not_waited_for(desk: KVFrontend, store: SegmentStore) -> None:
    """Though the engine, busy with a long prompt, has told nothing yet."""
    desk.admit("a", "")
    desk.started("a")
    waiting = asyncio.create_task(desk.finish_cut(ticket := desk.begin_cut("a")))
    await asyncio.sleep(0)
    store.path(ticket).touch()
    assert await waiting == ticket


async def test_a_request_without_a_token_or_unknown_is_not_waited_for(
    desk: KVFrontend, store: SegmentStore
) -> None:
    """The connector might never hear of it."""
    assert "l4_from" not in desk.admit("a", "")
    assert desk.begin_cut("a") == ""
    assert desk.begin_cut("b") == ""
    desk.started("a")
    desk.left("a")
    assert desk.begin_cut("a") == ""
    assert list(store.directory.iterdir()) == []


async def test_a_dead_engine_copies_nothing(desk: KVFrontend, store: SegmentStore) -> None:
    """Whoever waits goes on without; the mark is gone."""
    desk.admit("a", "")
    desk.started("a")
    waiting = asyncio.create_task(desk.finish_cut(desk.begin_cut("a")))
    await asyncio.sleep(0)
    desk.engine_died()
    assert await waiting == ""
    assert list(store.directory.iterdir()) == []


async def test_an_engine_that_says_nothing_is_waited_for_in_vain(
    desk: KVFrontend, store: SegmentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A late copy finds no mark and is not made."""
    monkeypatch.setattr("workers.kv.frontend._CUT_TIMEOUT_S", 0.01)
    desk.admit("a", "")
    desk.started("a")
    ticket = desk.begin_cut("a")
    assert await desk.finish_cut(ticket) == ""
    assert not store.take_mark(ticket)
    desk.take(asdict(TransferLog(kept=[ticket])))


async def test_a_directory_that_is_gone_costs_only_the_kv(desk: KVFrontend, store: SegmentStore) -> None:
    """The request is cut all the same."""
    desk.admit("a", "")
    desk.started("a")
    store.directory.rmdir()
    assert desk.begin_cut("a") == ""


async def test_counters_add_up(desk: KVFrontend) -> None:
    """Misses of all causes together."""
    for _ in range(2):
        desk.take(asdict(TransferLog(num_loads=2, loaded_bytes=100, misses={"missing": 1, "damaged": 2})))
    assert (desk.num_loads, desk.loaded_bytes, desk.num_misses) == (4, 200, 6)


def model(folder: Path, config: dict[str, int], weights: bytes) -> str:
    """A model's files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(weights)
    return str(folder)


def test_models_are_told_apart_by_what_they_are_and_not_by_where_they_lie(tmp_path: Path) -> None:
    """Config, weights, size, facts such as the data type."""
    weights = bytes(range(256)) * 4096
    one = model_fingerprint(model(tmp_path / "a", {"layers": 4}, weights), "float32")
    assert model_fingerprint(model(tmp_path / "b", {"layers": 4}, weights), "float32") == one
    others = {
        model_fingerprint(str(tmp_path / "a"), "bfloat16"),
        model_fingerprint(model(tmp_path / "c", {"layers": 5}, weights), "float32"),
        model_fingerprint(model(tmp_path / "d", {"layers": 4}, weights[:-1]), "float32"),
        model_fingerprint(model(tmp_path / "e", {"layers": 4}, b"\xff" + weights[1:]), "float32"),
        model_fingerprint("org/name", "float32"),
        model_fingerprint("org/other", "float32"),
    }
    assert len(others | {one}) == 7
