"""Capacity: the traffic a fleet can carry, and the instances a service level needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l4queue.cost.step import StepCost
from l4queue.errors import ConfigError
from l4queue.policy.loads import request_work_ms
from l4queue.sim.cluster import Cluster
from l4queue.sim.policies.central import Central
from l4queue.sim.results import SimResult
from l4queue.sim.traces.trace import Trace

__all__ = ("Bound", "capacity_rps", "find_instances", "meets", "parse_slo", "trace_work_ms")

PROBE_INSTANCES = 4
"""Engines of the run that measures a capacity. Chosen: the result is scaled to any number, and four even out
chance."""
PROBE_REQUESTS = 6000
"""Most requests of that run. Chosen: enough to fill the engines; more take longer."""


def trace_work_ms(trace: Trace, cost: StepCost) -> NDArray[np.float64]:
    """Engine time that each request adds to a saturated engine, ms: the prefill gives its first token."""
    return np.array(
        [
            request_work_ms(prompt_tokens, expected_output_tokens=output_tokens - 1, cost=cost)
            for prompt_tokens, output_tokens in zip(
                trace.input_tokens.tolist(), trace.output_tokens.tolist(), strict=True
            )
        ],
        dtype=np.float64,
    )


def capacity_rps(trace: Trace, cost: StepCost, *, num_instances: int) -> float:
    """Request rate at which the fleet saturates on this traffic, requests per second.

    Measured, not modelled: an even sample of the trace is offered all at once to a few instances that pull
    from one FCFS queue (no length-blind policy keeps engines busier), and the work finished between a
    quarter of the queue and its end is divided by the time that took. Scaled to the fleet and to the mean work
    of the whole trace. Ramp-up and drain are left out, so short traces are repeated to fill the engines.
    """
    count = min(PROBE_REQUESTS, max(len(trace), 3 * PROBE_INSTANCES * cost.max_num_seqs))
    rows = np.linspace(0, len(trace) - 1, count).astype(np.int64)
    rows = np.random.default_rng(0).permutation(rows)
    probe = trace.select(rows)
    work_ms = trace_work_ms(probe, cost)
    offered = Trace(
        name=trace.name,
        arrival_s=np.zeros(count),
        input_tokens=probe.input_tokens,
        output_tokens=probe.output_tokens,
    )
    requests = offered.requests()
    marks: list[float] = []
    quarter = count - count // 4

    def watch(cluster: Cluster) -> None:
        queued = cluster.policy.num_queued
        if cluster.num_arrived == count and (
            (queued <= quarter and not marks) or (not queued and len(marks) == 1)
        ):
            marks.append(cluster.now_s)

    rng = np.random.default_rng(0)
    cluster = Cluster(requests, cost=cost, num_instances=PROBE_INSTANCES, policy=Central(), rng=rng, observe=watch)
    cluster.run()
    marks.append(cluster.now_s)
    first_s, last_s = marks[0], marks[1]
    done_ms = 0.0
    for request, request_ms in zip(requests, work_ms.tolist(), strict=True):
        assert request.finish_s is not None
        assert request.first_token_s is not None
        prefill_ms = cost.prefill_ms(request.prompt_tokens)
        done_ms += _overlap(request.first_token_s, request.finish_s, first_s, last_s) * (request_ms - prefill_ms)
        done_ms += prefill_ms if first_s < request.first_token_s <= last_s else 0.0
    work_per_s = done_ms / (last_s - first_s) * num_instances / PROBE_INSTANCES
    return work_per_s / float(trace_work_ms(trace, cost).mean())


def _overlap(start_s: float, end_s: float, from_s: float, to_s: float) -> float:
    """Share of [start, end] within [from, to]."""
    if end_s <= start_s:
        return 1.0 if from_s < end_s <= to_s else 0.0
    return max(0.0, min(end_s, to_s) - max(start_s, from_s)) / (end_s - start_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """One condition of a service level: a result key below a limit."""

    key: str
    limit: float


SLO_KEYS = frozenset(
    {
        "mean_e2e_s",
        "p50_e2e_s",
        "p95_e2e_s",
        "p99_e2e_s",
        "mean_normalized_latency_s",
        "p50_ttft_s",
        "p99_ttft_s",
        "mean_tpot_s",
        "p99_tpot_s",
    }
)


def parse_slo(text: str) -> tuple[Bound, ...]:
    """Parse "p99_ttft_s<5,p99_tpot_s<0.1"; ConfigError names the part that is wrong."""
    bounds = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*<=?\s*([0-9.eE+-]+)\s*", part)
        if match is None or match[1] not in SLO_KEYS:
            raise ConfigError(
                f"--slo: {part.strip()!r} is not KEY<SECONDS with KEY one of {', '.join(sorted(SLO_KEYS))}"
            )
        try:
            limit = float(match[2])
        except ValueError:
            raise ConfigError(f"--slo: {part.strip()!r}: the limit is not a number") from None
        if not limit > 0:
            raise ConfigError(f"--slo: {part.strip()!r}: the limit must be positive")
        bounds.append(Bound(key=match[1], limit=limit))
    return tuple(bounds)


def meets(result: SimResult, slo: Sequence[Bound]) -> bool:
    """Whether a run keeps every bound; a measure that no request has (TPOT of one token) keeps it."""
    values = [(getattr(result, bound.key), bound.limit) for bound in slo]
    return all(value is None or value < limit for value, limit in values)


def find_instances(
    run: Callable[[int], SimResult], slo: Sequence[Bound], *, most: int = 1024
) -> tuple[int, SimResult] | None:
    """Smallest number of instances whose run keeps the service level, with that run; None above `most`.

    Doubles until it fits, then bisects: assumes that more instances never do worse, which holds for
    every policy here up to the noise of one trace. About 2·log2(n) runs.
    """
    low, high = 0, 1
    best = run(high)
    while not meets(best, slo):
        low, high = high, high * 2
        if high > most:
            return None
        best = run(high)
    while high - low > 1:
        middle = (low + high) // 2
        result = run(middle)
        if meets(result, slo):
            high, best = middle, result
        else:
            low = middle
    return high, best
