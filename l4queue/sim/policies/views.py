"""Views of simulated engines and requests for the live system's policy functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from l4queue.models import Plan, WorkerLoad
from l4queue.policy import queue_order
from l4queue.policy.steal import RunningRequest
from l4queue.sim.engine.instance import Instance
from l4queue.sim.engine.request import SimRequest

__all__ = ("load_of", "running_request", "score_of", "with_copies", "with_engines", "worker_id")


def worker_id(instance: Instance) -> str:
    """Name of an engine in plans; names sort as the engines do."""
    return f"{instance.index:04d}"


def load_of(instance: Instance) -> WorkerLoad:
    """The load that the engine's worker would publish."""
    return WorkerLoad(
        worker_id=worker_id(instance),
        stage=instance.stage,
        num_running=instance.num_requests,
        num_waiting_in_engine=instance.num_waiting,
        context_tokens=instance.held_tokens,
        pending_prefill_tokens=instance.pending_tokens,
        kv_used_tokens=instance.kv_used_tokens,
        kv_capacity_tokens=instance.cost.kv_capacity_tokens,
        max_running=instance.cost.max_num_seqs,
    )


def with_copies(load: WorkerLoad, copies_due_ms: float) -> WorkerLoad:
    """The load with the copies of KV caches that are due in its engine."""
    return replace(load, copies_due_ms=copies_due_ms) if copies_due_ms else load


def running_request(
    request: SimRequest,
    length_tokens: int,
    *,
    expected_remaining: Callable[[int], float],
    came_from: str | None = None,
) -> RunningRequest:
    """A decoding request of this length as its worker knows it; ids sort as the arrivals do."""
    return RunningRequest(
        request_id=f"{request.index:08d}",
        length_tokens=length_tokens,
        expected_remaining_tokens=expected_remaining(length_tokens - request.prompt_tokens),
        came_from=came_from,
    )


def score_of(request: SimRequest, *, ageing_tokens_per_s: float) -> float:
    """Place of a request in its stage's queue."""
    return queue_order.score(
        request.arrival_s * 1000.0, request.prompt_tokens, ageing_tokens_per_s=ageing_tokens_per_s
    )


def with_engines(plan: Plan, instances: Sequence[Instance]) -> Plan:
    """The plan with engines assigned in order; one stage takes all."""
    ids = [worker_id(instance) for instance in instances]
    if len(plan.stages) == 1:
        return replace(plan, stages=(replace(plan.stages[0], num_workers=len(ids), worker_ids=tuple(ids)),))
    stages = []
    for stage in plan.stages:
        mine, ids = ids[: stage.num_workers], ids[stage.num_workers :]
        stages.append(replace(stage, worker_ids=tuple(mine)))
    return replace(plan, stages=tuple(stages))
