"""An arrival that finds a worker that runs nothing: it is leased to it with the wake-up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from l4queue.models import RequestState
from l4queue.policy.queue_order import BACKGROUND
from l4queue.protocol.calls import Verdict
from l4queue.protocol.keys import private_queue
from l4queue.protocol.readiness import LeasedArrival
from tests.protocol.consistency import check
from tests.protocol.scene import PROMPT_TOKENS, Scene

S = RequestState


def _arrive(scene: Scene, request_id: str = "a", **over: Any) -> None:
    scene.submit(request_id)
    assert scene.route(request_id, **over) is Verdict.OK


def _told(scene: Scene, worker: str = "w1") -> list[dict[bytes, bytes]]:
    return [values for _, values in scene.raw.xrange(scene.keys.wake(private_queue(worker)))]


def _leased(scene: Scene, worker: str = "w1") -> list[LeasedArrival]:
    return [LeasedArrival.parse(values) for values in _told(scene, worker) if b"e" in values]


def _is_only_woken(scene: Scene, worker: str = "w1") -> bool:
    """It has to look itself, and takes what waits."""
    return [list(values) for values in _told(scene, worker) if b"t" not in values] == [[b"i", b"s"]]


def test_it_is_as_if_the_worker_had_taken_it(scene: Scene) -> None:
    """The same lease and the same grant; the worker is ready for another one, and heavier."""
    scene.queue_up("other")
    scene.register("w2")
    expected = scene.grant("w2")
    assert scene.be_ready(backlog_ms=4.0).is_ready
    _arrive(scene, score=0.0)
    (arrival,) = _leased(scene)
    grant = arrival.grant
    assert (grant.request_id, grant.epoch, grant.score) == ("a", 1, 0.0)
    for name in ("body", "packed_ids", "offset", "prompt_tokens", "crashes", "deadline_ms", "stage"):
        assert getattr(grant, name) == getattr(expected, name), name
    assert (grant.came_from, grant.kv, grant.is_background) == ("", "", False)
    assert (arrival.incarnation, arrival.is_ready) == ("w1", True)
    record = scene.record()
    assert (record.state, record.worker, record.epoch) == (S.RUNNING, "w1", 1)
    assert record.started_ms is not None
    assert record.submitted_ms == grant.submitted_ms
    assert scene.waiting() == []
    assert scene.backlog() == {"0": 0}
    assert scene.raw.smembers(scene.keys.held("w1")) == {b"a"}
    assert scene.raw.zrange(scene.keys.ready("0"), 0, -1, withscores=True) == [
        (b"w1", 4.0 + 1.0 + 0.5 * PROMPT_TOKENS)
    ]
    assert scene.raw.smembers(scene.keys.thieves) == {b"w1"}
    assert scene.settle(num=1) is Verdict.OK
    check(scene)


def test_each_arrival_of_a_batch_goes_to_another_idle_worker(scene: Scene) -> None:
    """The lightest first. One that has one by then is only woken: it finds what the others left."""
    for number, name in enumerate(("w1", "w2")):
        scene.be_ready(name, backlog_ms=100.0 * number)
    given: dict[str, Any] = {"stage": "0", "token_ids": (1, 2, 3), "max_tokens": 8}
    for request_id in ("a", "b", "c"):
        scene.submit(request_id)
    scene.executor.run_many(
        [
            scene.calls.route(i, entry_id=scene.entry(i), plan_version=0, bucket=2, score=float(n), **given)
            for n, i in enumerate(("a", "b", "c"))
        ]
    )
    assert [one.grant.request_id for one in _leased(scene, "w1")] == ["a"]
    assert [values[b"s"] for values in _told(scene, "w1")[1:]] == [b"0"]  # still the lightest: it looks
    assert [one.grant.request_id for one in _leased(scene, "w2")] == ["b"]
    assert scene.waiting() == ["c"]
    check(scene)


def test_a_worker_with_one_slot_is_ready_no_more(scene: Scene) -> None:
    scene.be_ready(max_requests=1)
    _arrive(scene)
    assert [one.is_ready for one in _leased(scene)] == [False]
    assert scene.raw.zcard(scene.keys.ready("0")) == 0
    assert scene.raw.scard(scene.keys.thieves) == 0


def test_a_worker_that_has_a_prompt_to_compute_is_ready_no_more(scene: Scene) -> None:
    """Until it has: more would wait in its engine."""
    from l4queue.policy.admission import AdmissionBudget

    budget = AdmissionBudget(
        num_requests=5, kv_tokens=100, prefill_tokens=2, growth_tokens=0, is_idle=True, reason="test"
    )
    scene.be_ready(budget=budget)
    _arrive(scene)
    assert [one.is_ready for one in _leased(scene)] == [False]


REASONS: dict[str, Callable[[Scene], None]] = {
    "it is long": lambda scene: _arrive(scene, token_ids=[1] * 600),
    "it is background": lambda scene: _arrive(scene, score=BACKGROUND + 1.0),
    "it was leased before": lambda scene: _return(scene),
    "it is late": lambda scene: _late(scene),
    "another is before it that cannot be read": lambda scene: _behind(scene, "crashes", "nonsense"),
    "another is before it that waits elsewhere": lambda scene: _behind(scene, "stage", "7"),
    "what the worker told cannot be read": lambda scene: _spoilt(scene),
}


def _return(scene: Scene) -> None:
    scene.raw.delete(scene.keys.ready("0"))
    _arrive(scene)
    scene.register("w2")
    scene.grant("w2")
    scene.raw.zadd(scene.keys.ready("0"), {"w1": 0.0})
    assert scene.release("a", "w2", 1) is Verdict.OK


def _late(scene: Scene) -> None:
    scene.submit()
    scene.late()
    assert scene.route() is Verdict.OK


def _behind(scene: Scene, field: str, value: str) -> None:
    scene.raw.delete(scene.keys.ready("0"))
    _arrive(scene, "first", score=0.0)
    scene.raw.hset(scene.keys.request("first"), field, value)
    scene.raw.zadd(scene.keys.ready("0"), {"w1": 0.0})
    _arrive(scene)


def _spoilt(scene: Scene) -> None:
    scene.raw.hset(scene.keys.worker("w1"), "eager", "5 . . .")
    _arrive(scene)


@pytest.mark.parametrize("reason", REASONS)
def test_other_requests_only_wake_it(scene: Scene, reason: str) -> None:
    """A look at its room, or at the record, has to decide."""
    scene.be_ready()
    REASONS[reason](scene)
    assert _is_only_woken(scene)
    assert scene.raw.scard(scene.keys.held("w1")) == 0


def test_what_waits_in_the_background_has_its_place_in_the_order(scene: Scene) -> None:
    """The worker's quota decides which of them is next."""
    scene.be_ready()
    scene.raw.delete(scene.keys.ready("0"))
    _arrive(scene, "slow", score=BACKGROUND + 1.0)
    scene.raw.zadd(scene.keys.ready("0"), {"w1": 0.0})
    _arrive(scene)
    assert _is_only_woken(scene)


