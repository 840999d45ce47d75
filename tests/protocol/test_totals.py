"""Totals of what went wrong, for metrics: rejections, redeliveries by reason, repairs; what monitoring reads."""

from __future__ import annotations

import pytest

from l4queue.observe.telemetry import read_telemetry
from l4queue.protocol.calls import Move, MoveKind, Verdict
from l4queue.protocol.executor import Executor
from tests.protocol.scene import Scene


def running(scene: Scene, request_id: str = "a") -> None:
    """Leased to w1."""
    scene.register()
    scene.submit(request_id)
    scene.route(request_id)
    scene.take()


def requeued(scene: Scene) -> dict[str, int]:
    """Redeliveries by reason."""
    prefix = "requeued_"
    return {k.removeprefix(prefix): v for k, v in scene.counts().items() if k.startswith(prefix)}


def test_every_way_back_to_a_queue_is_counted_once(scene: Scene) -> None:
    """By its reason; repeats of the call count nothing."""
    running(scene)
    scene.crash()
    assert requeued(scene) == {"lost": 1}

    scene.take()
    assert scene.release(epoch=2, blame=False) is Verdict.OK
    assert scene.release(epoch=2, blame=False) is Verdict.DUP
    assert requeued(scene) == {"lost": 1, "released": 1}

    scene.take()
    scene.retire()
    assert requeued(scene) == {"lost": 1, "released": 1, "left": 1}

    scene.register()
    scene.take()
    scene.release(epoch=4, blame=True)
    assert requeued(scene) == {"lost": 1, "released": 1, "left": 1, "crashed": 1}


@pytest.mark.parametrize("kind", list(MoveKind))
def test_a_move_is_no_redelivery_for_want_of_a_worker(scene: Scene, kind: MoveKind) -> None:
    """It has its own total, and its own reason here."""
    running(scene)

    scene.release(stage="@w2", blame=False, move=Move(kind=kind, benefit_ms=2.0, cost_ms=1.0))

    assert requeued(scene) == {kind.value: 1}


def test_a_repair_is_counted(scene: Scene) -> None:
    """Whatever was missing; what is fine is not."""
    running(scene)
    scene.repair()
    assert "repairs" not in scene.counts()

    scene.raw.delete(scene.keys.held("w1"))

    assert scene.repair() == "LEASE"
    assert scene.counts()["repairs"] == 1
    assert requeued(scene) == {"repaired": 1}


def test_a_full_backlog_answers_even_where_memory_is_short(scene: Scene) -> None:
    """Then the rejection is not counted, but the client hears FULL all the same."""
    scene.submit("a", charge_tokens=100, max_live_tokens=100)
    scene.raw.config_set("maxmemory", 1)
    try:
        assert scene.submit("b", charge_tokens=1, max_live_tokens=100).verdict is Verdict.FULL
    finally:
        scene.raw.config_set("maxmemory", 0)
    assert "rejected" not in scene.counts()

    assert scene.submit("b", charge_tokens=1, max_live_tokens=100).verdict is Verdict.FULL
    assert scene.counts()["rejected"] == 1


def test_monitoring_sees_how_long_what_waits_has_waited(scene: Scene, executor: Executor, namespace: str) -> None:
    """The oldest of each queue whatever the serving order, and of the inbox; nothing waits: zero, none."""
    empty = read_telemetry(executor, namespace)
    assert (empty.inbox_age_s, empty.waiting_s, empty.planned_ms, empty.num_dead_letters) == (0.0, {}, None, 0)
    assert empty.memory.used_bytes > 100_000

    for request_id, stage, score, age_s in (("a", "0", 1.0, 5), ("b", "0", 2.0, 70), ("c", "1", 1.0, 20)):
        scene.submit(request_id)
        scene.route(request_id, stage=stage, score=score)
        accepted_ms = empty.overview.now_ms - age_s * 1000
        scene.raw.hset(scene.keys.request(request_id), "submitted_ms", accepted_ms)
    scene.submit("d")
    seen = read_telemetry(executor, namespace)

    assert set(seen.waiting_s) == {"0", "1"}
    assert 70.0 <= seen.waiting_s["0"] < 130.0
    assert 20.0 <= seen.waiting_s["1"] < 70.0
    assert 0.0 <= seen.inbox_age_s < 60.0
    assert seen.histogram["a:2"] == 3
