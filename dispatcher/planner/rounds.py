"""Planning and refinement rounds: read the deployment, ask the pure policy, publish by compare-and-set."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace

from dispatcher.planner.recent import GUESSED_FROM, recorded, repeated_share, replay_of
from l4queue.compat import object_of, value_of
from l4queue.config import Settings
from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost
from l4queue.errors import UnreadableValue
from l4queue.models import Plan, Routing
from l4queue.observe.overview import (
    Overview,
    cost_in_force,
    longest_request_tokens,
    price_in_force,
    read_overview_async,
)
from l4queue.plan_json import plan_to_json, split_of
from l4queue.planning.histogram import Buckets, Counts, difference, merge
from l4queue.planning.partition import PartitionProblem
from l4queue.planning.planner import Decision, PlannerSettings, Snapshot, expected_demand
from l4queue.planning.refine import refine
from l4queue.planning.shadow import decide, first_guess, may_guess, why_settled
from l4queue.planning.steady_state import Objective, PartitionSettings
from l4queue.planning.traffic_change import Learned, Noise, is_early_round, learn, with_decision, work_ms
from l4queue.protocol.calls import Calls, Verdict
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.foreign import report
from l4queue.protocol.keys import Keys
from l4queue.protocol.reads import FinishedRequest, Reads
from l4queue.protocol.upkeep import Upkeep
from l4queue.sim.records import MAX_ARRIVALS

__all__ = ("refine_once", "replan_once")

log = logging.getLogger("l4queue.planner")
_BACKLOG_SAMPLE = 1000
"""Waiting requests of a queue whose lengths are read. Chosen: the rest is scaled from these; each costs a read."""
_RETRY_S = 10.0
"""How long a round tries again when Redis is away, s: the default period of rounds, then the next one begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Memory:
    """Memory of a planner's last round: the counters then, and all that it had learned.

    Counters are fields as in Redis; `decided` is None while nothing has been decided on a replay.
    """

    at_ms: int
    raw: dict[str, int]
    counts: dict[str, int]
    counts_s: float
    since: dict[str, int]
    since_s: float
    decided: dict[str, int] | None
    decided_s: float
    noise: tuple[float, float]
    begun_s: float
    mix_begun_s: float

    @classmethod
    def parse(cls, text: str | None, *, key: str = "") -> _Memory | None:
        """None where nothing is remembered, or only what another release would understand."""
        if text is None:
            return None
        try:
            return value_of(cls, object_of(text, what="memory"), what="memory", signed=True)
        except UnreadableValue as error:
            report(key, error, text.encode(errors="replace"))
            return None

    @classmethod
    def of(cls, learned: Learned, *, raw: dict[str, int], at_ms: int) -> _Memory:
        decided = learned.decided
        return cls(
            at_ms=at_ms,
            raw=raw,
            counts=learned.counts.to_fields(),
            counts_s=learned.counts.observed_s,
            since=learned.since.to_fields(),
            since_s=learned.since.observed_s,
            decided=None if decided is None else decided.to_fields(),
            decided_s=0.0 if decided is None else decided.observed_s,
            noise=(learned.noise.statistic, learned.noise.degrees),
            begun_s=learned.begun_s,
            mix_begun_s=learned.mix_begun_s,
        )

    def learned(self, buckets: Buckets) -> Learned:
        """The inverse of `of`."""
        statistic, degrees = self.noise
        read = Counts.from_fields
        return Learned(
            counts=read(buckets, self.counts, observed_s=self.counts_s),
            since=read(buckets, self.since, observed_s=self.since_s),
            decided=None if self.decided is None else read(buckets, self.decided, observed_s=self.decided_s),
            noise=Noise(statistic=statistic, degrees=degrees),
            begun_s=self.begun_s,
            mix_begun_s=self.mix_begun_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """Demand as known now; `is_early`: planning should not wait for its next round."""

    learned: Learned
    raw: dict[str, int]
    buckets: Buckets
    cost: StepCost
    price: MovePrice
    is_early: bool


async def replan_once(settings: Settings) -> str:
    """Keep the plan or publish a better one; returns the planner's reason. Safe to run twice at once."""
    return await _with_executor(settings, _replan)


async def refine_once(settings: Settings) -> str:
    """Nudge the boundaries of the plan where that pays; returns the reason. Safe to run twice at once."""
    return await _with_executor(settings, _refine)


async def _with_executor(settings: Settings, work: Callable[[AsyncExecutor, Settings], Awaitable[str]]) -> str:
    executor = AsyncExecutor(settings.redis_url, retry_s=_RETRY_S, says_outages=True)
    try:
        return await work(executor, settings)
    finally:
        await executor.close()


async def _look(executor: AsyncExecutor, settings: Settings) -> Overview:
    """The deployment, each worker once: one that started again has two leases until the first runs out."""
    overview = await read_overview_async(executor, settings.namespace)
    workers = {load.worker_id: load for load in overview.workers}
    return replace(overview, workers=tuple(workers.values()))


async def _replan(executor: AsyncExecutor, settings: Settings) -> str:
    keys = Keys(settings.namespace)
    reads, calls = Reads(keys), Calls(keys)
    overview = await _look(executor, settings)
    if overview.has_unreadable_plan:
        return await _replace_unreadable(executor, settings, overview)
    if overview.plan.routing is not Routing.L4:
        return f"routing is {overview.plan.routing}: nothing to plan"
    known = await _learn(executor, settings, overview)
    snapshot, learned = await _snapshot(executor, settings, overview, known), known.learned
    settled = why_settled(snapshot, _planner_settings(settings, known.price), learned)
    if settings.prefix_affinity == "true":
        decision = _without_stages(overview)
    elif settings.prefix_affinity == "false" and overview.plan.prefix_affinity:
        decision = _without_affinity(overview)
    elif settled is not None:
        decision = Decision(publish=False, plan=overview.plan, reason=settled)
    else:
        recent = await executor.run(reads.finished(count=MAX_ARRIVALS))
        decision, learned = await asyncio.to_thread(_decide, snapshot, settings, recent, known)
    memory = _Memory.of(learned, raw=known.raw, at_ms=overview.now_ms)
    await executor.run_many([calls.remember(json.dumps(asdict(memory))), calls.log_decision(_log_line(decision))])
    if not decision.publish:
        return decision.reason
    return await _publish(executor, settings, decision.plan, replaces=overview.plan.version)


async def _refine(executor: AsyncExecutor, settings: Settings) -> str:
    overview = await _look(executor, settings)
    plan = overview.plan
    if plan.routing is not Routing.L4 or overview.has_unreadable_plan:
        return f"routing is {plan.routing}, or of another release: nothing to refine"
    known = await _learn(executor, settings, overview)
    if known.is_early:
        return await _replan(executor, settings)
    guess = await _guess(executor, settings, overview, known)
    if guess is not None:
        await executor.run(Calls(Keys(settings.namespace)).log_decision(_log_line(guess)))
        return await _publish(executor, settings, guess.plan, replaces=plan.version)
    if len(plan.stages) < 2 or known.learned.counts.observed_s <= 0.0:
        return "nothing to refine"
    if sum(len(stage.worker_ids) for stage in plan.stages) != len(overview.workers):
        return "workers come or go: the planner's turn"
    problem = PartitionProblem(
        expected_demand(await _snapshot(executor, settings, overview, known)),
        len(overview.workers),
        buckets=known.buckets,
        cost=known.cost,
        settings=_planner_settings(settings, known.price).partition,
    )
    refined = refine(plan, problem)
    if refined.plan is None:
        return refined.reason
    # created_ms stays that of the plan it refines: nudging must not put off the planner
    new = replace(refined.plan, reason=f"refined: {refined.reason}")
    return await _publish(executor, settings, new, replaces=plan.version)


async def _guess(
    executor: AsyncExecutor, settings: Settings, overview: Overview, known: _Known
) -> Decision | None:
    """Prefix affinity for new traffic as soon as it is told how much comes again, not only at the next round."""
    plan, loads, learned = overview.plan, overview.workers, known.learned
    is_found = settings.prefix_affinity == "auto" and any(load.num_cached_tokens for load in loads)
    if not is_found or not may_guess(plan, loads, learned):
        return None
    finished = await executor.run(Reads(Keys(settings.namespace)).finished(count=GUESSED_FROM))
    share = repeated_share(recorded(finished, settings=settings, loads=loads), learned)
    return first_guess(plan, loads, learned, repeated_share=share, now_ms=overview.now_ms)


async def _replace_unreadable(executor: AsyncExecutor, settings: Settings, overview: Overview) -> str:
    """Publish the latest readable plan anew; that of a newer release stays, for its own planner to change."""
    if overview.has_newer_plan:
        return f"plan {overview.plan_version} is of a newer release: nothing to plan"
    version = max(overview.plan.version, overview.plan_version) + 1
    new = replace(overview.plan, version=version, reason="the plan in force could not be read")
    return await _publish(executor, settings, new, replaces=overview.plan_version)


async def _publish(executor: AsyncExecutor, settings: Settings, new: Plan, *, replaces: int) -> str:
    """Publish by compare-and-set; what waits goes to the stages of its lengths by the new plan."""
    calls = Calls(Keys(settings.namespace))
    call = calls.publish(expected_version=replaces, version=new.version, body=plan_to_json(new))
    if await executor.run(call) is Verdict.STALE:
        return "another planner was first"
    await Upkeep(settings=settings, executor=executor).reroute(new)
    log.info("plan %d: %s", new.version, new.reason)
    return f"plan {new.version}: {new.reason}"


async def _learn(executor: AsyncExecutor, settings: Settings, overview: Overview) -> _Known:
    """Add what the counters gained since the last round of planning to what was remembered then."""
    reads = Reads(Keys(settings.namespace))
    fields, remembered = await executor.run_many([reads.histogram(), reads.planner_memory()])
    raw = {name: int(float(value)) for name, value in fields.items()}
    memory = _Memory.parse(remembered, key=reads.keys.memory)
    buckets = Buckets.log_spaced(longest_request_tokens(overview, settings))
    cost = cost_in_force(overview, settings)
    now_s = overview.now_ms / 1000
    if memory is None:
        before, gained = Learned.nothing(buckets, now_s=now_s), Counts.zero(buckets)
    else:
        elapsed_s = max(0.0, (overview.now_ms - memory.at_ms) / 1000)
        then = Counts.from_fields(buckets, memory.raw)
        before = memory.learned(buckets)
        begun_s, mix_begun_s = (min(at_s, now_s) for at_s in (before.begun_s, before.mix_begun_s))
        before = replace(before, begun_s=begun_s, mix_begun_s=mix_begun_s)  # the clock may have gone back
        gained = difference(Counts.from_fields(buckets, raw), then, elapsed_s=elapsed_s)
    num_unfinished = sum(load.num_running for load in overview.workers)
    num_unfinished += sum(queue.num_requests for queue in overview.queues.values())
    work = work_ms(merge(before.counts, gained), buckets=buckets, cost=cost)
    return _Known(
        learned=learn(before, gained, now_s=now_s, half_life_s=settings.demand_half_life_s, work=work),
        raw=raw,
        buckets=buckets,
        cost=cost,
        price=price_in_force(overview),
        is_early=is_early_round(before, gained, num_unfinished=num_unfinished, work=work),
    )


async def _snapshot(executor: AsyncExecutor, settings: Settings, overview: Overview, known: _Known) -> Snapshot:
    """Snapshot of the deployment for the planner."""
    return Snapshot(
        now_ms=overview.now_ms,
        plan=overview.plan,
        loads=overview.workers,
        demand=known.learned.counts.demand(),
        backlog=await _backlog(executor, settings, overview, known.buckets),
        cost=known.cost,
        buckets=known.buckets,
        changed_ms=round(known.learned.begun_s * 1000),
    )


def _planner_settings(settings: Settings, price: MovePrice) -> PlannerSettings:
    partition = PartitionSettings(
        objective=Objective(settings.objective),
        slo_ttft_ms=settings.slo_ttft_ms,
        slo_tpot_ms=settings.slo_tpot_ms,
        move_price=price,
        moves_requests=settings.hand_over,
    )
    return PlannerSettings.of(settings, partition=partition)


def _without_stages(overview: Overview) -> Decision:
    """One stage: requests go by what workers hold of them (docs/prefix-affinity.md)."""
    plan, reason = overview.plan, "prefix affinity: stages are left out"
    if not plan.prefix_affinity:
        one = Plan.one_stage(version=plan.version + 1, num_workers=len(overview.workers), reason=reason)
        plan = replace(one, prefix_affinity=True, created_ms=overview.now_ms)
    return Decision(publish=plan is not overview.plan, plan=plan, reason=reason)


def _without_affinity(overview: Overview) -> Decision:
    """The same plan without prefix affinity, which the settings switch off; stages come with the next rounds."""
    plan, reason = overview.plan, "prefix affinity is switched off"
    new = replace(plan, version=plan.version + 1, prefix_affinity=False, reason=reason, details={})
    return Decision(publish=True, plan=new, reason=reason)


def _decide(
    snapshot: Snapshot, settings: Settings, finished: Sequence[FinishedRequest], known: _Known
) -> tuple[Decision, Learned]:
    """By the closed form; what it proposes is published only if a replay of recent traffic agrees.

    Where no replay can tell yet, prefix affinity is guessed if much comes again.
    """
    learned, planning = known.learned, _planner_settings(settings, known.price)
    recent = recorded(finished, settings=settings, loads=snapshot.loads)
    replay = replay_of(recent, snapshot, settings, learned=learned, price=known.price)
    if replay is not None:
        return decide(snapshot, planning, replay, learned=learned), with_decision(learned)
    share, now_ms = repeated_share(recent, learned), snapshot.now_ms
    guess = first_guess(snapshot.plan, snapshot.loads, learned, repeated_share=share, now_ms=now_ms)
    return guess or decide(snapshot, planning, None, learned=learned), learned


async def _backlog(
    executor: AsyncExecutor, settings: Settings, overview: Overview, buckets: Buckets
) -> tuple[tuple[int, int], ...]:
    """Waiting requests by length bucket; long queues are sampled from their head."""
    reads = Reads(Keys(settings.namespace))
    stages = [stage for stage, queue in overview.queues.items() if queue.num_requests]
    ids = await executor.run_many([reads.queue_ids(stage, limit=_BACKLOG_SAMPLE) for stage in stages])
    found: dict[int, float] = {}
    for stage, some in zip(stages, ids, strict=True):
        lengths: Sequence[int | None] = await executor.run_many([reads.prompt_tokens(i) for i in some])
        weight = overview.queues[stage].num_requests / max(1, len(some))
        for length in lengths:
            if length is not None:
                bucket = buckets.index(length)
                found[bucket] = found.get(bucket, 0.0) + weight
    return tuple(sorted((bucket, round(number)) for bucket, number in found.items()))


def _log_line(decision: Decision) -> str:
    considered = [
        {
            **split_of(candidate.stages, prefix_affinity=candidate.prefix_affinity),
            "objective": candidate.objective if candidate.objective < float("inf") else None,
            "scored": candidate.scored,
            "moves": candidate.num_moves,
            "is_current": candidate.is_current,
        }
        for candidate in decision.candidates
    ]
    return json.dumps({"publish": decision.publish, "reason": decision.reason, "candidates": considered})
