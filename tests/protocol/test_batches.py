"""Records of the gateway's batches: one holder at a time, whose notes alone count; a cancel; an end that stays."""

from __future__ import annotations

from typing import Any

from l4queue.protocol.batch_records import BatchCalls, BatchRecord, BatchState
from l4queue.protocol.calls import Verdict
from tests.protocol.scene import Scene

ID, STORE = "batch_1", "s"


def begin(scene: Scene) -> BatchCalls:
    """A batch that nobody runs yet."""
    calls = BatchCalls(scene.keys)
    record = BatchRecord(
        batch_id=ID,
        owner="ann",
        store=STORE,
        input_file_id="file-1",
        endpoint="/v1/completions",
        completion_window="24h",
        created_ms=1,
        expires_ms=2,
        output_ttl_s=3,
    )
    scene.executor.run_many(calls.begin(record))
    scene.executor.run_many(calls.begin(record))  # a repeat after a lost reply changes nothing
    return calls


def hold(scene: Scene, token: str, *, is_renewal: bool = False, lease_ms: int = 60_000) -> tuple[Verdict, Any]:
    call = BatchCalls(scene.keys).hold(ID, token=token, lease_ms=lease_ms, is_renewal=is_renewal)
    return scene.executor.run(call)


def note(scene: Scene, token: str, **more: Any) -> Verdict:
    call = BatchCalls(scene.keys).note(ID, store=STORE, token=token, **more)
    return scene.executor.run(call)[0]


def read(scene: Scene) -> BatchRecord:
    found = scene.executor.run(BatchCalls(scene.keys).read(ID))
    assert found is not None
    return found


def lapse(scene: Scene) -> None:
    """Let the lease run out."""
    scene.raw.hset(scene.keys.batch(ID), "held_until_ms", 1)


def test_one_holder_at_a_time(scene: Scene) -> None:
    """A repeat has it still; another one gets it when the lease has run out, and the first one loses it."""
    begin(scene)
    assert hold(scene, "a") == hold(scene, "a") == (Verdict.OK, None)
    assert hold(scene, "a", is_renewal=True) == (Verdict.OK, None)
    assert hold(scene, "b")[0] is Verdict.LOST
    lapse(scene)
    assert hold(scene, "b", is_renewal=True)[0] is Verdict.LOST
    assert hold(scene, "a", is_renewal=True)[0] is Verdict.OK  # nobody has taken it meanwhile
    lapse(scene)
    assert hold(scene, "b")[0] is Verdict.OK
    assert hold(scene, "a", is_renewal=True)[0] is Verdict.LOST
    assert hold(scene, "a")[0] is Verdict.LOST


def test_a_lease_lasts_as_long_as_was_asked(scene: Scene) -> None:
    """By the server's clock, and longer with each renewal."""
    begin(scene)
    now_ms = scene.executor.run(scene.reads.server_time_ms())
    hold(scene, "a", lease_ms=10_000)
    assert 0 <= read(scene).held_until_ms - now_ms - 10_000 < 60_000
    hold(scene, "a", lease_ms=500_000, is_renewal=True)
    assert read(scene).held_until_ms - now_ms >= 500_000


def test_notes_of_the_holder_alone_count(scene: Scene) -> None:
    """Fields and parts; a repeat changes nothing."""
    calls = begin(scene)
    hold(scene, "a")
    assert note(scene, "a", changes={"state": "in_progress", "num_lines": 7}) is Verdict.OK
    for _ in range(2):
        assert note(scene, "a", changes={"num_failed": 1}, parts={"output-0": 5, "errors-0": 1}) is Verdict.OK
    assert note(scene, "b", changes={"num_lines": 9}, parts={"output-1": 5}) is Verdict.LOST
    found = read(scene)
    assert (found.state, found.num_lines, found.num_failed) == (BatchState.IN_PROGRESS, 7, 1)
    assert scene.executor.run(calls.parts(ID)) == {"output-0": 5, "errors-0": 1}


def test_the_end_stays(scene: Scene) -> None:
    """The record is kept for a time, the parts are not; nobody takes it again, and a repeat is fine."""
    calls = begin(scene)
    hold(scene, "a")
    note(scene, "a", parts={"output-0": 5})
    for _ in range(2):
        assert note(scene, "a", changes={"state": "completed"}, keep_ms=50_000) is Verdict.OK
    found = read(scene)
    assert found.state is found.shown_state is BatchState.COMPLETED
    assert found.ended_ms is not None
    assert 0 < scene.raw.pttl(scene.keys.batch(ID)) <= 50_000
    assert scene.executor.run(calls.parts(ID)) == {}
    assert scene.executor.run(calls.unfinished(STORE, limit=9)) == []
    assert note(scene, "a", changes={"num_failed": 3}) is Verdict.LOST
    assert hold(scene, "a") == hold(scene, "b") == (Verdict.IS, "completed")
    assert scene.executor.run(calls.cancel(ID)) == (Verdict.IS, "completed")


def test_a_cancel_is_told_to_the_holder(scene: Scene) -> None:
    """Once: the time is that of the first; a batch that makes its files is not cancelled any more."""
    calls = begin(scene)
    hold(scene, "a")
    assert scene.executor.run(calls.cancel(ID)) == (Verdict.OK, None)
    asked_ms = read(scene).cancelling_ms
    assert asked_ms is not None
    assert read(scene).shown_state is BatchState.CANCELLING
    scene.raw.hset(scene.keys.batch(ID), "cancelling_ms", 17)
    assert scene.executor.run(calls.cancel(ID)) == (Verdict.OK, None)
    assert hold(scene, "a", is_renewal=True) == (Verdict.OK, "17")
    note(scene, "a", changes={"state": "finalizing"})
    assert scene.executor.run(calls.cancel(ID)) == (Verdict.IS, "finalizing")


def test_what_is_not_there_is_unknown(scene: Scene) -> None:
    """No script makes a batch."""
    calls = BatchCalls(scene.keys)
    assert hold(scene, "a")[0] is Verdict.UNKNOWN
    assert note(scene, "a", changes={"state": "failed"}) is Verdict.UNKNOWN
    assert scene.executor.run(calls.cancel(ID))[0] is Verdict.UNKNOWN
    assert scene.executor.run(calls.read(ID)) is None
    assert not scene.raw.exists(scene.keys.batch(ID))
