"""Checks the simulator against closed forms, measured vLLM runs and the planner's own predictions.

    python bench/validate_simulator.py [--doc docs/simulator.md] [--img docs/img]

Writes the plots and the block between the `validation` marks of the document. The measured runs are read from
the folder in L4_SHARED_DIR (default ../shared), below `profiles`; without them a note says so.
"""

from __future__ import annotations

import argparse
import os
import platform
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from measured_runs import error, measured_runs

from l4queue.cost.coefficients import read_coefficients
from l4queue.cost.step import StepCost
from l4queue.models import Plan, StagePlan
from l4queue.planning.histogram import Buckets, Demand
from l4queue.planning.partition import Partition, PartitionProblem
from l4queue.planning.steady_state import Objective, PartitionSettings
from l4queue.sim.capacity import capacity_rps
from l4queue.sim.plots import require_matplotlib, save_figure
from l4queue.sim.policies.l4 import L4, L4Options
from l4queue.sim.policies.length_blind import RoundRobin
from l4queue.sim.runner import RunConfig, run_policy
from l4queue.sim.traces.trace import Trace
from l4queue.sim.traces.workload import make_workload

LOADS = (0.3, 0.5, 0.7, 0.8, 0.9)
STAGE_LOADS = (0.5, 0.7, 0.85, 0.95)
BEGIN, END = "<!-- validation: begin -->", "<!-- validation: end -->"


# ---------------------------------------------------------------- closed forms


def poisson(count: int, rate_rps: float, *, prompt: int, output: int, seed: int) -> Trace:
    """Equal requests at Poisson arrivals."""
    arrival = np.cumsum(np.random.default_rng(seed).exponential(1.0 / rate_rps, count))
    ones = np.ones(count, dtype=np.int64)
    return Trace(name="poisson", arrival_s=arrival, input_tokens=prompt * ones, output_tokens=output * ones)


def md1(rho: float) -> tuple[float, float]:
    """Mean latency of one-step requests, one at a time: (simulated, s·(1 + ρ/(2(1-ρ)))), s."""
    service_s = 0.1
    cost = StepCost(alpha_ms=0, beta_ms=0, gamma_ms=0, pi_ms=1.0, psi_ms=0, max_batched_tokens=100, max_num_seqs=1)
    trace = poisson(60_000, rho / service_s, prompt=100, output=1, seed=3)
    run = run_policy(RoundRobin(), trace, RunConfig(cost=cost, num_instances=1))
    return run.result.mean_e2e_s, service_s * (1 + rho / (2 * (1 - rho)))


def sharing(rho: float) -> tuple[float, float]:
    """Mean latency of long decodes that share one engine: (simulated, d·(α+β)/(1-ρ)), s, d decode steps each."""
    cost = StepCost(alpha_ms=2, beta_ms=1, gamma_ms=0, pi_ms=0, psi_ms=0, max_num_seqs=100_000)
    steps, output = 200, 201  # the first token comes with the prefill
    trace = poisson(100_000, rho * 1000.0 / steps, prompt=1, output=output, seed=4)
    run = run_policy(RoundRobin(), trace, RunConfig(cost=cost, num_instances=1, warmup_share=0.1))
    return run.result.mean_e2e_s, steps * 0.003 / (1 - rho)


def closed_forms(plt: object, img: Path) -> list[str]:
    """Table and plot of both."""
    lines = [
        "**Closed forms.** One engine, constant load, Poisson arrivals. One-step requests one at a time are "
        "M/D/1: s·(1 + ρ/(2(1−ρ))). Long decodes of d steps of α + β·n each share the engine at a rate "
        "n/(α + β·n); whatever the law of lengths, the number in flight is negative binomial and the mean latency "
        "d·(α + β)/(1 − ρ).",
        "",
        "| ρ | M/D/1 simulated s | formula s | error | sharing simulated s | formula s | error |",
        "|---|---|---|---|---|---|---|",
    ]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))  # type: ignore[attr-defined]
    found = [(rho, md1(rho), sharing(rho)) for rho in LOADS]
    for rho, one, two in found:
        cells = f"{one[0]:.4f} | {one[1]:.4f} | {error(*one)} | {two[0]:.3f} | {two[1]:.3f} | {error(*two)}"
        lines.append(f"| {rho} | {cells} |")
    for axis, at, title in ((axes[0], 1, "M/D/1"), (axes[1], 2, "processor sharing")):
        axis.plot(LOADS, [row[at][1] for row in found], label="formula")
        axis.plot(LOADS, [row[at][0] for row in found], "o", label="simulated")
        axis.set(xlabel="utilisation ρ", ylabel="mean latency, s", title=title)
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(plt, figure, img / "validation-closed-forms.png")
    return [*lines, "", "![closed forms](img/validation-closed-forms.png)", ""]


# ---------------------------------------------------------------- predicted stages


