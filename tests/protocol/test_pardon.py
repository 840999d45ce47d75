"""A worker that lost its lease and comes back did not die: the blame is taken back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from l4queue.models import RequestState
from l4queue.protocol.calls import Verdict
from l4queue.protocol.keys import SOLO_STAGE
from tests.protocol.consistency import check
from tests.protocol.scene import Scene

S = RequestState


def _lost(scene: Scene, worker: str = "w1", **over: Any) -> None:
    """A worker takes all, stands still for longer than its lease, and is reaped."""
    scene.register(worker)
    scene.take(worker, **over)
    scene.lapse(worker)
    scene.reap()


def test_a_worker_that_comes_back_has_its_blame_taken_back(scene: Scene) -> None:
    """Once, however often it says so; the ledger tells; a second loss counts as the first."""
    scene.queue_up("a", "b")
    for turn in range(4):
        _lost(scene, f"w{turn}")
        assert [scene.record(i).crashes for i in ("a", "b")] == [1, 1]
        for _ in range(3):
            assert scene.pardon(f"w{turn}") is Verdict.OK
        assert [scene.record(i).crashes for i in ("a", "b")] == [0, 0]
        check(scene)

    assert scene.waiting() == ["a", "b"]
    assert scene.counts()["pardoned"] == 8
    last = json.loads(scene.executor.run(scene.reads.ledger("a"))[-1])
    assert (last["what"], last["pardoned"], last["crashes"], last["to"]) == ("rerouted", "w3", 0, "0")


@pytest.mark.parametrize("first", ["w1", "w2"])
def test_a_suspect_goes_back_to_its_stage_when_a_worker_comes_back(scene: Scene, first: str) -> None:
    """Whichever of the two it is; nothing is left of the suspicion when both did."""
    scene.queue_up("a", stage="1")
    for worker in ("w1", "w2"):
        _lost(scene, worker, stage="1")
    assert scene.waiting(SOLO_STAGE) == ["a"]

    for _ in range(2):
        scene.pardon(first)

    assert (scene.waiting("1"), scene.waiting(SOLO_STAGE)) == (["a"], [])
    assert scene.record().crashes == 1, "one loss is pardoned once"
    check(scene)
    scene.pardon("w2" if first == "w1" else "w1")
    assert (scene.record().crashes, scene.waiting("1")) == (0, ["a"])
    check(scene)


def test_a_suspect_with_enough_other_crashes_stays_one(scene: Scene) -> None:
    """Two workers died with it, a third came back."""
    scene.suspect("a")
    _lost(scene, "w2", stage=SOLO_STAGE)
    assert (scene.record().crashes, scene.raw.hget(scene.keys.request("a"), "solo_crashes")) == (3, b"1")

    scene.pardon("w2")

    assert (scene.record().crashes, scene.raw.hget(scene.keys.request("a"), "solo_crashes")) == (2, b"0")
    assert scene.waiting(SOLO_STAGE) == ["a"]
    check(scene)


def test_pauses_alone_never_condemn(scene: Scene) -> None:
    """A real suspect whose workers stop again and again, and come back each time."""
    scene.suspect("a")
    for turn in range(5):
        _lost(scene, f"w{turn + 2}", stage=SOLO_STAGE)
        scene.pardon(f"w{turn + 2}")
    assert scene.state() is S.QUEUED
    check(scene)


def test_who_made_its_worker_stand_still_keeps_the_blame(scene: Scene) -> None:
    """The worker names it; the others of the worker are free of blame."""
    scene.queue_up("a", "b", "c")
    _lost(scene)

    scene.pardon("w1", "b", "unknown")

    assert [scene.record(i).crashes for i in ("a", "b", "c")] == [0, 1, 0]
    check(scene)


def test_a_pardon_reaches_a_request_that_runs_elsewhere(scene: Scene) -> None:
    """It goes on there; given back, it waits in its stage and not to be run alone."""
    scene.queue_up("a", stage="1")
    for worker in ("w1", "w2"):
        _lost(scene, worker, stage="1")
    scene.register("w3")
    scene.grant("w3", SOLO_STAGE)

    scene.pardon("w1")

    assert (scene.state(), scene.record().crashes) == (S.RUNNING, 1)
    check(scene)
    assert scene.release(worker="w3", epoch=3) is Verdict.OK
    assert (scene.waiting("1"), scene.waiting(SOLO_STAGE)) == (["a"], [])
    check(scene)


def test_a_pardon_changes_nothing_that_has_ended(scene: Scene) -> None:
    """Nor does one for a worker that nobody gave up, or one of long ago: what was noted goes with its hour."""
    scene.queue_up("a", "b")
    _lost(scene)
    assert 0 < scene.raw.pttl(scene.keys.lost("w1")) <= 3_600_000
    scene.cancel("a")
    scene.raw.delete(scene.keys.request("b"))
    scene.raw.zrem(scene.keys.queue("0"), "b")
    before = scene.raw.hgetall(scene.keys.request("a"))

    scene.pardon("w1")
    scene.pardon("w9")

    assert scene.raw.hgetall(scene.keys.request("a")) == before
    assert not scene.raw.exists(scene.keys.request("b"))
