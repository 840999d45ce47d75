"""Who is woken: for each arrival one worker, the lightest with room; nothing is stranded if it does not come."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from l4queue.protocol.calls import Taken, Verdict
from l4queue.protocol.keys import SOLO_STAGE, private_queue
from l4queue.protocol.readiness import LeasedArrival, Readiness
from tests.conftest import SEED
from tests.protocol.consistency import check
from tests.protocol.scene import PROMPT_TOKENS, Scene


def _look(scene: Scene, worker: str, *, backlog_ms: float = 0.0, stage: str = "0", **over: Any) -> Taken:
    """Take from its stage, to be woken for the next arrival there; that has to be taken, unless it looks idle."""
    over.setdefault("is_idle", False)
    given: dict[str, Any] = {"request_ms": 1.0, "token_ms": 0.5, "may_steal": False}
    given |= {name: over.pop(name) for name in list(over) if name in (*given, "is_by_choice")}
    return scene.take(worker, stage, readiness=Readiness(backlog_ms=backlog_ms, **given), **over)


def _arrive(scene: Scene, *request_ids: str, stage: str = "0") -> None:
    for request_id in request_ids:
        scene.submit(request_id, max_live_tokens=10**9)
        assert scene.route(request_id, stage=stage) is Verdict.OK


def _woken(scene: Scene, *workers: str) -> list[str]:
    """Those of the workers that were woken, with the stages, once for each time."""
    return [
        f"{worker} {(values.get(b's') or b'steal ' + values[b't']).decode()}"
        for worker in workers
        for _, values in scene.raw.xrange(scene.keys.wake(private_queue(worker)))
    ]


def _ready(scene: Scene, stage: str = "0") -> dict[str, float]:
    return {
        name.decode(): score for name, score in scene.raw.zrange(scene.keys.ready(stage), 0, -1, withscores=True)
    }


@pytest.mark.parametrize("num_workers", [1, 3, 200])
def test_an_arrival_wakes_one_worker_of_however_many(scene: Scene, num_workers: int) -> None:
    """The lightest waiting worker."""
    names = [f"w{number}" for number in range(num_workers)]
    for number, name in enumerate(names):
        scene.register(name)
        assert _look(scene, name, backlog_ms=float((number + 7) % num_workers)).is_ready
    lightest = names[-7 % num_workers]
    _arrive(scene, "a")
    assert _woken(scene, *names) == [f"{lightest} 0"]
    assert scene.raw.xlen(scene.keys.wake("0")) == 0
    assert len(_ready(scene)) == num_workers - 1


def test_each_of_several_arrivals_wakes_another_one(scene: Scene) -> None:
    """Of one batch, too: they share an EVALSHA."""
    names = [f"w{number}" for number in range(6)]
    for number, name in enumerate(names):
        scene.register(name)
        _look(scene, name, backlog_ms=float(-number % 6))
    _arrive(scene, "a", "b")
    assert _woken(scene, *names) == ["w0 0", "w5 0"]
    given: dict[str, Any] = {"stage": "0", "score": 1.0, "token_ids": (1, 2), "max_tokens": 8}
    for request_id in ("c", "d", "e"):
        scene.submit(request_id)
    scene.executor.run_many(
        [scene.calls.route(i, entry_id=scene.entry(i), plan_version=0, bucket=2, **given) for i in ("c", "d", "e")]
    )
    assert _woken(scene, *names) == [f"w{number} 0" for number in (0, 2, 3, 4, 5)]
    assert set(_ready(scene)) == {"w1"}


def test_what_a_take_grants_makes_the_worker_heavier(scene: Scene) -> None:
    scene.register()
    _arrive(scene, "a", "b")
    taken = _look(scene, "w1", backlog_ms=10.0)
    assert (len(taken.grants), taken.is_ready) == (2, True)
    assert _ready(scene) == {"w1": 10.0 + 2 * (1.0 + 0.5 * PROMPT_TOKENS)}
    assert scene.renew(backlog_ms=4.5) is Verdict.OK
    assert _ready(scene) == {"w1": 4.5}


def test_a_worker_without_room_is_not_woken(scene: Scene) -> None:
    scene.register()
    _arrive(scene, "a")
    assert not _look(scene, "w1", max_requests=1).is_ready
    _arrive(scene, "b")
    assert _woken(scene, "w1") == []
    assert scene.raw.xlen(scene.keys.wake("0")) == 2  # nobody was ready: workers of an earlier release are told
    assert len(_look(scene, "w1", max_requests=1).grants) == 1
    assert _ready(scene) == {}


def test_a_worker_that_fills_up_is_ready_no_more(scene: Scene) -> None:
    """Though nothing has woken it: it looked of its own accord."""
    scene.register()
    _arrive(scene, "a")
    assert _look(scene, "w1", is_by_choice=True).is_ready
    assert len(_look(scene, "w1", max_requests=1).grants) == 1
    assert _ready(scene) == {}


def test_a_worker_that_leaves_something_wakes_another(scene: Scene) -> None:
    """Two were ready when one request came; the one that is woken finds it too long."""
    for name in ("w1", "w2"):
        scene.register(name)
    _look(scene, "w1", backlog_ms=1.0)
    _look(scene, "w2", backlog_ms=2.0)
    _arrive(scene, "a")
    assert _woken(scene, "w1", "w2") == ["w1 0"]
    taken = _look(scene, "w1", budget=_short_budget())
    assert (taken.grants, taken.is_ready) == ((), False)
    assert _woken(scene, "w1", "w2") == ["w1 0", "w2 0"]


def _short_budget() -> Any:
    from l4queue.policy.admission import AdmissionBudget

    return AdmissionBudget(
        num_requests=5, kv_tokens=1, prefill_tokens=1, growth_tokens=0, is_idle=False, reason="test"
    )


def test_who_is_dead_or_gone_is_passed_over(scene: Scene) -> None:
    for number, name in enumerate(("dead", "w2")):
        scene.register(name)
        _look(scene, name, backlog_ms=float(number))
    scene.lapse("dead")
    _arrive(scene, "a")
    assert _woken(scene, "dead", "w2") == ["w2 0"]


@pytest.mark.parametrize("ending", ["reap", "retire", "drain", "other stage"])
def test_who_was_woken_and_does_not_come_passes_it_on(scene: Scene, ending: str) -> None:
    """It dies, leaves, takes nothing any more, or serves another stage by then."""
    for number, name in enumerate(("w1", "w2")):
        scene.register(name)
        _look(scene, name, backlog_ms=float(number))
    _arrive(scene, "a")
    assert _woken(scene, "w1", "w2") == ["w1 0"]
    if ending == "reap":
        scene.lapse("w1")
        scene.reap()
    elif ending == "retire":
        scene.retire("w1")
    elif ending == "drain":
        scene.renew("w1", backlog_ms=None)
    else:
        assert _look(scene, "w1", stage="1").is_ready
    assert _woken(scene, "w1", "w2") == ["w1 0", "w2 0"]
    assert _ready(scene) == {}


@pytest.mark.parametrize("ending", ["reap", "retire", "drain", "other stage"])
def test_who_was_not_woken_and_leaves_wakes_nobody(scene: Scene, ending: str) -> None:
    for number, name in enumerate(("w1", "w2", "w3")):
        scene.register(name)
        _look(scene, name, backlog_ms=float(number), may_steal=True)
    _arrive(scene, "a")
    if ending == "reap":
        scene.lapse("w2")
        scene.reap()
    elif ending == "retire":
        scene.retire("w2")
    elif ending == "drain":
        scene.renew("w2", backlog_ms=None)
    else:
        assert _look(scene, "w2", stage="1", may_steal=True).is_ready
    assert _woken(scene, "w1", "w2", "w3") == ["w1 0"]
    assert set(_ready(scene)) == {"w3"}
    assert scene.raw.smembers(scene.keys.thieves) == ({b"w2", b"w3"} if ending == "other stage" else {b"w3"})


def test_where_nobody_is_ready_two_thieves_are_drawn(scene: Scene) -> None:
    """They keep waiting for their own stage. Those that may not steal are left alone."""
    for number in range(6):
        scene.register(f"w{number}")
        _look(scene, f"w{number}", stage="1", may_steal=number < 4)
    _arrive(scene, "a")
    woken = _woken(scene, *(f"w{number}" for number in range(6)))
    assert len(woken) == 2
    assert {line.partition(" ")[2] for line in woken} == {"steal 0"}
    assert {line.split()[0] for line in woken} <= {"w0", "w1", "w2", "w3"}
    assert len(_ready(scene, "1")) == 6


def test_what_is_meant_for_one_worker_or_runs_alone_wakes_as_ever(scene: Scene) -> None:
    scene.register()
    _look(scene, "w1")
    _arrive(scene, "a", stage=private_queue("w1"))
    _arrive(scene, "b", stage=SOLO_STAGE)
    assert [list(v) for _, v in scene.raw.xrange(scene.keys.wake(private_queue("w1")))] == [[b"i"]]
    assert scene.raw.xlen(scene.keys.wake(SOLO_STAGE)) == 1
    assert set(_ready(scene)) == {"w1"}


def test_by_choice_a_worker_waits_though_something_is_left(scene: Scene) -> None:
    """And wakes nobody for it: it says who is to be."""
    for name in ("w1", "w2"):
        scene.register(name)
        _look(scene, name)
    _arrive(scene, "a")
    assert _look(scene, "w1", is_by_choice=True).is_ready
    assert _woken(scene, "w1", "w2") == ["w1 0"]
    assert scene.executor.run(scene.calls.ring("0", incarnations=["w2", "nobody"])) is Verdict.OK
    assert _woken(scene, "w1", "w2") == ["w1 0", "w2 0"]


def test_a_wake_up_is_passed_on_where_something_waits(scene: Scene) -> None:
    scene.register()
    _look(scene, "w1")
    ring = scene.calls.ring("0")
    assert scene.executor.run(ring) is Verdict.OK
    assert _woken(scene, "w1") == []
    scene.register("w2")
    _arrive(scene, "a")
    _look(scene, "w2", is_by_choice=True)
    assert scene.executor.run(ring) is Verdict.OK
    assert _woken(scene, "w1", "w2") == ["w1 0", "w2 0"]


@dataclass
class _Worker:
    """A worker as the loop is: it looks when it is woken, and when it is not ready and something has ended."""

    name: str
    life: int = 0
    stage: str = "0"
    slots: int = 2
    held: list[tuple[str, int]] = field(default_factory=list)
    is_ready: bool = False
    is_alive: bool = False
    heard: str = "0-0"

    @property
    def incarnation(self) -> str:
        return f"{self.name}:{self.life}"


class _Fleet:
    """Workers without any look that nothing caused: what wakes them is all they have."""

    def __init__(self, scene: Scene, rng: random.Random) -> None:
        self.scene, self.rng, self.num_sent = scene, rng, 0
        self.workers = [_Worker(f"w{number}") for number in range(4)]

    def begin(self, worker: _Worker) -> None:
        worker.life += 1
        worker.held, worker.is_alive = [], True
        newest = self.scene.raw.xrevrange(self._bell(worker), count=1)
        worker.heard = newest[0][0].decode() if newest else "0-0"
        self.scene.register(worker.incarnation, worker_id=worker.name)
        self.look(worker)

    def arrive(self) -> None:
        self.num_sent += 1
        _arrive(self.scene, f"r{self.num_sent}", stage=self.rng.choice("01"))

    def look(self, worker: _Worker) -> None:
        """Rounds until nothing is taken or the worker is ready."""
        worker.is_ready = False
        while not worker.is_ready and (room := worker.slots - len(worker.held)) > 0:
            taken = _look(
                self.scene,
                worker.incarnation,
                stage=worker.stage,
                backlog_ms=float(len(worker.held)),
                max_requests=room,
                num_sharers=2,
                is_idle=not worker.held,
            )
            worker.held += [(grant.request_id, grant.epoch) for grant in taken.grants]
            worker.is_ready = taken.is_ready
            if not taken.grants:
                return

    def hear(self, worker: _Worker) -> bool:
        """Whether it was woken; then it has looked."""
        entries = self.scene.raw.xrange(self._bell(worker), f"({worker.heard}", "+")
        if not entries:
            return False
        worker.heard = entries[-1][0].decode()
        leased = [LeasedArrival.parse(values) for _, values in entries if b"e" in values]
        for arrival in [one for one in leased if one.incarnation == worker.incarnation]:
            worker.held.append((arrival.grant.request_id, arrival.grant.epoch))
            if not arrival.is_ready:
                self.look(worker)
        stages = {values[b"s"].decode() for _, values in entries if b"e" not in values}
        if worker.stage in stages and len(worker.held) < worker.slots:
            stages.remove(worker.stage)
            self.look(worker)
        for stage in stages:
            self.scene.executor.run(self.scene.calls.ring(stage))
        return True

    def end_one(self, worker: _Worker) -> None:
        request_id, epoch = worker.held.pop(self.rng.randrange(len(worker.held)))
        assert self.scene.settle(request_id, worker.incarnation, epoch) is Verdict.OK
        if not worker.is_ready:
            self.look(worker)

    def move(self, worker: _Worker) -> None:
        worker.stage = "1" if worker.stage == "0" else "0"
        self.look(worker)

    def leave(self, worker: _Worker) -> None:
        """It dies, whatever it was woken for, or retires."""
        worker.is_alive = worker.is_ready = False
        if self.rng.random() < 0.5:
            self.scene.retire(worker.incarnation)
        else:
            self.scene.lapse(worker.incarnation)

    def step(self) -> None:
        worker = self.rng.choice(self.workers)
        doings = [self.arrive, self.arrive]
        if worker.is_alive:
            doings += [lambda: self.leave(worker), lambda: self.move(worker), lambda: self.hear(worker)]
            doings += [lambda: self.end_one(worker)] * bool(worker.held)
        else:
            doings.append(lambda: self.begin(worker))
        self.rng.choice(doings)()

    def rest(self) -> None:
        """The dead are reaped, and everybody hears what there is to hear."""
        self.scene.reap()
        while any(self.hear(worker) for worker in self.workers if worker.is_alive):
            pass

    def stranded(self) -> list[str]:
        """Stages where something waits beside a worker that has room."""
        return [
            f"{worker.incarnation} of stage {worker.stage}"
            for worker in self.workers
            if worker.is_alive and len(worker.held) < worker.slots and self.scene.raw.zcard(self._queue(worker))
        ]

    def _bell(self, worker: _Worker) -> str:
        return self.scene.keys.wake(private_queue(worker.name))

    def _queue(self, worker: _Worker) -> str:
        return self.scene.keys.queue(worker.stage)


@pytest.mark.parametrize("number", range(12))
def test_nothing_is_stranded_whoever_dies_between_wake_up_and_take(scene: Scene, number: int) -> None:
    """Random histories of workers that nothing but wake-ups sets going: at rest nothing waits beside room."""
    rng = random.Random(f"{SEED} {number}")
    fleet = _Fleet(scene, rng)
    for _ in range(60):
        for _ in range(rng.randint(1, 5)):
            fleet.step()
        fleet.rest()
        assert fleet.stranded() == []
    check(scene)
