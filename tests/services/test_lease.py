"""Who is blamed when a worker stands still: the request that it stands still for, or nobody."""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest

from l4queue import AsyncHandle, RequestStatus
from l4queue.models import RequestState
from l4queue.protocol.calls import Call
from l4queue.protocol.keys import SOLO_STAGE, Keys
from l4queue.protocol.reads import Reads
from tests.protocol.consistency import check
from tests.protocol.scene import Scene
from tests.services.pipeline import Pipeline, open_pipeline, true, until
from tests.services.processes import Processes
from workers.loop.lease import Lease

pytestmark = [pytest.mark.services]
LEASE_S = 1.0
SCRIPT = str(Path(__file__).with_name("slow_workers.py"))


@pytest.fixture
async def pipeline(redis_url: str, namespace: str) -> AsyncIterator[Pipeline]:
    """Dispatcher, upkeep and client in this process."""
    async with open_pipeline(redis_url, namespace, lease_s=LEASE_S) as opened:
        yield opened


@pytest.fixture
def processes(redis_url: str, namespace: str, tmp_path: Path) -> Iterator[Processes]:
    """Workers in processes of their own; slow ones, so that requests run for a while."""
    opened = Processes(
        tmp_path,
        redis_url=redis_url,
        namespace=namespace,
        lease_s=LEASE_S,
        max_running=16,
        engine="emulated",
        emulated_speed=5.0,
        test_pause_s=3 * LEASE_S,
    )
    yield opened
    opened.close()


class Stage:
    """What this test watches."""

    def __init__(self, pipeline: Pipeline, processes: Processes) -> None:
        self.pipeline, self.processes = pipeline, processes
        self.reads = Reads(Keys(pipeline.settings.namespace))

    def start(self, *names: str, **settings: object) -> None:
        for name in names:
            self.processes.start(name, SCRIPT, worker_id=name, **settings)

    async def incarnation(self, worker_id: str) -> str | None:
        found = await self.pipeline.executor.run(self.reads.incarnations())
        return next((name for name, _ in found if name.rpartition(":")[0] == worker_id), None)

    async def held(self, worker_id: str) -> set[str]:
        name = await self.incarnation(worker_id)
        return set() if name is None else await self.pipeline.executor.run(self.reads.held(name))

    async def holds(self, worker_id: str, number: int) -> None:
        async def is_so() -> bool:
            return len(await self.held(worker_id)) >= number

        await until(is_so, timeout_s=300)

    async def is_gone(self, worker_id: str) -> None:
        async def is_so() -> bool:
            return await self.incarnation(worker_id) is None

        await until(is_so, timeout_s=300)

    async def crowd(self, number: int, *, num_tokens: int = 120) -> list[AsyncHandle]:
        enqueue = self.pipeline.client.enqueue
        return [await enqueue(f"crowd {i}", max_tokens=num_tokens, ignore_eos=True) for i in range(number)]

    async def blamed(self, handles: Sequence[AsyncHandle]) -> dict[str, int]:
        records = [await handle.status() for handle in handles]
        return {record.request_id: record.crashes for record in records if record.crashes}

    async def innocent(self, handles: Sequence[AsyncHandle]) -> None:
        """Wait until nothing is blamed on any of these."""

        async def is_so() -> bool:
            return not await self.blamed(handles)

        await until(is_so, timeout_s=300)

    async def lost(self) -> int:
        return int((await self.pipeline.client.overview()).counts.get("requeued_lost", 0))


@pytest.fixture
def stage(pipeline: Pipeline, processes: Processes) -> Stage:
    return Stage(pipeline, processes)


async def _results(handles: Sequence[AsyncHandle]) -> list[RequestStatus]:
    for handle in handles:
        await handle.result(timeout=60)
    return [await handle.status() for handle in handles]


async def test_a_loop_that_stands_still_for_three_leases_loses_nothing(stage: Stage) -> None:
    """The thread keeps the lease: each request is computed once, where it was."""
    stage.start("w0")
    crowd = await stage.crowd(6)
    await stage.holds("w0", 6)
    slow = await stage.pipeline.client.enqueue("P", max_tokens=4, ignore_eos=True)

    records = await _results([*crowd, slow])

    assert "admits P" in stage.processes.log("w0")
    assert [(r.state, r.num_leases, r.crashes) for r in records] == [(RequestState.DONE, 1, 0)] * 7
    assert await stage.lost() == 0