def stages(plt: object, img: Path) -> list[str]:
    """The planner's closed form for each stage of its own plan beside what the simulation of that plan gives."""
    cost = replace(read_coefficients("h100", "llama-3.1-8b").cost, sigma_ms=0.0)
    count, workers = 12_000, 16
    base = make_workload("mixed", num_requests=count, rng=np.random.default_rng(21))
    capacity = capacity_rps(base, cost, num_instances=workers)
    buckets = Buckets.log_spaced(262_144)
    settings = PartitionSettings(objective=Objective.MEAN, max_stages=2, moves_requests=False)
    lines = [
        "**Predicted and simulated stages.** The closed form of the planner (`l4queue/planning/steady_state.py`) "
        "beside a simulation of the plan that it chose: `mixed` (synthetic, Poisson), Llama-3.1-8B on 16 H100, "
        "two stages, no hand-over, stealing, skew term or replanning. In flight are requests past their first "
        "token; "
        "the first tenth of the requests is left out. The errors are the prediction's. *prefill free*: the "
        "same plan on engines whose prefill takes no time. Up to 70 % load the form is within 4 %. At 85 and "
        "95 % it is a quarter too high, and nearly all of that goes when prefill is free: the wait for prefill is "
        "what it overstates, most of all where a few engines serve few and very long prompts. That is one reason "
        "why plans are replayed before they are published.",
        "",
        "| load | stage | workers | ρ predicted | step ms predicted | simulated | error "
        "| prefill free | in flight predicted | simulated | error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    points: list[tuple[float, float, float]] = []
    for load in STAGE_LOADS:
        trace = base.scaled(load * capacity / base.rate_rps)
        per_request = counts(trace, buckets)
        problem = PartitionProblem(per_request, workers, buckets=buckets, cost=cost, settings=settings)
        chosen = problem.candidates()[-1]
        free = replace(cost, pi_ms=0.0, psi_ms=0.0)
        at_no_prefill = PartitionProblem(per_request, workers, buckets=buckets, cost=free, settings=settings)
        judged = at_no_prefill.judge(
            [s.low_tokens for s in chosen.stages[1:]], [s.num_workers for s in chosen.stages]
        )
        found = simulate(chosen, trace, cost, workers)
        bare = simulate(judged, trace, free, workers)
        for stage, here, without in zip(chosen.stages, found, bare, strict=True):
            predicted, step_ms, in_flight = here
            edge = f"{stage.low_tokens}–{stage.high_tokens or '∞'}"
            lines.append(
                f"| {load:.0%} | {edge} | {stage.num_workers} | {stage.rho:.2f} "
                f"| {predicted[0]:.1f} | {step_ms:.1f} | {error(predicted[0], step_ms)} "
                f"| {error(without[0][0], without[1])} "
                f"| {predicted[1]:.0f} | {in_flight:.0f} | {error(predicted[1], in_flight)} |"
            )
            points.append((stage.rho, predicted[0], step_ms))
    figure, axis = plt.subplots(figsize=(5, 4))  # type: ignore[attr-defined]
    top = max(max(p[1:]) for p in points) * 1.05
    axis.plot([0, top], [0, top], color="grey", lw=1)
    axis.scatter([p[2] for p in points], [p[1] for p in points])
    axis.set(xlabel="simulated time per token, ms", ylabel="predicted, ms")
    axis.grid(alpha=0.3)
    save_figure(plt, figure, img / "validation-stages.png")
    return [*lines, "", "![predicted and simulated step time](img/validation-stages.png)", ""]


def counts(trace: Trace, buckets: Buckets) -> Demand:
    """The demand of the whole trace."""
    duration_s = float(trace.arrival_s[-1])
    return Demand.of_requests(buckets, trace.input_tokens, trace.output_tokens, duration_s=duration_s)


def simulate(
    chosen: Partition, trace: Trace, cost: StepCost, workers: int
) -> list[tuple[tuple[float, float], float, float]]:
    """For each stage ((predicted step ms, in flight), simulated step ms, simulated in flight)."""
    plan = Plan(
        version=1,
        stages=tuple(
            StagePlan(low_tokens=s.low_tokens, high_tokens=s.high_tokens, num_workers=s.num_workers)
            for s in chosen.stages
        ),
    )
    options = L4Options(without=frozenset({"hand-over", "stealing", "refinement", "shadow", "finish-first"}))
    run = run_policy(L4(options, fixed=plan), trace, RunConfig(cost=cost, num_instances=workers, warmup_share=0.1))
    m = run.measured
    # steady state: what falls between the first counted and the last arrival
    start_s, end_s = float(m.arrival_s[0]), float(m.arrival_s[-1])
    decode_s = m.e2e_s - m.ttft_s
    first_s = m.arrival_s + m.ttft_s
    inside_s = np.clip(np.minimum(m.finish_s, end_s) - np.maximum(first_s, start_s), 0.0, None)
    found = []
    for stage in chosen.stages:
        mask = (m.prompt_tokens >= stage.low_tokens) & (m.prompt_tokens < (stage.high_tokens or np.inf))
        step_ms = 1000.0 * float(decode_s[mask].sum() / (m.output_tokens[mask] - 1).sum())
        in_flight = float(inside_s[mask].sum()) / (end_s - start_s)
        found.append(((stage.step_ms, stage.in_flight), step_ms, in_flight))
    return found


# ---------------------------------------------------------------- document


def main() -> None:
    """Run all parts and rewrite the block of the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--doc", type=Path, default=Path("docs/simulator.md"))
    parser.add_argument("--img", type=Path, default=Path("docs/img"))
    given = parser.parse_args()
    plt = require_matplotlib()
    given.img.mkdir(parents=True, exist_ok=True)
    made = f"Made by `python bench/validate_simulator.py` on {datetime.now(UTC):%Y-%m-%d}, "
    made += f"Python {platform.python_version()}."
    lines = [made, "", *closed_forms(plt, given.img)]
    folder = Path(os.environ.get("L4_SHARED_DIR", "../shared")) / "profiles"
    if folder.is_dir():
        lines += measured_runs(plt, given.img, folder)
    else:
        lines += ["The measured runs were not at hand when this was made.", ""]
    lines += stages(plt, given.img)
    text = given.doc.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    given.doc.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
