"""The thread that keeps a lease: while the loop answers; and what it does when the loop does not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from l4queue.config import Settings
from l4queue.models import RequestState
from l4queue.protocol.keys import SOLO_STAGE
from tests.protocol.consistency import check
from tests.protocol.scene import Scene
from tests.services.pipeline import true, until
from workers.engine.loop_work import LoopWork
from workers.loop.lease_thread import LeaseThread

pytestmark = pytest.mark.services


def _keeper(
    scene: Scene,
    worker: str,
    work: LoopWork,
    *,
    on_lost: Callable[[], None] = lambda: None,
    renewed_s: Callable[[], float] = lambda: 0.0,
    **over: float,
) -> LeaseThread:
    values = {"lease_s": 0.6, "stall_limit_s": 0.6, **over}
    settings = Settings(redis_url=scene.executor.url, namespace=scene.keys.namespace, **values)  # type: ignore[arg-type]
    return LeaseThread(
        settings=settings,
        calls=scene.calls,
        incarnation=lambda: worker,
        renewed_s=renewed_s,
        work=work,
        on_lost=on_lost,
    )


async def test_a_lease_is_kept_until_it_is_let_go(scene: Scene) -> None:
    """Extended again and again; afterwards it runs out. One that was reaped is told to the loop."""
    lost = threading.Event()
    scene.register(lease_ms=600)
    keeper = _keeper(scene, "w1", LoopWork(), on_lost=lost.set, stall_limit_s=60.0)

    def expires_ms() -> int:
        return dict(scene.executor.run(scene.reads.incarnations()))["w1"]

    before_ms = expires_ms()
    keeper.start()
    for _ in range(3):
        await until(lambda least_ms=before_ms: true(expires_ms() > least_ms))  # type: ignore[misc]
        before_ms = expires_ms()
    scene.lapse()
    scene.retire()
    await until(lambda: true(lost.is_set()))
    keeper.stop()
    keeper.stop()


async def test_a_lease_that_the_loop_renews_is_left_alone(scene: Scene) -> None:
    """Half a lease has to pass without a renewal. Beside it another thread extends its own lease three times."""
    scene.register("w1", lease_ms=600)
    scene.register("w2", lease_ms=600)
    renewed = _keeper(scene, "w1", LoopWork(), renewed_s=time.monotonic, stall_limit_s=60.0)
    extended = _keeper(scene, "w2", LoopWork(), stall_limit_s=60.0)

    def expires_ms(worker: str) -> int:
        return dict(scene.executor.run(scene.reads.incarnations()))[worker]

    w1_ms, w2_ms = expires_ms("w1"), expires_ms("w2")
    renewed.start()
    extended.start()
    for _ in range(3):
        await until(lambda least_ms=w2_ms: true(expires_ms("w2") > least_ms))  # type: ignore[misc]
        w2_ms = expires_ms("w2")
    assert expires_ms("w1") == w1_ms
    renewed.stop()
    extended.stop()


async def test_all_workers_of_a_process_give_up_before_it_ends(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their loop stands still for a request of one: that one is blamed, the others' requests are not."""
    at_end: list[dict[str, int]] = []
    ended = threading.Event()

    def end() -> None:
        at_end.append({name: scene_at_end.record(name).crashes for name in "abcd"})
        if len(at_end) == 2:
            ended.set()

    scene_at_end = Scene(scene.executor, scene.keys.namespace)
    monkeypatch.setattr("workers.loop.lease_thread.end_process", end)
    for name in "abcd":
        scene.submit(name)
        scene.route(name)
    works = {"w1": LoopWork(), "w2": LoopWork()}
    keepers = []
    for worker, work in works.items():
        scene.register(worker)
        scene.take(worker, max_requests=2)
        keepers.append(_keeper(scene, worker, work))
    suspect = sorted(scene.executor.run(scene.reads.held("w1")))[0]
    for keeper in keepers:
        keeper.start()
    with works["w1"].on(f"{suspect}:1"):
        assert ended.wait(30)  # this blocks the loop

    expected = {name: int(name == suspect) for name in "abcd"}
    assert at_end == [expected, expected], "the process does not end before all have given up"
    assert {scene.state(name) for name in "abcd"} == {RequestState.QUEUED}
    assert scene.waiting(SOLO_STAGE) == []
    assert scene.executor.run(scene.reads.incarnations()) == []
    check(scene)
    scene_at_end.close()
