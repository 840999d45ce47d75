"""The deployment's state as Prometheus metric families. Counters live in Redis and so outlive every process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from l4queue.config import Settings
from l4queue.metrics import Families, Labels, Tally, Values
from l4queue.models import TERMINAL, Plan, WorkerLoad
from l4queue.observe.overview import Overview
from l4queue.observe.telemetry import Telemetry
from l4queue.planning.histogram import Buckets
from l4queue.policy.autoscale import FleetDemand, demand_of
from l4queue.protocol.keys import is_private_queue
from l4queue.protocol.ledger import REQUEUES, MoveCounter, ResumeCounter, requeue_counter

__all__ = ("describe",)

_STAGE = ("stage",)
_PERSONAL = "worker"


def describe(
    families: Families, telemetry: Telemetry, settings: Settings, *, last_known: FleetDemand | None
) -> FleetDemand:
    """Add everything to the families. Without workers demand is measured by the last ones known."""
    overview = telemetry.overview
    _plan(families, overview, telemetry.planned_ms)
    _queues(families, telemetry)
    _backlog(families, overview, settings)
    _workers(families, overview)
    _totals(families, overview.counts)
    _lengths(families, telemetry.histogram, settings)
    families.gauge("dead_letters", "Dead letters kept for people to see", {(): telemetry.num_dead_letters})
    memory = telemetry.memory
    families.gauge("redis_memory_used_bytes", "Memory of the Redis server", {(): memory.used_bytes})
    families.gauge("redis_memory_limit_bytes", "Its limit; 0: none", {(): memory.limit_bytes})
    return _demand(families, telemetry, last_known)


def _plan(families: Families, overview: Overview, planned_ms: int | None) -> None:
    plan = overview.plan
    lows: Values = {(str(i),): float(stage.low_tokens) for i, stage in enumerate(plan.stages)}
    highs: Values = {(str(i),): float(stage.high_tokens or "inf") for i, stage in enumerate(plan.stages)}
    planned: Values = {(str(i),): float(stage.num_workers) for i, stage in enumerate(plan.stages)}
    families.gauge("plan_version", "Version of the plan in force", {(): plan.version})
    families.gauge("plan_stages", "Stages of the plan in force", {(): len(plan.stages)})
    families.gauge("plan_low_tokens", "Shortest length of a stage", lows, labels=_STAGE)
    families.gauge("plan_high_tokens", "Length at which the next stage begins", highs, labels=_STAGE)
    families.gauge("plan_workers", "Workers that the plan gives a stage", planned, labels=_STAGE)
    if planned_ms is not None:
        families.gauge(
            "planner_last_round_timestamp_seconds", "When a round of planning ended last", {(): planned_ms / 1000}
        )


def _queues(families: Families, telemetry: Telemetry) -> None:
    overview = telemetry.overview
    known = [str(i) for i in range(len(overview.plan.stages))]
    queues = overview.queues
    requests = _by_stage(known, {name: queue.num_requests for name, queue in queues.items()})
    tokens = _by_stage(known, {name: queue.tokens for name, queue in queues.items()})
    ages: dict[Labels, float] = {(name,): 0.0 for name in known}
    for name, age_s in telemetry.waiting_s.items():
        which = (_PERSONAL if is_private_queue(name) else name,)
        ages[which] = max(age_s, ages.get(which, 0.0))
    families.gauge("inbox_requests", "Accepted and not yet routed", {(): overview.inbox})
    families.gauge("inbox_oldest_age_seconds", "Age of the oldest of them", {(): telemetry.inbox_age_s})
    families.gauge(
        "queue_requests", "Waiting requests; stage worker: for one worker alone", requests, labels=_STAGE
    )
    families.gauge("queue_tokens", "Tokens of the waiting requests", tokens, labels=_STAGE)
    families.gauge(
        "queue_oldest_age_seconds", "Age of the oldest among the first 100 in serving order", ages, labels=_STAGE
    )


def _by_stage(known: Iterable[str], values: Mapping[str, float]) -> Values:
    """By stage; the own queues of workers are one, since their names come and go without end."""
    sums: dict[Labels, float] = {(name,): 0.0 for name in known}
    for name, value in values.items():
        which = (_PERSONAL if is_private_queue(name) else name,)
        sums[which] = sums.get(which, 0.0) + value
    return sums


def _backlog(families: Families, overview: Overview, settings: Settings) -> None:
    counts = overview.counts
    families.gauge("unfinished_requests", "Accepted and not finished", {(): counts.get("live", 0)})
    families.gauge(
        "unfinished_tokens", "Prompt and most output tokens of those", {(): counts.get("live_tokens", 0)}
    )
    families.gauge("unfinished_bytes", "Memory of Redis for those", {(): counts.get("live_bytes", 0)})
    families.gauge("unfinished_limit_tokens", "Beyond it requests are rejected", {(): settings.max_backlog_tokens})
    families.gauge("unfinished_limit_bytes", "Beyond it requests are rejected", {(): settings.max_backlog_bytes})
    families.gauge("result_bytes", "Memory of Redis for what has ended", {(): counts.get("result_bytes", 0)})
    families.gauge("result_limit_bytes", "Beyond it results go early", {(): settings.max_result_bytes})


def _workers(families: Families, overview: Overview) -> None:
    """Sums by stage; what one worker does is in its own metrics."""
    loads: dict[str, list[WorkerLoad]] = {str(i): [] for i in range(len(overview.plan.stages))}
    for worker in overview.workers:
        loads.setdefault(_stage_of(overview.plan, worker), []).append(worker)

    def add(name: str, meaning: str, value: Mapping[str, float]) -> None:
        values: Values = {(stage,): v for stage, v in value.items()}
        families.gauge(name, meaning, values, labels=_STAGE)

    def sums(field: str) -> dict[str, float]:
        return {stage: sum(getattr(one, field) for one in some) for stage, some in loads.items()}

    add("workers", "Workers with a valid lease", {stage: len(some) for stage, some in loads.items()})
    add("running_requests", "Requests in the engines", sums("num_running"))
    add("running_limit_requests", "Most requests in the engines", sums("max_running"))
    add("running_tokens", "Context tokens of the running requests", sums("context_tokens"))
    add("kv_used_tokens", "KV cache in use", sums("kv_used_tokens"))
    add("kv_capacity_tokens", "KV cache of the engines", sums("kv_capacity_tokens"))


def _stage_of(plan: Plan, worker: WorkerLoad) -> str:
    known = plan.stage_of_worker(worker.worker_id)
    return str(worker.stage if known is None else known)


def _totals(families: Families, counts: Mapping[str, int]) -> None:
    def total(name: str) -> Values:
        return {(): counts.get(name, 0)}

    ended: Values = {(state.value,): float(counts.get(state.value, 0)) for state in sorted(TERMINAL)}
    requeued: Values = {(why.value,): float(counts.get(requeue_counter(why), 0)) for why in REQUEUES}
    steals: Values = {
        ("waiting",): float(counts.get(MoveCounter.STEALS_WAITING, 0)),
        ("running",): float(counts.get(MoveCounter.STEALS_RUNNING, 0)),
    }
    gap_s = counts.get(ResumeCounter.GAP_MS, 0) / 1000
    gaps: dict[Labels, tuple[int, float]] = {(): (counts.get(ResumeCounter.RESUMES, 0), gap_s)}
    families.counter("requests_accepted", "Requests accepted", total("submitted"))
    families.counter("requests_rejected", "Requests that met a full backlog", total("rejected"))
    families.counter("requests_finished", "Requests by how they ended", ended, labels=("state",))
    families.counter(
        "requests_requeued",
        "Running requests that went back to a queue and were computed again from where they were; hand-overs and "
        "steals are counted apart",
        requeued,
        labels=("reason",),
    )
    families.counter("steals", "Requests that an idle worker took over", steals, labels=("kind",))
    families.counter(
        "handovers", "Running requests that outgrew a stage or left a prefill", total(MoveCounter.HANDOVERS)
    )
    families.summary("resume_gap_seconds", "For how long a moved request made no token", gaps)
    families.counter("results_dropped", "Results that went early for want of room", total("results_dropped"))
    families.counter("repairs", "Records mended; each is an alarm", total("repairs"))
    families.counter("unreadable", "Values in Redis that nobody of ours could read; an alarm", total("unreadable"))
    families.counter("output_tokens", "Tokens of finished requests", total("output_tokens"))


def _lengths(families: Families, histogram: Mapping[str, int], settings: Settings) -> None:
    """The length counters of the planner, in octaves."""
    edges = Buckets.log_spaced(settings.max_model_len).edges
    # powers of two are edges of the planner's buckets, so a bucket lies on one side of each bound
    prompts = Tally([2**k - 1 for k in range(4, 31) if 2**k < settings.max_model_len])
    for name, value in histogram.items():
        kind, _, bucket = name.partition(":")
        if kind == "a" and bucket.isdecimal():
            prompts.add(edges[min(int(bucket), len(edges) - 1)], number=value)
    prompts.total = _sum(histogram, "p:")
    generated = _sum(histogram, "d:")
    families.histogram("prompt_length_tokens", "Prompt lengths of routed requests", {(): prompts})
    families.counter("generated_tokens", "Tokens generated, also of unfinished requests", {(): generated})


def _demand(families: Families, telemetry: Telemetry, last_known: FleetDemand | None) -> FleetDemand:
    overview, histogram = telemetry.overview, telemetry.histogram
    mean_prompt_tokens = _sum(histogram, "p:") / max(1, _sum(histogram, "a:"))
    queues = overview.queues.values()
    demand = demand_of(
        overview.workers,
        queued_tokens=sum(queue.tokens for queue in queues) + overview.inbox * mean_prompt_tokens,
        queued_requests=sum(queue.num_requests for queue in queues) + overview.inbox,
    )
    families.gauge("demand_tokens", "Queued and running tokens", {(): demand.tokens})
    families.gauge("demand_requests", "Queued and running requests", {(): demand.requests})
    families.gauge("capacity_tokens", "KV cache of the workers that stay", {(): demand.capacity_tokens})
    families.gauge("capacity_requests", "Slots of the workers that stay", {(): demand.capacity_requests})
    families.gauge("demand_workers", "Workers that demand would fill", {(): demand.workers(last_known=last_known)})
    if demand.ratio is not None:
        families.gauge(
            "demand_ratio", "Demand over capacity, in tokens or requests: the scarcer", {(): demand.ratio}
        )
    return demand


def _sum(histogram: Mapping[str, int], kind: str) -> int:
    return sum(value for name, value in histogram.items() if name.startswith(kind))
