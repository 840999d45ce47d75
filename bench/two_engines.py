"""What `l4` can gain on two small engines at any load, by the simulator with the step costs that a run measured.

    l4queue bench serve --engine vllm --workers 2 --workload mixed ... --json > RUN.json
    python bench/two_engines.py RUN.json [RUN.json ...] [--rates 8,10,12,14,16] [--draws 12] [--img DIR]

Each rate and each draw of `mixed` arrivals is simulated under every policy. Printed is `l4` in ratio to round
robin and to the best of the others by mean: medians over the draws, with the costs as measured (those of the first
run) and 10 % above. The plot has the rounds of the runs beside the curves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from l4queue.cli.bench.report import LONG_TOKENS
from l4queue.cli.bench.traffic import bench_trace
from l4queue.cost.fit import COEFFICIENTS
from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost
from l4queue.sim.plots import require_matplotlib, save_figure
from l4queue.sim.registry import make_policy
from l4queue.sim.runner import RunConfig, run_policy
from workers.loop.engine_profile import KV_BYTES_PER_S, KV_FIXED_MS

SIMULATED = {
    "round-robin": "round-robin",
    "least-loaded": "least-requests",
    "central": "central",
    "central-sjf": "central-sjf",
    "l4": "l4",
}
OTHERS = ("least-loaded", "central", "central-sjf")
SLOWER = (1.0, 1.1)
DURATION_S, WARMUP_SHARE = 180.0, 0.15
PRICE = MovePrice(  # the tiny model's KV in float32
    bandwidth_bytes_per_s=KV_BYTES_PER_S, kv_bytes_per_token=4096, fixed_ms=KV_FIXED_MS
)

Figures = dict[str, float]


def simulate(job: tuple[StepCost, float, int]) -> dict[str, Figures]:
    """Every policy under one draw of arrivals."""
    cost, rate, draw = job
    trace = bench_trace(None, "mixed", rate=rate, duration_s=DURATION_S, seed=500 + draw)
    setting = RunConfig(cost=cost, num_instances=2, warmup_share=WARMUP_SHARE, price=PRICE)
    found = {}
    for name, simulated in SIMULATED.items():
        run = run_policy(make_policy(simulated, trace=trace, setting=setting), trace, setting)
        found[name] = {
            "mean": run.result.mean_e2e_s,
            "p99": run.result.p99_e2e_s,
            "long": float(run.measured.e2e_s[run.measured.prompt_tokens >= LONG_TOKENS].mean()),
            "busy": float(np.mean(run.busy_share)),
        }
    return found


def ratios(found: Mapping[str, Figures]) -> Figures:
    """`l4` against round robin, and against the best other by mean."""
    l4, first = found["l4"], found["round-robin"]
    best = min((found[name] for name in OTHERS), key=lambda figures: figures["mean"])
    return {
        "to_round_robin": l4["mean"] / first["mean"],
        "to_best": l4["mean"] / best["mean"],
        "p99_to_best": l4["p99"] / best["p99"],
        "long_to_best": l4["long"] / best["long"],
        "busy": first["busy"],
    }


def slower(cost: StepCost, factor: float) -> StepCost:
    """The same engine on a machine that takes longer for everything."""
    return replace(cost, **{name: getattr(cost, name) * factor for name in COEFFICIENTS})


def live_rounds(runs: Sequence[Mapping[str, Any]]) -> list[tuple[float, Figures]]:
    """Rate and ratios of each round that was measured."""
    found = []
    for run in runs:
        by_policy = {entry["policy"]: entry["rounds"] for entry in run["results"]}
        for number in range(run["setting"]["rounds"]):
            one = {
                name: {
                    "mean": rounds[number]["mean_e2e_s"],
                    "p99": rounds[number]["p99_e2e_s"],
                    "long": rounds[number]["long"]["mean_e2e_s"],
                    "busy": float(np.mean(list(rounds[number]["busy_share"].values()))),
                }
                for name, rounds in by_policy.items()
            }
            found.append((float(run["setting"]["rate_rps"]), ratios(one)))
    return found


def plot(
    directory: Path, curves: Mapping[float, Mapping[float, Figures]], live: list[tuple[float, Figures]]
) -> None:
    """The two ratios over the rate."""
    plt = require_matplotlib()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, key, title, floor in (
        (axes[0], "to_round_robin", "mean to round robin", 0.60),
        (axes[1], "to_best", "mean to the best other", 0.85),
    ):
        for factor, by_rate in curves.items():
            label = "simulated" if factor == 1.0 else f"simulated, {factor - 1:.0%} slower"
            axis.plot(list(by_rate), [figures[key] for figures in by_rate.values()], marker="o", ms=3, label=label)
        axis.plot([rate for rate, _ in live], [figures[key] for _, figures in live], "x", label="measured rounds")
        axis.axhline(floor, ls=":", color="grey")
        axis.set(xlabel="requests per second", title=title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("l4, ratio")
    axes[0].legend()
    print(f"wrote {save_figure(plt, figure, directory / 'results-rates.png')}")


def main() -> None:
    """Simulate, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--rates", default="8,10,12,14,16")
    parser.add_argument("--draws", type=int, default=12)
    parser.add_argument("--img", type=Path)
    given = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in given.runs]
    measured = StepCost(**runs[0]["setting"]["cost_of_a_worker"])
    rates = [float(rate) for rate in given.rates.split(",")]
    jobs = [(slower(measured, f), rate, draw) for f in SLOWER for rate in rates for draw in range(given.draws)]
    with ProcessPoolExecutor() as pool:
        each = [ratios(found) for found in pool.map(simulate, jobs)]
    curves: dict[float, dict[float, Figures]] = {factor: {} for factor in SLOWER}
    print("costs   requests/s  busy   mean to round robin   to the best other: mean    p99   long")
    for number, (factor, rate) in enumerate((factor, rate) for factor in SLOWER for rate in rates):
        part = each[number * given.draws : (number + 1) * given.draws]
        figures = {name: float(np.median([one[name] for one in part])) for name in part[0]}
        curves[factor][rate] = figures
        print(
            f"× {factor:<5.2f} {rate:10.1f} {figures['busy']:5.2f} {figures['to_round_robin']:21.2f} "
            f"{figures['to_best']:24.2f} {figures['p99_to_best']:6.2f} {figures['long_to_best']:6.2f}"
        )
    if given.img is not None:
        plot(given.img, curves, live_rounds(runs))


if __name__ == "__main__":
    main()
