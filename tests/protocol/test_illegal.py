"""Every transition that must not happen does not: no script acts on a state, owner or epoch not its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from l4queue.models import TRANSITIONS, RequestState
from l4queue.protocol.calls import Verdict
from tests.protocol.consistency import check
from tests.protocol.scene import Scene

S = RequestState
Act = Callable[[Scene], Any]


def _stale_queue_entry(scene: Scene) -> Any:
    scene.register()
    scene.raw.zadd(scene.keys.queue("0"), {"a": 1.0})
    taken = scene.take()
    return [g.request_id for g in taken.grants]


def _stale_lease(scene: Scene) -> Any:
    scene.register("w9")
    scene.raw.sadd(scene.keys.held("w9"), "a")
    scene.lapse("w9")
    reaped = scene.reap()
    return reaped.num_requeued + reaped.num_dead


def _stale_leaver(scene: Scene) -> Any:
    scene.register("w9")
    scene.raw.sadd(scene.keys.held("w9"), "a")
    return scene.retire("w9")


def _stale_deadline(scene: Scene) -> Any:
    scene.overdue()
    return scene.expire()


def _stale_migration(scene: Scene) -> Any:
    scene.raw.zadd(scene.keys.queue("7"), {"a": 1.0})
    return scene.migrate("7", "1")


ACTS: dict[str, tuple[Act, Any]] = {
    "route": (lambda s: s.route(), Verdict.DUP),
    "refuse": (lambda s: s.refuse(), Verdict.DUP),
    "take": (_stale_queue_entry, []),
    "release": (lambda s: s.release(epoch=9), Verdict.FENCED),
    "retire": (_stale_leaver, Verdict.OK),
    "reap": (_stale_lease, 0),
    "settle": (lambda s: s.settle(epoch=9, num=1), Verdict.FENCED),
    "cancel": (lambda s: s.cancel(), None),
    "expire": (_stale_deadline, 0),
    "repair": (lambda s: s.repair(), "FINE"),
    "migrate": (_stale_migration, 0),
    "emit": (lambda s: s.emit(epoch=9), Verdict.FENCED),
}
ACTS_ON = {name: {t.source for t in TRANSITIONS if t.script == name} for name in ACTS}
CASES = [
    (name, state)
    for name in ACTS
    for state in (None, *S)
    # a worker's writes and the reaper's sweep act for the right owner only: the wrong one is tried in all states
    if state not in ACTS_ON[name] or name in ("release", "settle", "reap", "retire", "emit", "repair")
]


@pytest.mark.parametrize(("name", "state"), CASES, ids=lambda v: str(v))
def test_a_script_leaves_a_state_alone_that_is_not_its_own(
    scene: Scene, name: str, state: RequestState | None
) -> None:
    """Also with a stale queue entry, lease or deadline that points to the record: those are cleared away."""
    scene.bring(state)
    before = _core(scene)
    act, expected = ACTS[name]

    answer = act(scene)

    assert _core(scene) == before
    check(scene)
    if name == "cancel":
        assert answer == ((Verdict.UNKNOWN, None) if state is None else (Verdict.IS, state.value))
    else:
        assert answer == expected


def _core(scene: Scene) -> dict[str, Any]:
    """The dump without the traces of the extra worker and of what an empty queue leaves."""
    dump = scene.dump()
    dump.pop("workers", None)
    dump["backlog"] = {k: v for k, v in dump.get("backlog", {}).items() if v != b"0"}
    return {name: value for name, value in dump.items() if not name.startswith(("w:", "ctl:"))}


@pytest.mark.parametrize("writer", ["w2", ""], ids=["another worker", "nobody"])
@pytest.mark.parametrize("name", ["emit", "settle", "release"])
def test_only_the_owner_writes(scene: Scene, name: str, writer: str) -> None:
    """The right epoch in the wrong hands is fenced."""
    scene.bring(S.RUNNING)
    before = scene.dump()

    assert getattr(scene, name)("a", writer, 1) is Verdict.FENCED

    assert scene.dump() == before


@pytest.mark.parametrize("epoch", [0, 1, 3, 10, 21])
@pytest.mark.parametrize("name", ["emit", "settle", "release"])
def test_only_the_current_epoch_writes(scene: Scene, name: str, epoch: int) -> None:
    """The same worker took it twice: what it did not learn of its first lease is fenced, whatever the number."""
    scene.bring(S.RUNNING)
    scene.release()
    assert scene.grant().epoch == 2
    before = scene.dump()

    assert getattr(scene, name)("a", "w1", epoch) is Verdict.FENCED

    assert scene.dump() == before


@pytest.mark.parametrize("state", [S.DONE, S.FAILED])
@pytest.mark.parametrize("second", [S.DONE, S.FAILED])
def test_the_first_outcome_stands(scene: Scene, state: RequestState, second: RequestState) -> None:
    """A worker that settles twice with different outcomes changes nothing the second time."""
    scene.bring(S.RUNNING)
    scene.settle(state=state)
    before = scene.dump()

    verdict = scene.settle(state=second)

    assert verdict is (Verdict.DUP if state is second else Verdict.FENCED)
    assert scene.dump() == before


def test_a_zombie_that_wakes_after_its_request_was_finished_elsewhere_is_fenced(scene: Scene) -> None:
    """SIGSTOP beyond the lease: another worker finishes, then the first one writes on."""
    scene.bring(S.RUNNING)
    scene.emit(num=2)
    scene.lapse()
    scene.reap()
    scene.register("w2")
    assert scene.grant("w2").offset == 2
    scene.emit("a", "w2", 2, 2, 1)

    assert scene.emit("a", "w1", 1, 2, 3) is Verdict.FENCED
    assert scene.settle("a", "w1", 1, 5) is Verdict.FENCED
    assert scene.release("a", "w1", 1) is Verdict.FENCED
    assert scene.renew("w1") is Verdict.LOST
    assert scene.take("w1").verdict is Verdict.LOST
    assert scene.settle("a", "w2", 2, 3, 1) is Verdict.OK
    assert scene.emit("a", "w1", 1, 2, 3) is Verdict.FENCED

    check(scene)
    assert scene.shown() == [(1000, 1001), (2002,), (2003,), ()]