@pytest.mark.parametrize("why", ["it runs something", "it chooses", "it was busy", "its lease has run out"])
def test_other_workers_are_only_woken(scene: Scene, why: str) -> None:
    """They are ready, and know better whether they have room."""
    if why == "its lease has run out":
        scene.be_ready()
        scene.lapse("w1")
        _arrive(scene)
        assert (_told(scene), scene.state()) == ([], S.QUEUED)
        return
    if why == "it runs something":
        scene.be_ready()
        _arrive(scene, "before", stage=private_queue("w1"))
        scene.grant("w1", private_queue("w1"), own_stage="0")
        scene.raw.delete(scene.keys.wake(private_queue("w1")))
    else:
        scene.be_ready(is_by_choice=why == "it chooses", is_idle=why != "it was busy")
    _arrive(scene)
    assert _is_only_woken(scene)
    assert scene.state() is S.QUEUED


@pytest.mark.parametrize("ending", ["settle", "cancel", "release", "reap", "retire"])
def test_its_prompt_leaves_the_wake_ups_with_its_lease(scene: Scene, ending: str) -> None:
    """Whether the worker has read it or not."""
    scene.be_ready()
    _arrive(scene)
    assert len(_leased(scene)) == 1
    if ending == "settle":
        scene.settle(num=1)
    elif ending == "cancel":
        scene.cancel()
    elif ending == "release":
        scene.release()
    elif ending == "reap":
        scene.lapse("w1")
        scene.reap()
    else:
        scene.retire("w1")
        assert scene.record().crashes == 0
    assert _leased(scene) == []
    assert scene.raw.hget(scene.keys.request("a"), "wakeup") is None
    check(scene)


def test_a_wake_up_that_nobody_wrote_ends_no_ending(scene: Scene) -> None:
    """The field that names it may be anybody's."""
    scene.be_ready()
    _arrive(scene)
    scene.raw.hset(scene.keys.request("a"), "wakeup", "nonsense")
    assert scene.settle(num=1) is Verdict.OK


def test_a_request_of_a_worker_that_dies_comes_back_once(scene: Scene) -> None:
    """With one crash to its name, as if it had been taken; then it has to be taken."""
    scene.be_ready()
    _arrive(scene)
    scene.lapse("w1")
    assert scene.reap().num_requeued == 1
    record = scene.record()
    assert (record.state, record.crashes, record.epoch) == (S.QUEUED, 1, 1)
    assert scene.be_ready("w2").grants[0].request_id == "a"