async def test_who_holds_even_the_thread_is_blamed_alone(stage: Stage) -> None:
    """Foreign code that holds the interpreter stops the lease too; back again, the worker tells who it was."""
    stage.start("w0")
    crowd = await stage.crowd(6, num_tokens=400)
    await stage.holds("w0", 6)
    slow = await stage.pipeline.client.enqueue("H", max_tokens=4, ignore_eos=True)

    records = await _results([*crowd, slow])

    assert await stage.lost() == 7
    assert [r.crashes for r in records] == [0] * 6 + [1]
    assert "its loss is blamed on it no longer" in "".join(e.text for e in await crowd[0].explain())


async def test_a_loop_that_never_comes_back_is_given_up_by_its_thread(stage: Stage, scene: Scene) -> None:
    """It blames what is being admitted, gives the others back, and ends the process; after two that is alone."""
    crowd = await stage.crowd(6)
    stage.start("w0", stall_limit_s=3.0)
    await stage.holds("w0", 6)
    poison = await stage.pipeline.client.enqueue("F", max_tokens=4, ignore_eos=True)
    for turn, name in enumerate(("w0", "w1")):
        await stage.is_gone(name)
        await until(lambda count=turn + 1: _crashes(poison, count))  # type: ignore[misc]
        assert await stage.blamed(crowd) == {}
        assert "has stood still" in stage.processes.log(name)
        if name == "w0":
            stage.start("w1", stall_limit_s=3.0)
            await stage.holds("w1", 1)

    assert (await poison.status()).stage == SOLO_STAGE
    assert await stage.lost() == 0
    stage.pipeline.start("w2")  # whose engine takes it
    records = await _results([*crowd, poison])
    assert [r.crashes for r in records] == [0] * 6 + [2]
    check(scene, are_tokens_marked=False)


async def _crashes(handle: AsyncHandle, number: int) -> bool:
    return (await handle.status()).crashes == number


async def test_a_request_that_no_engine_takes_is_blamed_alone(stage: Stage) -> None:
    """Its worker ends by an error that it raised; the others go back without blame."""
    crowd = await stage.crowd(6)
    stage.start("w0")
    await stage.holds("w0", 6)
    poison = await stage.pipeline.client.enqueue("E", max_tokens=4, ignore_eos=True)
    await stage.is_gone("w0")

    assert (await poison.status()).crashes == 1
    assert await stage.blamed(crowd) == {}
    stage.pipeline.start("w2")
    assert [r.crashes for r in await _results([*crowd, poison])] == [0] * 6 + [1]


async def test_six_pauses_beyond_the_lease_leave_no_blame(stage: Stage) -> None:
    """Workers are stopped in turn until others have their work: nobody has died, nobody waits to be run alone."""
    stage.start("w0", "w1", "w2")
    crowd = await stage.crowd(40, num_tokens=600)
    for turn in range(6):
        name = f"w{turn % 3}"
        await stage.holds(name, 3)
        stage.processes.send(name, signal.SIGSTOP)
        await stage.is_gone(name)
        stage.processes.send(name, signal.SIGCONT)
        await stage.innocent(crowd)

    assert await stage.lost() >= 6
    assert not (await stage.pipeline.client.overview()).queues.get(SOLO_STAGE)
    for handle in crowd:
        assert all(line.facts.get("to") != SOLO_STAGE for line in await handle.explain())
    await asyncio.gather(*(handle.cancel() for handle in crowd))


async def test_an_idle_worker_renews_so_that_its_lease_lasts_and_a_busy_one_with_its_news(
    redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looks without news cost Redis nothing; what changes is told with the next of them."""
    looks, look = itertools.count(1), Lease._check_progress
    num_looks = 0

    def counted(lease: Lease) -> None:
        nonlocal num_looks
        num_looks = next(looks)
        look(lease)

    monkeypatch.setattr(Lease, "_check_progress", counted)
    async with open_pipeline(redis_url, namespace, lease_s=600.0) as pipeline:
        pipeline.start("w0")

        async def num_renewals() -> int:
            found = await pipeline.executor.run(Reads(Keys(namespace)).incarnations())
            call = Call(None, (), ("HGET", Keys(namespace).worker(found[0][0]), "seq"), int)
            return await pipeline.executor.run(call)

        await until(lambda: true(num_looks >= 2))
        before, num_before = await num_renewals(), num_looks
        await until(lambda: true(num_looks >= num_before + 3))
        assert await num_renewals() == before
        handle = await pipeline.client.enqueue("hello", max_tokens=4, ignore_eos=True)
        await handle.result(timeout=120)

        async def is_told() -> bool:
            return [load.num_finished for load in (await pipeline.client.overview()).workers] == [1]

        await until(is_told, timeout_s=120)
