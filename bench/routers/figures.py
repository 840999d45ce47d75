"""Figures of the race: by entrant and load the medians over rounds, and the ratios of l4queue to each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from entrants import L4QUEUE

from l4queue.cli.bench.report import LONG_TOKENS
from l4queue.sim.results import Measured

__all__ = ("Run", "figures_of", "report", "table")

NAMES = ("mean_s", "p50_s", "p99_s", "ttft_s", "tpot_s", "short_s", "long_s", "core_cpu_s", "other_cpu_s")
"""Means and quantiles of the end-to-end time; means of the first token's and of the time per token; CPU time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One entrant under one draw of arrivals.

    `fixed_work_ms` tells how slow the machine was, `plans` which plans l4queue followed: the one in force first.
    """

    entrant: str
    load: float
    number: int
    figures: dict[str, float]
    late_s: float
    fixed_work_ms: float
    plans: list[dict[str, Any]] | None = None


def figures_of(measured: Measured, *, warmup_s: float) -> dict[str, float]:
    """What a client sees of the requests that arrived after the warm-up, s."""
    kept = measured.arrival_s >= warmup_s
    e2e_s, is_long = measured.e2e_s[kept], measured.prompt_tokens[kept] >= LONG_TOKENS
    return {
        "num": int(kept.sum()),
        "mean_s": float(e2e_s.mean()),
        "p50_s": float(np.median(e2e_s)),
        "p99_s": float(np.quantile(e2e_s, 0.99)),
        "ttft_s": float(measured.ttft_s[kept].mean()),
        "tpot_s": float(measured.tpot_s[kept].mean()),
        "short_s": float(e2e_s[~is_long].mean()) if not is_long.all() else float("nan"),
        "long_s": float(e2e_s[is_long].mean()) if is_long.any() else float("nan"),
    }


def report(runs: Sequence[Run], *, of: str = L4QUEUE, names: Sequence[str] = NAMES) -> list[dict[str, Any]]:
    """By load and entrant: medians over the rounds, and the ratio of `of` in the same round with its spread."""
    found = []
    for load in dict.fromkeys(run.load for run in runs):
        ours = {run.number: run for run in runs if (run.load, run.entrant) == (load, of)}
        for entrant in dict.fromkeys(run.entrant for run in runs if run.load == load):
            own = [run for run in runs if (run.load, run.entrant) == (load, entrant)]
            pairs = [(ours[run.number], run) for run in own if run.number in ours]
            found.append(
                {
                    "load": load,
                    "entrant": entrant,
                    "rounds": len(own),
                    "median": {name: float(np.median([run.figures[name] for run in own])) for name in names},
                    "l4queue_to_it": {name: _spread(pairs, name) for name in names} if pairs else None,
                    "late_s": max(run.late_s for run in own),
                    "fixed_work_ms": float(np.median([run.fixed_work_ms for run in own])),
                }
            )
    return found


def _spread(pairs: Sequence[tuple[Run, Run]], name: str) -> dict[str, float]:
    ratios = [mine.figures[name] / other.figures[name] for mine, other in pairs]
    return {"median": float(np.median(ratios)), "least": min(ratios), "most": max(ratios)}


def table(entries: Sequence[Mapping[str, Any]], *, of: str = L4QUEUE, names: Sequence[str] = NAMES) -> str:
    """Medians in seconds, TPOT in ms; in brackets the ratio of `of` to it."""
    lines = []
    for load in dict.fromkeys(entry["load"] for entry in entries):
        lines.append(f"load {load:.0%}".ljust(34) + "".join(name.removesuffix("_s").rjust(15) for name in names))
        of_load = [entry for entry in entries if entry["load"] == load]
        for entry in sorted(of_load, key=lambda e: e["median"]["mean_s"]):
            cells = []
            for name in names:
                value = entry["median"][name] * (1000 if name == "tpot_s" else 1)
                ratio = entry["l4queue_to_it"]
                told = f" ({ratio[name]['median']:.2f})" if ratio and entry["entrant"] != of else ""
                cells.append(f"{value:.1f}{told}" if name == "tpot_s" else f"{value:.2f}{told}")
            lines.append(entry["entrant"].ljust(34) + "".join(cell.rjust(15) for cell in cells))
    return "\n".join(lines)
