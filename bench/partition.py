"""Times the partition search against the number of workers and of buckets, on one core, and plots both.

    python bench/partition.py [--out docs/img/partition-time.png] [--repeats 15]

The time is that of what the planner does: terms of all ranges, then the best split for each number of stages up to
four, from a demand histogram. Traffic: 90 % short (log-normal around 650 tokens), 10 % long (around 8,000).
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np  # after the thread limits, which it reads when it is loaded

from l4queue.cost.coefficients import load_coefficients
from l4queue.planning.histogram import Buckets, Demand
from l4queue.planning.partition import PartitionProblem
from l4queue.planning.steady_state import Objective, PartitionSettings

COST = load_coefficients("h100", "llama-3.1-8b")
TARGETS = ((16, 64, 5.0), (1024, 128, 100.0))


def buckets_of(count: int) -> Buckets:
    """`count` log-spaced buckets from 16 to 131,072 tokens."""
    edges = np.unique(np.round(np.geomspace(16, 131_072, 4 * count)).astype(int))
    picked = edges[np.linspace(0, len(edges) - 1, count - 1).round().astype(int)]
    return Buckets(edges=(0, *(int(e) for e in picked)))


def traffic(buckets: Buckets, *, workers: int, rho: float) -> Demand:
    """Mixed traffic at a utilisation `rho` of one stage."""
    rng = np.random.default_rng(7)
    n = 20_000
    is_long = rng.random(n) < 0.1
    prompts = np.where(is_long, rng.lognormal(9.0, 0.9, n), rng.lognormal(6.5, 1.0, n)).clip(1, 120_000)
    outputs = rng.lognormal(5.2, 0.8, n).clip(1, 4000)
    demand = Demand.of_requests(buckets, prompts.astype(int), outputs.astype(int), duration_s=1000.0)
    problem = PartitionProblem(demand, 10**6, buckets=buckets, cost=COST, settings=PartitionSettings())
    return demand.scaled(rho * workers / float(problem.terms.load[0, -1]))


def times_ms(demand: Demand, workers: int, buckets: Buckets, objective: Objective, *, repeats: int) -> list[float]:
    """Wall-clock times of complete solutions, ms."""
    wanted = PartitionSettings(objective=objective)
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        PartitionProblem(demand, workers, buckets=buckets, cost=COST, settings=wanted).candidates()
        samples.append(1000.0 * (time.perf_counter() - start))
    return samples


def main() -> None:
    """Print medians of the stated sizes for all objectives and loads, then sweep both sizes and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/img/partition-time.png"))
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    print(f"Python {platform.python_version()}, numpy {np.__version__}, {cpu_name()}, one core")
    for workers, count, target in TARGETS:
        buckets = buckets_of(count)
        for rho in (0.3, 0.7, 0.85, 0.95):
            demand = traffic(buckets, workers=workers, rho=rho)
            row = [f"{workers} workers x {count} buckets, load {rho:.2f} (target {target:.0f} ms):"]
            for objective in Objective:
                few = min(args.repeats, 3) if objective is Objective.GOODPUT and workers > 100 else args.repeats
                samples = times_ms(demand, workers, buckets, objective, repeats=few)
                row.append(f"{objective.value} {statistics.median(samples):.1f}")
            print(" ".join(row), flush=True)
    sweep(args.out, repeats=max(3, args.repeats // 3))


def sweep(out: Path, *, repeats: int) -> None:
    """Median time over both sizes with the default objective at 85 % load, as a plot."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    workers = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
    counts = (16, 32, 64, 128)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    table = {}
    for count in counts:
        buckets = buckets_of(count)
        for m in workers:
            demand = traffic(buckets, workers=m, rho=0.85)
            samples = times_ms(demand, m, buckets, Objective.BALANCED, repeats=repeats)
            table[m, count] = statistics.median(samples)
        print(f"{count} buckets:", ", ".join(f"{m}: {table[m, count]:.1f} ms" for m in workers), flush=True)
    for count in counts:
        axes[0].plot(workers, [table[m, count] for m in workers], marker="o", label=f"{count} buckets")
    for m in (4, 16, 64, 256, 1024):
        axes[1].plot(counts, [table[m, c] for c in counts], marker="o", label=f"{m} workers")
    for axis, name in zip(axes, ("workers", "length buckets"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel(name)
        axis.set_ylabel("median time to solve, ms")
        axis.grid(alpha=0.3)
        axis.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    print(f"plot: {out}")


def cpu_name() -> str:
    """Model name of the processor where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


if __name__ == "__main__":
    main()
