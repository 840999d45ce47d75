"""Writes bench/results/reproduction.md and its figures: every policy on every trace, several loads, ablations.

    python bench/reproduction.py [--jobs 2] [--results DIR] [--out FILE] [--img docs/img]

Traces are read from the folder in L4_SHARED_DIR (default ../shared), below `traces`; without it only the synthetic
workloads are run. Each run is kept in DIR under a hash of its settings and of the code, so that a report that is
cut off goes on where it was, and nothing old is taken for new. L4_REPRODUCTION_GPU names other coefficients than
those of "h100".
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reproduction_cases import GPU, MODEL, NUM_INSTANCES, PAPER, Results, Spec, capacity, code_version, shared
from reproduction_grid import LOADS, SHOWN, SWEEP, Grid
from reproduction_text import Report

from l4queue.sim.plots import require_matplotlib

HEAD = """# Reproduction: the tables

Every policy on every window, as `python bench/reproduction.py` measured it in the simulator.
[docs/reproduction.md](../../docs/reproduction.md) explains the terms and discusses the results.
"""


def plot(grid: Grid, results: Results, folder: Path) -> None:
    """Mean latency against the rate in the paper's setting, and against the load on long-tailed traffic."""
    plt = require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    rate = capacity(PAPER, 0.0)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for name in SHOWN:
        runs = [results[Spec(case=PAPER, load=load, policy=name)] for load in SWEEP]
        x = [load * rate for load in SWEEP]
        axes[0].plot(x, [r.mean_e2e_s for r in runs], marker=".", label=name)
        axes[1].plot(x, [r.p99_e2e_s for r in runs], marker=".", label=name)
    for axis, what in zip(axes, ("mean", "p99"), strict=True):
        axis.set(xlabel="requests per second on 16 engines", ylabel=f"{what} end to end, s")
    finish(plt, figure, axes, folder / "reproduction-rate.png")
    loads = sorted((0.85, *LOADS))
    figure, drawn = plt.subplots(1, len(grid.tailed), figsize=(4.2 * len(grid.tailed), 4), squeeze=False)
    for axis, window in zip(drawn[0], grid.tailed, strict=True):
        for name in SHOWN:
            runs = [results[Spec(case=window.case, load=load, policy=name)] for load in loads]
            axis.plot(loads, [r.mean_e2e_s for r in runs], marker=".", label=name)
        axis.set(xlabel="load", ylabel="mean end to end, s", title=window.case)
    finish(plt, figure, drawn[0], folder / "reproduction-load.png")


def finish(plt: Any, figure: Any, axes: Sequence[Any], path: Path) -> None:
    """Grid, legend, file."""
    for axis in axes:
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    """Run what is missing and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", type=Path, default=Path("build/reproduction"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/reproduction.md"))
    parser.add_argument("--img", type=Path, default=Path("docs/img"))
    parser.add_argument("--available", action="store_true", help="run nothing: report on the runs that are there")
    given = parser.parse_args()
    results = Results(given.results)
    grid = Grid(is_real=shared().is_dir())
    wanted = list(dict.fromkeys(grid.specs()))
    if given.available:
        grid.restricted(results)
    else:
        results.fill(grid.specs(), jobs=given.jobs)
        results.fill(grid.hindsight(results), jobs=given.jobs)
    done = sum(results.has([spec]) for spec in wanted)
    if done == len(wanted):
        plot(grid, results, given.img)
    made = (
        f"Made by `python bench/reproduction.py` on {datetime.now(UTC):%Y-%m-%d}, Python "
        f"{platform.python_version()}, code {code_version('l4')}, {done} of {len(wanted)} runs; "
        f"{NUM_INSTANCES} × {GPU}, {MODEL}; hand-over by KV transfer at 50 GB/s unless it says otherwise. "
        "All figures are simulated."
    )
    img = os.path.relpath(given.img, given.out.parent) if done == len(wanted) else None
    body = "\n".join(Report(grid, results).lines(img))
    given.out.write_text(f"{HEAD}\n{made}\n\n{body}\n", "utf-8")


if __name__ == "__main__":
    main()
