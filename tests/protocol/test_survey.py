"""The survey: what every worker looks at, shared by all for a moment."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from l4queue.models import WorkerLoad
from l4queue.observe.overview import QueueView, read_overview
from l4queue.policy.queue_order import BACKGROUND
from l4queue.protocol.keys import SOLO_STAGE
from l4queue.protocol.parsing import load_to_json
from l4queue.protocol.survey import MOST_WORKERS, Survey, brief_of, kept_survey, survey
from tests.protocol.scene import Scene

LOAD = WorkerLoad(
    worker_id="w1",
    incarnation="w1:a",
    stage=2,
    num_running=3,
    context_tokens=4000,
    pending_prefill_tokens=500,
    longest_prefill_tokens=300,
    prefill_due_ms=12.345,
    copies_due_ms=3.25,
    kv_used_tokens=4096,
    kv_capacity_tokens=100_000,
    max_running=8,
    is_draining=True,
    is_emptying=True,
    can_empty=True,
)


def _survey(scene: Scene, *, max_age_ms: int = 0) -> Survey:
    found = scene.executor.run(survey(scene.keys, max_age_ms=max_age_ms))
    assert found is not None
    return found


def _register(scene: Scene, load: WorkerLoad, *, has_brief: bool = True) -> None:
    told = {"v": 1, **load_to_json(load), "cost": None}
    brief = brief_of(load) if has_brief else ""
    scene.register(load.incarnation, worker_id=load.worker_id, load=json.dumps(told), brief=brief)


def test_workers_and_queues_are_those_of_an_overview(scene: Scene) -> None:
    """Of loads what siblings decide by; whole loads from workers of a release that tells no brief."""
    others = [replace(LOAD, worker_id=f"w{n}", incarnation=f"w{n}:b", num_running=n) for n in (2, 3)]
    _register(scene, LOAD)
    _register(scene, others[0])
    _register(scene, others[1], has_brief=False)
    for request_id, stage, score in (("a", "0", 1.0), ("b", "0", BACKGROUND + 1.0), ("c", SOLO_STAGE, 1.0)):
        scene.submit(request_id)
        scene.route(request_id, stage=stage, score=score)
    scene.submit("d")

    found, known = _survey(scene), read_overview(scene.executor, scene.keys.namespace)

    assert found.workers == known.workers == (LOAD, *others)
    assert (found.num_workers, found.share, found.inbox, found.has_older) == (3, 1.0, 1, True)
    assert abs(found.at_ms - known.now_ms) < 60_000
    views = {
        q.stage: QueueView(
            num_requests=q.num_requests,
            tokens=q.tokens,
            num_foreground=q.num_foreground,
            foreground_ms=q.foreground_ms,
        )
        for q in found.queues
    }
    assert views == known.queues
    assert (views["0"].num_requests, views["0"].num_foreground) == (2, 1)
    assert [q.head_id for q in found.queues if q.stage == "0"] == ["a"]


def test_a_brief_has_all_that_siblings_decide_by(scene: Scene) -> None:
    """What it leaves out has its default."""
    _register(scene, LOAD)
    (found,) = _survey(scene).workers
    told = {f.name for f in fields(WorkerLoad) if getattr(LOAD, f.name) != f.default}
    assert {name for name in told if getattr(found, name) == getattr(LOAD, name)} == told


def test_who_is_gone_or_tells_nonsense_is_left_out(scene: Scene) -> None:
    for name in ("w1:a", "w2:a", "w3:a", "w4:a"):
        _register(scene, replace(LOAD, worker_id=name[:2], incarnation=name))
    scene.lapse("w2:a")
    scene.raw.hset(scene.keys.worker("w3:a"), "brief", b"\xff\x00 nan inf")
    scene.raw.zadd(scene.keys.workers, {b"\xff:\x01": 10**15})
    found = _survey(scene)
    assert [load.worker_id for load in found.workers] == ["w1", "w4"]
    assert found.num_workers == 4


def test_a_look_shares_what_another_one_saw_a_moment_ago(scene: Scene) -> None:
    first = _survey(scene)
    _register(scene, LOAD)
    kept = scene.executor.run(kept_survey(scene.keys))
    assert kept is None or kept == first  # on a slow machine its moment is over
    assert _survey(scene, max_age_ms=3_600_000).workers in ((), (LOAD,))
    assert _survey(scene).workers == (LOAD,)
    assert not _survey(scene).has_older
    assert scene.raw.pttl(scene.keys.survey) != -1


def test_a_survey_serves_no_longer_than_its_reader_says(scene: Scene) -> None:
    """Nor one of a moment to come: a clock went back."""
    at_ms = _survey(scene).at_ms
    told = scene.raw.get(scene.keys.survey) or f"{at_ms} {{}}".encode()
    _register(scene, LOAD)
    for moment_ms in (at_ms - 3_600_000, at_ms + 3_600_000):
        scene.raw.set(scene.keys.survey, told.replace(str(at_ms).encode(), str(moment_ms).encode(), 1))
        assert _survey(scene, max_age_ms=1_800_000).workers == (LOAD,)


def test_what_nobody_of_ours_kept_is_surveyed_anew(scene: Scene) -> None:
    _register(scene, LOAD)
    scene.raw.set(scene.keys.survey, b"9 {\xff")
    assert scene.executor.run(kept_survey(scene.keys)) is None
    assert _survey(scene).workers == (LOAD,)
    scene.raw.delete(scene.keys.survey)
    scene.raw.lpush(scene.keys.survey, "x")
    assert scene.executor.run(kept_survey(scene.keys)) is None
    assert _survey(scene).workers == (LOAD,)


def test_of_very_many_workers_some_are_drawn_anew_each_time(scene: Scene) -> None:
    calls = []
    for number in range(3 * MOST_WORKERS):
        load = replace(LOAD, worker_id=f"w{number}", incarnation=f"w{number}:a")
        calls.append(
            scene.calls.renew(
                load.incarnation,
                worker_id=load.worker_id,
                lease_ms=3_600_000,
                load="{}",
                sequence=1,
                register=True,
                brief=brief_of(load),
            )
        )
    scene.executor.run_many(calls)
    found, again = _survey(scene), _survey(scene)
    assert len(found.workers) == len({load.worker_id for load in found.workers}) == MOST_WORKERS
    assert (found.num_workers, found.share) == (3 * MOST_WORKERS, pytest.approx(1 / 3))
    assert {load.worker_id for load in found.workers} != {load.worker_id for load in again.workers}


def test_outputs_are_those_of_requests_that_are_done(scene: Scene) -> None:
    scene.register()
    for request_id, num in (("a", 2), ("b", 3)):
        scene.submit(request_id)
        scene.route(request_id)
        scene.grant()
        scene.settle(request_id, num=num)
    scene.submit("c")
    scene.cancel("c")
    found = _survey(scene)
    endings = [entry_id.decode() for entry_id, _ in scene.raw.xrange(scene.keys.finished)]
    assert list(found.outputs) == [(endings[1], 3), (endings[0], 2)]
