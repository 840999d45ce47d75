"""Plots of finished runs. matplotlib is an extra, imported only here and only for a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l4queue.errors import ConfigError
from l4queue.sim.policies.l4 import L4
from l4queue.sim.runner import Run

__all__ = ("plot_runs", "require_matplotlib", "save_figure")

Curves = Mapping[str, Sequence[tuple[float, float]]]


def require_matplotlib() -> Any:
    """matplotlib.pyplot with the file back end; ConfigError says how to install it."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'l4queue[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_runs(directory: Path, runs: Sequence[Run], *, curves: Curves | None = None) -> list[Path]:
    """Write latency CDFs by length class, load per instance, the plans of l4 over time and, given
    `curves` (policy → (load, mean latency s)), latency against load. Returns the files."""
    plt = require_matplotlib()
    directory.mkdir(parents=True, exist_ok=True)
    files = [save_figure(plt, _latency_cdf(plt, runs), directory / "latency_cdf.png")]
    files.append(save_figure(plt, _instance_load(plt, runs), directory / "instance_load.png"))
    for run in runs:
        if isinstance(run.policy, L4):
            files.append(save_figure(plt, _plans(plt, run.policy), directory / "plan_over_time.png"))
    if curves:
        files.append(save_figure(plt, _load_curves(plt, curves), directory / "latency_by_load.png"))
    return files


def save_figure(plt: Any, figure: Any, path: Path) -> Path:
    """Write a figure as PNG and close it; returns the file."""
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _latency_cdf(plt: Any, runs: Sequence[Run]) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for run in runs:
        is_long = run.measured.is_long
        for axis, mask in zip(axes, (~is_long, is_long), strict=True):
            values = np.sort(run.measured.e2e_s[mask])
            if values.size:
                axis.plot(values, np.arange(1, values.size + 1) / values.size, label=run.result.policy)
    for axis, title in zip(axes, ("shorter 95 % of requests", "longest 5 % of requests"), strict=True):
        axis.set(xscale="log", xlabel="end-to-end latency, s", title=title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of requests")
    axes[0].legend()
    return figure


def _instance_load(plt: Any, runs: Sequence[Run]) -> Any:
    figure, axis = plt.subplots(figsize=(8, 4))
    for run in runs:
        axis.plot(range(len(run.busy_share)), run.busy_share, marker=".", label=run.result.policy)
    axis.set(xlabel="instance", ylabel="share of time computing", ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def _plans(plt: Any, policy: L4) -> Any:
    figure, axes = plt.subplots(2, 1, figsize=(8, 6), sharex=True)
    times = [at_s for at_s, _ in policy.plans]
    widest = max(len(plan.stages) for _, plan in policy.plans)
    for index in range(widest):
        workers = [p.stages[index].num_workers if index < len(p.stages) else 0 for _, p in policy.plans]
        axes[1].step([*times, policy.end_s], [*workers, workers[-1]], where="post", label=f"stage {index}")
        edges = [
            float(high) if index < len(p.stages) and (high := p.stages[index].high_tokens) else np.nan
            for _, p in policy.plans
        ]
        if index < widest - 1:
            axes[0].step([*times, policy.end_s], [*edges, edges[-1]], where="post", label=f"edge {index}")
    axes[0].set(ylabel="boundary, tokens")
    if widest > 1:
        axes[0].set_yscale("log")
        axes[0].legend()
    axes[1].set(xlabel="time, s", ylabel="workers")
    axes[1].legend()
    return figure


def _load_curves(plt: Any, curves: Curves) -> Any:
    figure, axis = plt.subplots(figsize=(7, 4))
    for name, points in curves.items():
        axis.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
    axis.set(xlabel="load, share of capacity", ylabel="mean end-to-end latency, s", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure
