"""Policies of `bench serve` compared as if the machine had been equally fast for all of them.

    python bench/equal_speed.py RUN.json [RUN.json ...] [--json]

A virtual machine's speed changes from minute to minute, and near saturation latency with a power of it. Each run
records what the same work cost in CPU time during each policy's turn. Over all turns of all runs the logarithm of
a figure is fitted by least squares to a constant for each policy, one for each round (its arrivals), and the
logarithm of that cost. Printed are the ratios of `l4` to the others, standard errors, and the power found.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from told import tell

Turn = Mapping[str, Any]

FIGURES: dict[str, Callable[[Turn], float]] = {
    "mean": lambda turn: float(turn["mean_e2e_s"]),
    "p99": lambda turn: float(turn["p99_e2e_s"]),
    "TPOT of short": lambda turn: float(turn["short"]["mean_tpot_s"]),
    "mean of long": lambda turn: float(turn["long"]["mean_e2e_s"]),
}


def turns_of(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, tuple[int, int], Turn]]:
    """Policy, round (number of the run, number in it) and figures of each turn."""
    return [
        (entry["policy"], (number, turn["round"]), turn)
        for number, run in enumerate(runs)
        for entry in run["results"]
        for turn in entry["rounds"]
    ]


def fit(
    turns: Sequence[tuple[str, tuple[int, int], Turn]], figure: Callable[[Turn], float]
) -> tuple[float, dict[str, tuple[float, float]]]:
    """The power of the machine's slowness, and the ratio of `l4` to each other policy with its standard error."""
    policies = list(dict.fromkeys(policy for policy, _, _ in turns))
    rounds = list(dict.fromkeys(number for _, number, _ in turns))
    x = np.zeros((len(turns), len(policies) + len(rounds)))
    for row, (policy, number, turn) in zip(x, turns, strict=True):
        row[policies.index(policy)] = 1.0
        if number != rounds[0]:
            row[len(policies) + rounds.index(number) - 1] = 1.0
        row[-1] = np.log(turn["fixed_work_ms"])
    y = np.log([figure(turn) for _, _, turn in turns])
    found, *_ = np.linalg.lstsq(x, y, rcond=None)
    spread = float(((y - x @ found) ** 2).sum()) / (len(turns) - x.shape[1])
    covariance = spread * np.linalg.inv(x.T @ x)
    l4 = policies.index("l4")
    ratios = {}
    for at, policy in enumerate(policies):
        if at != l4:
            ratio = float(np.exp(found[l4] - found[at]))
            error = float(np.sqrt(covariance[l4, l4] + covariance[at, at] - 2 * covariance[l4, at]))
            ratios[policy] = (ratio, ratio * error)
    return float(found[-1]), ratios


def main() -> None:
    """Fit and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    turns = turns_of([json.loads(path.read_text()) for path in given.runs])
    found: dict[str, Any] = {"turns": len(turns)}
    for name, figure in FIGURES.items():
        power, ratios = fit(turns, figure)
        shown = ", ".join(f"{ratio:.2f} ± {error:.2f} of {policy}" for policy, (ratio, error) in ratios.items())
        found[name] = ratios if given.json else f"{shown}; power {power:.1f}"
    tell(found, as_json=given.json)


if __name__ == "__main__":
    main()
