"""Every legal transition happens, ends where the table says, and a repeat after a lost reply changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from l4queue.models import TERMINAL, TRANSITIONS, RequestState, Transition
from l4queue.protocol.calls import Verdict
from tests.protocol.consistency import check
from tests.protocol.scene import Scene

S = RequestState
Act = Callable[[Scene], Any]
Edge = tuple[RequestState | None, RequestState, str]


def _alone_for_the_last_time(scene: Scene) -> None:
    """Two crashes in company, two alone; then it runs alone once more."""
    scene.bring(S.QUEUED)
    scene.register()
    for stage in ("0", "0", "solo", "solo"):
        scene.grant(stage=stage)
        scene.crash()
    scene.grant(stage="solo")


def _reap(scene: Scene) -> Any:
    scene.lapse()
    return scene.reap()


def _expire(scene: Scene) -> Any:
    scene.overdue()
    return scene.expire()


def _too_late(scene: Scene) -> Any:
    scene.raw.hset(scene.keys.request("a"), "deadline_ms", 1)
    return scene.take(nonce="same")


def _repair(scene: Scene) -> Any:
    scene.raw.srem(scene.keys.held("w1"), "a")
    return scene.repair()


ACTS: dict[Edge, Act] = {
    (None, S.SUBMITTED, "submit"): lambda s: s.submit(),
    (S.SUBMITTED, S.QUEUED, "route"): lambda s: s.route(),
    (S.SUBMITTED, S.RUNNING, "route"): lambda s: s.route(),
    (S.SUBMITTED, S.FAILED, "refuse"): lambda s: s.refuse(raw=b"\xff"),
    (S.QUEUED, S.RUNNING, "take"): lambda s: s.take(nonce="same"),
    (S.RUNNING, S.QUEUED, "release"): lambda s: s.release(),
    (S.RUNNING, S.DEAD, "release"): lambda s: s.release(epoch=5, blame=True),
    (S.RUNNING, S.QUEUED, "retire"): lambda s: s.retire(),
    (S.RUNNING, S.QUEUED, "reap"): _reap,
    (S.RUNNING, S.DEAD, "reap"): _reap,
    (S.RUNNING, S.QUEUED, "repair"): _repair,
    (S.RUNNING, S.DONE, "settle"): lambda s: s.settle(num=2),
    (S.RUNNING, S.FAILED, "settle"): lambda s: s.settle(state=S.FAILED),
    (S.SUBMITTED, S.CANCELLED, "cancel"): lambda s: s.cancel(),
    (S.QUEUED, S.CANCELLED, "cancel"): lambda s: s.cancel(),
    (S.RUNNING, S.CANCELLED, "cancel"): lambda s: s.cancel(),
    (S.SUBMITTED, S.EXPIRED, "expire"): _expire,
    (S.QUEUED, S.EXPIRED, "expire"): _expire,
    (S.QUEUED, S.EXPIRED, "take"): _too_late,
    (S.RUNNING, S.EXPIRED, "expire"): _expire,
}


def _edge(transition: Transition) -> Edge:
    return transition.source, transition.target, transition.script


def _start(scene: Scene, edge: Edge) -> None:
    source, target, _ = edge
    if target is S.DEAD:
        _alone_for_the_last_time(scene)
    else:
        scene.bring(source)
        if source is S.QUEUED:
            scene.register()
        if edge == (S.SUBMITTED, S.RUNNING, "route"):
            scene.be_ready()


def test_the_acts_cover_the_table_exactly() -> None:
    """A transition without a test, or a test of none, fails here."""
    assert set(ACTS) == {_edge(t) for t in TRANSITIONS}
    assert all(t.source not in TERMINAL for t in TRANSITIONS), "terminal states never change"


@pytest.mark.parametrize("edge", list(ACTS), ids=lambda e: f"{e[0] or 'absent'}-{e[2]}-{e[1]}")
def test_a_legal_transition_ends_where_the_table_says(scene: Scene, edge: Edge) -> None:
    """And everything around the record follows: queue, lease, inbox, counters, output, lifetimes."""
    _start(scene, edge)
    check(scene)

    ACTS[edge](scene)

    assert scene.state() is edge[1]
    if edge[2] != "repair":  # what needs repair is out of order before
        check(scene)


@pytest.mark.parametrize("edge", list(ACTS), ids=lambda e: f"{e[0] or 'absent'}-{e[2]}-{e[1]}")
def test_a_repeat_after_a_lost_reply_changes_nothing(scene: Scene, edge: Edge) -> None:
    """The caller cannot tell a lost request from a lost reply, so it repeats: the state stays the same."""
    _start(scene, edge)
    act = ACTS[edge]
    entry = scene.entry()
    if edge[2] == "refuse":
        act = lambda s: s.refuse(entry=entry, raw=b"\xff")  # noqa: E731
    if edge[2] == "route":
        act = lambda s: s.route(entry=entry)  # noqa: E731
    first = act(scene)
    after_first = scene.dump()

    second = act(scene)

    if edge[2] != "repair":
        if edge[2] == "expire":
            scene.raw.zrem(scene.keys.deadlines, "a")  # put there by this test, not by the script
        assert scene.dump() == after_first
    fine = {Verdict.OK, Verdict.DUP}
    if isinstance(first, Verdict):
        assert {first, second} <= fine
    elif edge[2] == "submit":
        assert (first.verdict, second.verdict) == (Verdict.OK, Verdict.DUP)
    elif edge[2] == "take":
        assert first == second
        assert len(first.grants) == (edge[1] is S.RUNNING)
    elif edge[2] == "cancel":
        assert first == (Verdict.OK, None)
        assert second == (Verdict.IS, "cancelled")


def test_another_plan_than_the_one_seen_is_told_and_nothing_done(scene: Scene) -> None:
    """It decides anew. What is routed already only leaves the inbox."""
    scene.submit()
    entry, before = scene.entry(), scene.dump()
    assert scene.route(plan_seen=3) is Verdict.STALE
    assert scene.dump() == before
    assert scene.route(plan_seen=0) is Verdict.OK
    assert scene.publish(0, 1) is Verdict.OK
    assert scene.route(entry=entry, plan_seen=0) is Verdict.DUP
    scene.submit("b")
    assert scene.route("b", plan_seen=0) is Verdict.STALE
    assert scene.route("b", plan_seen=1) is Verdict.OK
    check(scene)


def test_a_repeated_cancel_is_answered_like_the_first(scene: Scene) -> None:
    """Its reply was lost. Another cancel, or one without a nonce, came too late."""
    scene.bring(S.RUNNING)
    mine, other, none = (scene.calls.cancel("a", reason="", nonce=nonce) for nonce in ("n1", "n2", ""))
    assert [scene.executor.run(call)[0] for call in (mine, mine, other, none, mine)] == [
        Verdict.OK,
        Verdict.OK,
        Verdict.IS,
        Verdict.IS,
        Verdict.OK,
    ]
    check(scene)
    scene.submit("b")
    scene.executor.run(scene.calls.cancel("b", reason=""))
    assert scene.executor.run(scene.calls.cancel("b", reason=""))[0] is Verdict.IS
