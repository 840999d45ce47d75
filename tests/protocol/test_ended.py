"""What the end of an output tells of its record, so that a client that waits for it reads nothing else."""

from __future__ import annotations

import pytest

from l4queue.models import RequestState
from l4queue.protocol.records import OutputEntry, RequestRecord
from tests.protocol.scene import Scene

S = RequestState


def _ended(scene: Scene, request_id: str = "a") -> tuple[RequestRecord | None, list[OutputEntry]]:
    return scene.executor.run(scene.reads.ended(request_id))


@pytest.mark.parametrize("way", ["at once", "with a deadline", "after a crash", "without a token"])
def test_it_is_the_record_and_the_output(scene: Scene, way: str) -> None:
    """Every field, whatever the request went through."""
    scene.submit(deadline_ms=3_600_000 if way == "with a deadline" else 0, body='{"metadata":{"a":1}}')
    scene.route()
    scene.register()
    epoch = scene.grant().epoch
    if way == "after a crash":
        scene.emit(num=2)
        scene.crash()
        epoch = scene.grant().epoch
        scene.settle(epoch=epoch, offset=2, num=3)
    else:
        scene.settle(epoch=epoch, num=int(way != "without a token"))
    record, entries = _ended(scene)
    assert record == scene.record()
    assert record is not None
    assert (record.state, record.epoch) == (S.DONE, epoch)
    assert entries == scene.output()
    assert entries[-1].state is S.DONE


@pytest.mark.parametrize("state", [None, S.QUEUED, S.RUNNING, S.FAILED, S.CANCELLED])
def test_of_others_the_record_is_to_be_read(scene: Scene, state: RequestState | None) -> None:
    """What has not ended well, or not at all, or is not there."""
    scene.bring(state)
    assert _ended(scene)[0] is None


def test_a_long_body_is_not_stored_twice(scene: Scene) -> None:
    scene.submit(body='{"metadata":{"a":"' + "x" * 600 + '"}}')
    scene.route()
    scene.register()
    scene.grant()
    scene.settle(num=1)
    assert _ended(scene) == (None, scene.output())


def test_packed_it_tells_no_more(scene: Scene) -> None:
    """The output is what counts for its memory then."""
    scene.bring(S.DONE)
    before = scene.output()
    assert scene.pack().num_packed == 1
    assert _ended(scene) == (None, before)
    assert set(scene.raw.xrange(scene.keys.output("a"))[-1][1]) == {b"e", b"x"}


def test_what_nobody_of_ours_wrote_hides_no_output(scene: Scene) -> None:
    """Then the record is read, which is reported as ever."""
    scene.bring(S.RUNNING)
    scene.emit()
    scene.raw.xadd(scene.keys.output("a"), {"e": "moonlight", "finished_ms": "5"}, id="2-1")
    assert _ended(scene) == (None, scene.output())
