"""What is published has the fields that release 913e1db reads, and no others where it refuses them."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import redis

from dispatcher.planner.rounds import replan_once
from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost
from l4queue.models import StagePlan
from l4queue.policy.steal import Ask
from l4queue.protocol.keys import Keys
from l4queue.protocol.parsing import price_to_json
from tests.services.pipeline import open_pipeline, true, until

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

LOAD = {
    "worker_id",
    "incarnation",
    "stage",
    "num_running",
    "num_waiting_in_engine",
    "context_tokens",
    "pending_prefill_tokens",
    "kv_used_tokens",
    "kv_capacity_tokens",
    "max_running",
    "step_ms",
    "tokens_per_s",
    "is_draining",
    "engine",
    "num_finished",
    "num_preemptions",
}
COST = {
    "alpha_ms",
    "beta_ms",
    "gamma_ms",
    "pi_ms",
    "psi_ms",
    "sigma_ms",
    "kv_capacity_tokens",
    "max_batched_tokens",
    "max_num_seqs",
}
PRICE = {"bandwidth_bytes_per_s", "kv_bytes_per_token", "fixed_ms"}
ASK = {"worker_id", "room_tokens", "num_slots", "num_running", "context_tokens"}
PLAN = {"version", "stages", "reason", "created_ms", "objective", "objective_one_stage", "routing", "details"}
STAGE = {"low_tokens", "high_tokens", "num_workers", "worker_ids"}
MEMORY = {
    "at_ms",
    "raw",
    "counts",
    "counts_s",
    "since",
    "since_s",
    "decided",
    "decided_s",
    "noise",
    "begun_s",
    "mix_begun_s",
}
BODY = {"params", "priority", "metadata", "traceparent"}


async def test_values_that_an_older_release_reads_strictly_keep_their_fields(
    redis_url: str, namespace: str
) -> None:
    """Loads, costs, prices, plans, the planner's memory, bodies: as they lie in Redis."""
    keys, raw = Keys(namespace), redis.Redis.from_url(redis_url)
    async with open_pipeline(redis_url, namespace, lease_s=5.0) as opened:
        opened.start("a", speed=1.0)
        handle = await opened.client.enqueue(
            "hello", max_tokens=900, ignore_eos=True, priority=1, metadata={"a": 1}
        )
        await opened.running("a")
        idle = opened.start("b", speed=1.0)
        await opened.publish(
            StagePlan(low_tokens=0, high_tokens=500, num_workers=1, worker_ids=("a",)),
            StagePlan(low_tokens=500, high_tokens=None, num_workers=1, worker_ids=("b",)),
        )
        await until(lambda: true(idle.placement.plan.version == 1), timeout_s=120)
        await replan_once(opened.settings)
        told = json.loads(raw.hget(keys.worker(idle.lease.incarnation), "load"))
        plan = json.loads(raw.hget(keys.plan, "body"))
        memory = json.loads(raw.get(keys.memory))
        body = json.loads(raw.hget(keys.request(handle.id), "body"))
        await handle.cancel()
    raw.close()

    assert told["load"].keys() == LOAD
    assert {"load", "cost", "price"} <= told.keys()
    assert told["cost"] is None or told["cost"].keys() == COST
    assert told["price"].keys() == PRICE
    assert plan.keys() == PLAN
    assert plan["stages"][0].keys() == STAGE
    assert memory.keys() == MEMORY
    assert body.keys() <= BODY


def test_a_message_and_a_cost_keep_their_fields() -> None:
    """They are made of these values whole; a new field of theirs would end a worker of that release."""
    assert {field.name for field in fields(Ask)} == ASK
    assert {field.name for field in fields(StepCost)} == COST
    assert price_to_json(MovePrice(room_bytes=7)).keys() == PRICE
