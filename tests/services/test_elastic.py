"""Workers that stop, die, leave and join under load, in real processes; dispatcher and planner that are dead."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from l4queue.models import TERMINAL, Plan
from l4queue.observe.overview import Overview, read_overview_async
from l4queue.plan_json import plan_from_json
from l4queue.protocol.calls import Call
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.keys import Keys
from l4queue.protocol.reads import Reads
from tests.chaos.storm import WORKERS, Storm, open_storm
from tests.chaos.verdict import judge
from tests.conftest import SEED

pytestmark = [
    pytest.mark.services,
    pytest.mark.timeout(600),
]
STOPPED_S = float(os.environ.get("L4_TEST_STOPPED_S", "4"))  # 20 for a lease of 5 s
PERIOD_S = 1.0


async def _until(condition: Callable[[], Awaitable[bool]], what: str, *, timeout_s: float = 120) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while not await condition():  # noqa: ASYNC110 - the state is in Redis, nobody signals it
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s} s: {what}") from None


async def _held(executor: AsyncExecutor, reads: Reads, worker_id: str) -> set[str]:
    """Ids of what this worker runs."""
    found: set[str] = set()
    for name, _ in await executor.run(reads.incarnations()):
        if name.rpartition(":")[0] == worker_id:
            args = ("SMEMBERS", reads.keys.held(name))
            found |= await executor.run(Call(None, (), args, lambda reply: {m.decode() for m in reply}))
    return found


async def _counts(executor: AsyncExecutor, reads: Reads) -> dict[str, int]:
    return {name: int(float(value)) for name, value in (await executor.run(reads.counts())).items()}


async def _overview(executor: AsyncExecutor, namespace: str) -> Overview:
    return await read_overview_async(executor, namespace)


async def _waiting(executor: AsyncExecutor, namespace: str, *, at_least: int = 0, at_most: int = 10**9) -> bool:
    queues = (await _overview(executor, namespace)).queues.values()
    return at_least <= sum(queue.num_requests for queue in queues) <= at_most


async def _is_drained(executor: AsyncExecutor, namespace: str) -> bool:
    seen = await _overview(executor, namespace)
    is_idle = len(seen.workers) == 3 and all(worker.num_running == 0 for worker in seen.workers)
    return is_idle and all(queue.num_requests == 0 for queue in seen.queues.values())


async def _are_gone(storm: Storm, *names: str) -> bool:
    return not storm.nursery.pids.keys() & set(names)


async def test_the_work_of_a_stopped_worker_goes_on_elsewhere(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    """SIGSTOP for four leases under load; when it wakes, nothing that it still holds counts."""
    async with open_storm(redis_url, namespace=namespace, folder=tmp_path, seed=SEED) as (storm, executor, reads):
        storm.cast(settings={"lease_s": STOPPED_S / 4}, is_quiet=True)
        await storm.launch(*WORKERS, "d0", "p0", "c0", "c1")

        async def is_busy() -> bool:
            return len(await _held(executor, reads, "w0")) >= 3

        await _until(is_busy, "w0 runs something")
        storm.nursery.send("w0", signal.SIGSTOP)
        had = await _held(executor, reads, "w0")
        before = {i: await executor.run(reads.record(i)) for i in had}
        await asyncio.sleep(STOPPED_S)

        async def goes_on() -> bool:
            for request_id, old in before.items():
                now = await executor.run(reads.record(request_id))
                assert now is not None
                assert old is not None
                if now.state not in TERMINAL and (now.epoch == old.epoch or now.offset <= old.offset):
                    return False
            return True

        await _until(goes_on, "all that w0 had has gone on without it")
        assert await _held(executor, reads, "w0") == set()
        storm.nursery.send("w0", signal.SIGCONT)
        await _until(is_busy, "w0 is back and works")

        async def has_handed_over() -> bool:
            return int((await executor.run(reads.counts())).get("handovers", 0)) > 0

        await _until(has_handed_over, "a request has been handed over")
        await storm.calm()
        verdict = judge(storm, redis_url, namespace)
    assert verdict.errors == ()
    assert verdict.num_resumed >= 1
    assert verdict.moves["handovers"] > 0


async def test_work_moves_without_dispatcher_and_planner(redis_url: str, namespace: str, tmp_path: Path) -> None:
    """They route and plan, then they are dead: workers serve, hand over, steal and even bury each other alone."""
    async with open_storm(redis_url, namespace=namespace, folder=tmp_path, seed=SEED) as (storm, executor, reads):
        storm.cast(settings={"lease_s": 1.0}, most=120, is_quiet=True)
        await storm.launch("c0", "c1")
        alone = Counter[str]()  # what happened while there was neither dispatcher nor planner
        for number in range(8):
            await storm.launch("d0", "p0")
            await _until(lambda: _waiting(executor, namespace, at_least=100), "requests wait in their stages")
            storm.kill("d0", "p0")
            await _until(lambda: _are_gone(storm, "d0", "p0"), "both are dead")
            before = await _counts(executor, reads)
            if number == 0:
                await storm.launch(*WORKERS)
            await _until(lambda: _waiting(executor, namespace, at_most=30), "they serve")
            if number == 0:
                storm.kill("w1")
            await _until(lambda: _is_drained(executor, namespace), "all is served that was routed")
            alone += Counter(await _counts(executor, reads)) - Counter(before)
            if alone["handovers"] and alone["steals_waiting"]:
                break
        await storm.launch("d0")
        await storm.calm()
        verdict = judge(storm, redis_url, namespace)
    assert verdict.errors == ()
    assert min(alone["handovers"], alone["steals_waiting"], alone["done"]) > 0


async def test_workers_join_and_leave_under_load(redis_url: str, namespace: str, tmp_path: Path) -> None:
    """By SIGTERM, by SIGKILL, one more, two more: each time the plan fits after at most two rounds of planning."""
    settings = {"lease_s": 1.0, "replan_interval_s": PERIOD_S, "plan_min_life_s": 5 * PERIOD_S}
    async with open_storm(redis_url, namespace=namespace, folder=tmp_path, seed=SEED) as (storm, executor, reads):
        storm.cast(settings=settings, is_quiet=True)
        await storm.launch("w0", "w1", "d0", "r0", "c0", "c1")
        deployed = _Deployment(storm, executor, reads)
        await deployed.fits({"w0", "w1"})
        await storm.launch("w2")
        assert await deployed.fits({"w0", "w1", "w2"}) <= 2
        await storm.leave("w0")
        assert await deployed.fits({"w1", "w2"}) <= 2
        storm.kill("w1")
        assert await deployed.fits({"w2"}) <= 2
        await storm.launch("w0", "w3")
        assert await deployed.fits({"w0", "w2", "w3"}) <= 2
        await deployed.works("w0", "w2", "w3")
        await storm.calm()
        verdict = judge(storm, redis_url, namespace)
    assert verdict.errors == ()
    assert verdict.num_resumed > 0


class _Deployment:
    """Watches how a plan follows the workers."""

    def __init__(self, storm: Storm, executor: AsyncExecutor, reads: Reads) -> None:
        self._storm = storm
        self._executor = executor
        self._reads = reads

    async def fits(self, alive: set[str]) -> int:
        """Wait until the plan has exactly these workers; rounds of planning from when they were registered."""

        async def is_known() -> bool:
            names = await self._executor.run(self._reads.incarnations())
            return {name.rpartition(":")[0] for name, _ in names} == alive

        await _until(is_known, f"{alive} are registered, and nobody else")
        before = await self._rounds()

        async def has_followed() -> bool:
            plan = await self._plan()
            return {i for stage in plan.stages for i in stage.worker_ids} == alive

        await _until(has_followed, f"a plan for {alive}")
        return await self._rounds() - before

    async def works(self, *names: str) -> None:
        """Wait until each of these runs something, in the stage that the plan gives it."""
        for name in names:

            async def is_at_it(name: str = name) -> bool:
                seen = await read_overview_async(self._executor, self._reads.keys.namespace)
                found = [w for w in seen.workers if w.worker_id == name and w.num_running]
                return any(w.stage == seen.plan.stage_of_worker(name) for w in found)

            await _until(is_at_it, f"{name} works in its stage")

    async def _plan(self) -> Plan:
        version, body = await self._executor.run(self._reads.plan())
        return plan_from_json(body) if body is not None and version else Plan.one_stage()

    async def _rounds(self) -> int:
        args = ("XLEN", Keys(self._reads.keys.namespace).decisions)
        return await self._executor.run(Call(None, (), args, int))
