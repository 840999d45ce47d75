"""How soon the ranges follow traffic whose mix turns over, by simulation: few long prompts, many, few again.

    python bench/flip.py [--instances 2,16] [--load 0.8] [--duration 240] [--seeds 3]

The trace is `bench serve --workload flip` at a rate that loads the instances (Llama-3.1-8B on H100) so far that
they have something to gain. For each part: planning periods until the ranges are about those of a deployment that
has seen nothing but that part, `-` where that is not reached; and the mean latency of what arrives in the first
third of it, and in the rest, beside that of the other deployment.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from math import log2

import numpy as np

from l4queue.cli.bench.traffic import bench_trace
from l4queue.cost.coefficients import read_coefficients
from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost
from l4queue.models import Plan
from l4queue.sim.capacity import capacity_rps
from l4queue.sim.policies.l4 import L4, L4Options
from l4queue.sim.registry import make_policy
from l4queue.sim.runner import Run, RunConfig, run_policy
from l4queue.sim.traces.trace import Trace

GPU, MODEL = "h100", "llama-3.1-8b"
PARTS = 3


def part_of(trace: Trace, index: int, third_s: float) -> Trace:
    """One of the three parts, from its first arrival on."""
    low, high = np.searchsorted(trace.arrival_s, [index * third_s, (index + 1) * third_s])
    part = trace.select(slice(int(low), int(high)))
    return Trace(
        name=f"part {index}",
        arrival_s=part.arrival_s - part.arrival_s[0],
        input_tokens=part.input_tokens,
        output_tokens=part.output_tokens,
    )


def is_like(plan: Plan, wanted: Plan, num_instances: int) -> bool:
    """Whether as many stages have about the same boundaries, and workers within an eighth of the fleet."""
    if len(plan.stages) != len(wanted.stages):
        return False
    spare = max(1, num_instances // 8) if num_instances > 2 else 0
    pairs = list(zip(plan.stages, wanted.stages, strict=True))
    return all(abs(log2(a.low_tokens / b.low_tokens)) <= 0.5 for a, b in pairs[1:]) and all(
        abs(a.num_workers - b.num_workers) <= spare for a, b in pairs
    )


def slowed(cost: StepCost, factor: float) -> StepCost:
    """An engine with slower steps, by this factor: a small one, with fewer requests a period."""
    names = ("alpha_ms", "beta_ms", "gamma_ms", "pi_ms", "psi_ms", "sigma_ms")
    return replace(cost, **{name: getattr(cost, name) * factor for name in names})


def l4_run(trace: Trace, setting: RunConfig) -> Run:
    """l4 with its defaults."""
    return run_policy(make_policy("l4", trace=trace, setting=setting), trace, setting)


def follow(num_instances: int, *, slower: float, load: float, duration_s: float, seed: int) -> list[str]:
    """One row for each part."""
    coefficients = read_coefficients(GPU, MODEL)
    price = MovePrice(bandwidth_bytes_per_s=50e9, kv_bytes_per_token=coefficients.kv_bytes_per_token)
    cost = slowed(coefficients.cost, slower)
    setting = RunConfig(cost=cost, num_instances=num_instances, price=price)
    third_s = duration_s / PARTS
    probe = bench_trace(None, "flip", rate=50.0, duration_s=600.0, seed=seed)
    rates = [
        load
        * capacity_rps(part_of(probe, i, 200.0), cost, num_instances=num_instances)
        / part_of(probe, i, 200.0).rate_rps
        * 50.0
        for i in range(PARTS)
    ]
    trace = bench_trace(None, "flip", rate=min(rates), duration_s=duration_s, seed=seed)
    whole = l4_run(trace, setting)
    policy = whole.policy
    assert isinstance(policy, L4)
    rows = []
    for index in range(PARTS):
        alone = l4_run(part_of(trace, index, third_s), setting)
        assert isinstance(alone.policy, L4)
        begin_s, end_s = index * third_s, (index + 1) * third_s
        after = [
            whole.measured.e2e_s[(whole.measured.arrival_s >= a) & (whole.measured.arrival_s < b)].mean()
            for a, b in ((begin_s, begin_s + third_s / 3), (begin_s + third_s / 3, end_s))
        ]
        wanted = alone.policy.plans[-1][1]
        in_force = [p for p in policy.plans if p[0] < begin_s][-1:]
        seen = [*in_force, *(p for p in policy.plans if begin_s <= p[0] < end_s)]
        right = next(
            (max(0.0, at_s - begin_s) for at_s, plan in seen if is_like(plan, wanted, num_instances)), None
        )
        periods = "-" if right is None else f"{right / L4Options().replan_s:.1f}"
        told = " → ".join(_told(plan) for _, plan in seen[:6])
        rows.append(
            f"| {num_instances} | {seed} | {index + 1} | {trace.rate_rps:.0f} | {periods} | {after[0]:.2f} "
            f"| {after[1]:.2f} | {alone.measured.e2e_s.mean():.2f} | {_told(wanted)} | {told} |"
        )
    return rows


def _told(plan: Plan) -> str:
    return "/".join(f"{s.low_tokens}×{s.num_workers}" for s in plan.stages)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", default="2,16")
    parser.add_argument("--slower", default="20,1", help="times an H100's step time, for each of these fleets")
    parser.add_argument("--load", type=float, default=0.8)
    parser.add_argument("--duration", type=float, default=240.0)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args(arguments)
    print(
        "| instances | seed | part | requests/s | periods | first third, s | rest, s | alone, s | wanted | plans |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for number, slower in zip(given.instances.split(","), given.slower.split(","), strict=True):
        for seed in range(given.seeds):
            rows = follow(int(number), slower=float(slower), load=given.load, duration_s=given.duration, seed=seed)
            print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
