"""Plots of a run of `bench queue`, from its JSON. matplotlib is an extra, imported only for a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from l4queue.sim.plots import require_matplotlib, save_figure

__all__ = ("plot_queues",)

_KINDS = {
    "redis": "#d62728",
    "dispatcher": "#9467bd",
    "worker": "#1f77b4",
    "client": "#2ca02c",
    "planner": "#7f7f7f",
}
_BAR = 0.38  # height of one of two bars of a queue; 1 is the distance of queues


def plot_queues(directory: Path, found: Mapping[str, Any]) -> list[Path]:
    """Requests/s and CPU time by queue, latencies, and with several sizes of prompts both against the size."""
    plt = require_matplotlib()
    directory.mkdir(parents=True, exist_ok=True)
    sizes = sorted({one["prompt_bytes"] for one in found["queues"]})
    first = [one for one in found["queues"] if one["prompt_bytes"] == sizes[0]]
    files = [save_figure(plt, _work(plt, first), directory / "queue-work.png")]
    if any(one["alone_ms"] for one in first):
        files.append(save_figure(plt, _latencies(plt, first), directory / "queue-latency.png"))
    if len(sizes) > 1:
        files.append(save_figure(plt, _sizes(plt, found), directory / "queue-sizes.png"))
    return files


def _work(plt: Any, queues: Sequence[Mapping[str, Any]]) -> Any:
    """Bars: requests/s with min and max of the rounds; CPU time in parts."""
    figure, (rates, times) = plt.subplots(1, 2, figsize=(10, 0.45 * len(queues) + 1.6), sharey=True)
    names = [one["name"] for one in queues]
    rate = [one["requests_per_s"] for one in queues]
    median = [one["median"] for one in rate]
    reach = [[m - one["min"] for m, one in zip(median, rate, strict=True)]]
    reach.append([one["max"] - m for m, one in zip(median, rate, strict=True)])
    colours = ["#1f77b4" if name.startswith("l4queue") else "#aec7e8" for name in names]
    rates.barh(names, median, xerr=reach, color=colours, capsize=3)
    rates.set(xlabel="requests/s, median, min and max of the rounds")
    left = [0.0] * len(names)
    for kind, colour in _KINDS.items():
        parts = [one["cpu_s_per_1000"].get(kind, {"median": 0.0})["median"] for one in queues]
        if any(parts):
            times.barh(names, parts, left=left, color=colour, label=kind)
        left = [a + b for a, b in zip(left, parts, strict=True)]
    times.set(xlabel="CPU s per 1,000 requests, all processes")
    times.legend(fontsize=8)
    rates.invert_yaxis()
    for axis in (rates, times):
        axis.margins(x=0.05)
        axis.grid(alpha=0.3, axis="x")
    return figure


def _latencies(plt: Any, queues: Sequence[Mapping[str, Any]]) -> Any:
    """From p50 to p99: alone, and at half of the rate."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.45 * len(queues) + 1.6), sharey=True, sharex=True)
    names = [one["name"] for one in queues]
    for axis, field, title in zip(axes, ("alone_ms", "half_ms"), ("alone", "at half of the rate"), strict=True):
        for kind, colour, shift in (("first", "#ff7f0e", -_BAR / 2), ("result", "#1f77b4", _BAR / 2)):
            rows = [(i, one[field][kind]) for i, one in enumerate(queues) if kind in one[field]]
            at = [i + shift for i, _ in rows]
            axis.hlines(at, [q["p50"] for _, q in rows], [q["p99"] for _, q in rows], color=colour, linewidth=4)
            label = "first token" if kind == "first" else "result"
            axis.plot([q["p50"] for _, q in rows], at, "|", color=colour, markersize=11, label=label)
        axis.set(xscale="log", xlabel="ms, from p50 to p99", title=title, yticks=range(len(names)))
        axis.set_yticklabels(names)
        axis.set_ylim(len(names) - 1 + 1.5 * _BAR, -1.5 * _BAR)
        axis.grid(alpha=0.3, axis="x", which="both")
    axes[0].legend(fontsize=8, loc="lower right")
    return figure


def _sizes(plt: Any, found: Mapping[str, Any]) -> Any:
    """Requests/s and CPU time of Redis against the bytes of a prompt, with Redis alone as the ceiling."""
    figure, (rates, times) = plt.subplots(1, 2, figsize=(10, 4), sharex=True)
    for name in dict.fromkeys(one["name"] for one in found["queues"]):
        rows = sorted((o for o in found["queues"] if o["name"] == name), key=lambda o: int(o["prompt_bytes"]))
        sizes = [one["prompt_bytes"] for one in rows]
        rates.plot(sizes, [one["requests_per_s"]["median"] for one in rows], marker="o", label=name)
        times.plot(sizes, [one["cpu_s_per_1000"]["redis"]["median"] for one in rows], marker="o", label=name)
    sizes = [one["prompt_bytes"] for one in found["ceilings"]]
    for axis, field in ((rates, "requests_per_s"), (times, "redis_cpu_s_per_1000")):
        axis.plot(sizes, [one[field] for one in found["ceilings"]], color="grey", ls=":", label="Redis alone")
        axis.set(xscale="log", yscale="log", xlabel="bytes of a prompt")
        axis.grid(alpha=0.3, which="both")
    rates.set(ylabel="requests/s")
    times.set(ylabel="CPU s of Redis per 1,000 requests")
    rates.legend(fontsize=8)
    return figure
