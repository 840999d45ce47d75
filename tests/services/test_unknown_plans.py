"""A plan that this release cannot read: everybody goes by the one before, and an alarm is raised."""

from __future__ import annotations

import json

import pytest
import redis

from dispatcher.planner.rounds import refine_once, replan_once
from l4queue.models import StagePlan
from l4queue.observe.health import planner_idle_s
from l4queue.protocol.executor import Executor
from l4queue.protocol.keys import Keys
from tests.services.pipeline import open_pipeline, true, until

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

STAGES = (
    StagePlan(low_tokens=0, high_tokens=40, num_workers=1, worker_ids=("a",)),
    StagePlan(low_tokens=40, high_tokens=None, num_workers=1, worker_ids=("b",)),
)
NEWER = {
    "a higher version": {"v": 2},
    "another routing": {"routing": "by-moonlight"},
}
BROKEN = {
    "no JSON": b"nonsense",
    "no plan": b"{}",
    "a hole": json.dumps(
        {"version": 2, "stages": [{"low_tokens": 5, "high_tokens": None, "num_workers": 1}]}
    ).encode(),
}


async def _check(redis_url: str, namespace: str, body: bytes) -> tuple[int, str]:
    """Publish such a plan as version 2 over another one; the version in the end, and the planner's word."""
    keys, raw = Keys(namespace), redis.Redis.from_url(redis_url)
    async with open_pipeline(redis_url, namespace, lease_s=5.0) as opened:
        workers = [opened.start("a"), opened.start("b")]
        await opened.publish(*STAGES)
        await until(lambda: true(all(one.placement.plan.version == 1 for one in workers)))
        raw.hset(keys.plan, mapping={"version": 2, "body": body})
        raw.xadd(keys.plans, {"version": 2, "body": body})

        handles = [await opened.client.enqueue("x" * length, max_tokens=2) for length in (5, 200)]
        served = [(await handle.result()).worker for handle in handles]
        overview = await opened.client.overview()
        assert set(served) <= {"a", "b"}
        assert all(one.placement.plan.version == 1 for one in workers)
        assert overview.plan.stages == STAGES
        assert (overview.plan_version, overview.has_unreadable_plan) == (2, True)
        assert any(letter.request_id in ("plan", "plans") for letter in await opened.client.dead_letters())
        assert int(raw.hget(keys.counts, "unreadable")) >= 1
        await refine_once(opened.settings)
        said = await replan_once(opened.settings)
        version = int(raw.hget(keys.plan, "version"))
        await until(
            lambda: true(all(one.placement.plan.version == (version if version > 2 else 1) for one in workers))
        )
        assert workers[0].placement.plan.stages == STAGES
    raw.close()
    return version, said


@pytest.mark.parametrize("change", NEWER)
async def test_a_plan_of_a_newer_release_is_left_to_its_planner(
    redis_url: str, namespace: str, change: str
) -> None:
    """Ours rests, and its health is good; workers and dispatchers keep theirs."""
    stages = [{"low_tokens": 0, "high_tokens": None, "num_workers": 2, "worker_ids": ["a", "b"]}]
    body = json.dumps({"version": 2, "stages": stages} | NEWER[change]).encode()

    version, said = await _check(redis_url, namespace, body)

    assert version == 2
    assert "newer release" in said
    executor = Executor(redis_url)
    assert planner_idle_s(executor, namespace) == 0.0
    executor.close()


@pytest.mark.parametrize("kind", BROKEN)
async def test_a_broken_plan_is_replaced_by_the_last_one_that_can_be_read(
    redis_url: str, namespace: str, kind: str
) -> None:
    """Under a version that everybody takes for new."""
    version, said = await _check(redis_url, namespace, BROKEN[kind])

    assert version == 3
    assert "could not be read" in said
