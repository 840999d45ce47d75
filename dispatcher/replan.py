"""Rounds of planning and refining: read the deployment, ask the pure policy, publish by compare-and-set."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace

from l4queue.config import Settings
from l4queue.models import Plan, RequestState, Routing
from l4queue.planner import Decision, PlannerSettings, Snapshot, expected_demand
from l4queue.policy.histogram import Buckets, Counts, difference, merge
from l4queue.policy.partition import PartitionProblem
from l4queue.policy.plan_json import plan_to_json, split_of
from l4queue.policy.refine import refine
from l4queue.protocol.calls import Calls, Verdict
from l4queue.protocol.door import AsyncDoor
from l4queue.protocol.keys import Keys
from l4queue.protocol.overview import Overview, cost_in_force, read_overview_async
from l4queue.protocol.reads import FinishedRequest, Reads
from l4queue.protocol.upkeep import Upkeep
from l4queue.sim.shadow import Arrival, decide, make_scorer

__all__ = ("refine_once", "replan_once")

_BACKLOG_SAMPLE = 1000
_RECENT = 1000  # finished requests that a proposed plan is replayed on


@dataclass(frozen=True, slots=True, kw_only=True)
class _Memory:
    """What a planner remembers from its last round: the counters then, and what it had learned (decayed)."""

    at_ms: int
    raw: dict[str, int]
    learned: dict[str, int]
    observed_s: float

    @classmethod
    def parse(cls, text: str | None) -> _Memory | None:
        return None if text is None else cls(**json.loads(text))


async def replan_once(settings: Settings) -> str:
    """Keep the plan or publish a better one; returns the planner's reason. Safe to run twice at once."""
    return await _with_door(settings, _replan)


async def refine_once(settings: Settings) -> str:
    """Nudge the boundaries of the plan where that pays; returns the reason. Safe to run twice at once."""
    return await _with_door(settings, _refine)


async def _with_door(settings: Settings, work: Callable[[AsyncDoor, Settings], Awaitable[str]]) -> str:
    door = AsyncDoor(settings.redis_url)
    try:
        return await work(door, settings)
    finally:
        await door.close()


async def _replan(door: AsyncDoor, settings: Settings) -> str:
    keys = Keys(settings.namespace)
    reads, calls = Reads(keys), Calls(keys)
    overview = await read_overview_async(door, settings.namespace)
    if overview.plan.routing is not Routing.L4:
        return f"routing is {overview.plan.routing}: nothing to plan"
    snapshot, memory = await _observe(door, settings, overview)
    recent = await door.run(reads.finished(count=_RECENT))
    decision = await asyncio.to_thread(_decide, snapshot, settings, recent)
    await door.run_many([calls.remember(json.dumps(asdict(memory))), calls.log_decision(_log_line(decision))])
    if not decision.publish:
        return decision.reason
    return await _publish(door, settings, decision.plan, replaces=overview.plan)


async def _refine(door: AsyncDoor, settings: Settings) -> str:
    overview = await read_overview_async(door, settings.namespace)
    plan = overview.plan
    if plan.routing is not Routing.L4 or len(plan.stages) < 2:
        return "nothing to refine"
    if sum(len(stage.worker_ids) for stage in plan.stages) != len(overview.workers):
        return "workers come or go: the planner's turn"
    snapshot, memory = await _observe(door, settings, overview)
    if memory.observed_s <= 0.0:
        return "nothing seen yet"
    problem = PartitionProblem(
        expected_demand(snapshot),
        len(overview.workers),
        buckets=snapshot.buckets,
        cost=snapshot.cost,
        settings=PlannerSettings.of(settings).partition,
    )
    refined = refine(plan, problem)
    if refined.plan is None:
        return refined.reason
    # created_ms stays that of the plan it refines: nudging must not put off the planner
    new = replace(refined.plan, reason=f"refined: {refined.reason}")
    return await _publish(door, settings, new, replaces=plan)


async def _publish(door: AsyncDoor, settings: Settings, new: Plan, *, replaces: Plan) -> str:
    """Publish by compare-and-set; what waits goes to the stages of its lengths by the new plan."""
    calls = Calls(Keys(settings.namespace))
    call = calls.publish(expected_version=replaces.version, version=new.version, body=plan_to_json(new))
    if await door.run(call) is Verdict.STALE:
        return "another planner was first"
    await Upkeep(settings=settings, door=door).reroute(new)
    return f"plan {new.version}: {new.reason}"


async def _observe(door: AsyncDoor, settings: Settings, overview: Overview) -> tuple[Snapshot, _Memory]:
    """What the deployment looks like to the planner, and what it is to remember."""
    reads = Reads(Keys(settings.namespace))
    raw, remembered = await door.run_many([reads.histogram(), reads.planner_memory()])
    buckets = Buckets.log_spaced(settings.max_model_len)
    counts, memory = _learn(
        {name: int(value) for name, value in raw.items()},
        _Memory.parse(remembered),
        buckets=buckets,
        now_ms=overview.now_ms,
        half_life_s=settings.demand_half_life_s,
    )
    snapshot = Snapshot(
        now_ms=overview.now_ms,
        plan=overview.plan,
        loads=overview.workers,
        demand=counts.demand(),
        backlog=await _backlog(door, reads, overview, buckets),
        cost=cost_in_force(overview, settings),
        buckets=buckets,
    )
    return snapshot, memory


def _decide(snapshot: Snapshot, settings: Settings, finished: Sequence[FinishedRequest]) -> Decision:
    """By the closed form; what it proposes is published only if a replay of recent traffic agrees."""
    arrivals = [
        Arrival(
            arrival_s=request.submitted_ms / 1000,
            input_tokens=request.prompt_tokens,
            output_tokens=request.output_tokens,
            e2e_s=(request.finished_ms - request.submitted_ms) / 1000,
        )
        for request in finished
        if request.state == RequestState.DONE
    ]
    score = make_scorer(arrivals, cost=snapshot.cost, num_instances=len(snapshot.loads))
    return decide(snapshot, PlannerSettings.of(settings), score)


def _learn(
    raw: dict[str, int], memory: _Memory | None, *, buckets: Buckets, now_ms: int, half_life_s: float
) -> tuple[Counts, _Memory]:
    """Add what the counters gained since the last round to what was learned, after forgetting some of it."""
    now = Counts.from_fields(buckets, raw)
    if memory is None:
        learned = Counts.zero(buckets)
    else:
        elapsed_s = max(0.0, (now_ms - memory.at_ms) / 1000)
        old = Counts.from_fields(buckets, memory.learned, observed_s=memory.observed_s)
        gained = difference(now, Counts.from_fields(buckets, memory.raw), elapsed_s=elapsed_s)
        learned = merge(old.decay(elapsed_s, half_life_s=half_life_s), gained)
    kept = _Memory(at_ms=now_ms, raw=raw, learned=learned.to_fields(), observed_s=learned.observed_s)
    return learned, kept


async def _backlog(
    door: AsyncDoor, reads: Reads, overview: Overview, buckets: Buckets
) -> tuple[tuple[int, int], ...]:
    """Waiting requests by length bucket; long queues are sampled from their head."""
    stages = [stage for stage, queue in overview.queues.items() if queue.num_requests]
    ids = await door.run_many([reads.queue_ids(stage, limit=_BACKLOG_SAMPLE) for stage in stages])
    found: dict[int, float] = {}
    for stage, some in zip(stages, ids, strict=True):
        lengths: Sequence[int | None] = await door.run_many([reads.prompt_tokens(i) for i in some])
        weight = overview.queues[stage].num_requests / max(1, len(some))
        for length in lengths:
            if length is not None:
                bucket = buckets.index(length)
                found[bucket] = found.get(bucket, 0.0) + weight
    return tuple(sorted((bucket, round(number)) for bucket, number in found.items()))


def _log_line(decision: Decision) -> str:
    considered = [
        {
            **split_of(candidate.stages),
            "objective": candidate.objective if candidate.objective < float("inf") else None,
            "scored": candidate.scored,
            "moves": candidate.num_moves,
            "is_current": candidate.is_current,
        }
        for candidate in decision.candidates
    ]
    return json.dumps({"publish": decision.publish, "reason": decision.reason, "candidates": considered})
