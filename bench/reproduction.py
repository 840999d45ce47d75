"""Writes docs/reproduction.md: every policy on every trace at several loads, with ablations.

    python bench/reproduction.py [--quick] [--out docs/reproduction.md]

Traces are read from the folder in L4_SHARED_DIR (default ../shared), below `traces`; without it only the
synthetic workloads are run. Windows: planner constants were chosen on the first half of each trace, so figures
are given for offsets in the second half too (`offset` 0.0, 0.3 and 0.6 of the trace).
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from l4queue.policy.coefficients import read_coefficients
from l4queue.sim.capacity import capacity_rps
from l4queue.sim.cluster import Transfer
from l4queue.sim.l4 import L4Options
from l4queue.sim.metrics import SimResult
from l4queue.sim.policies import LENGTH_BLIND, make_policy
from l4queue.sim.runner import Setting, run_policy
from l4queue.sim.trace import Trace, read_trace
from l4queue.sim.workload import make_workload

NUM_INSTANCES = 16
GPU, MODEL = "h100", "llama-3.1-8b"
SHOWN = ("round-robin", "least-requests", "llumnix", "central", "central-sjf", "two-pool", "l4")
ABLATED = ("classes", "hand-over", "stealing", "refinement", "late-binding", "shadow", "skew")
ABLATION_CASES = ("mixed", "mooncake_conversation", "mooncake_synthetic", "azure_code")
WINDOW = 5000


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A trace window and its name."""

    name: str
    offset: float
    trace: Trace


def cases(shared: Path, *, offsets: tuple[float, ...], window: int) -> Iterator[Case]:
    """The paper's setting, the mix, and the real traces when they are there."""
    yield Case(
        name="sharegpt (synthetic, Poisson)",
        offset=0.0,
        trace=make_workload("sharegpt", num_requests=window, rng=np.random.default_rng(5)),
    )
    folder = shared / "traces"
    if not folder.is_dir():
        yield Case(
            name="mixed (synthetic)",
            offset=0.0,
            trace=make_workload("mixed", num_requests=window, rng=np.random.default_rng(5)),
        )
        return
    names = {
        "mooncake_conversation": "mooncake_conversation.w0",
        "mooncake_synthetic": "mooncake_synthetic",
        "servegen_r1": "servegen_deepseek_r1.h01",
        "azure_conversation": "azure2023_conv.w0",
        "azure_code": "azure2023_code.w0",
    }
    whole = {name: read_trace(folder / f"{file}.csv.gz") for name, file in names.items()}
    for offset in offsets:
        yield Case(name="mixed", offset=offset, trace=mixed(whole, offset=offset, window=window))
        for name, trace in whole.items():
            start = int(offset * len(trace))
            size = window * 4 if name == "servegen_r1" else window
            part = trace.select(slice(start, min(len(trace), start + size)))
            if len(part) >= 1000:
                yield Case(name=name, offset=offset, trace=part)


def mixed(whole: dict[str, Trace], *, offset: float, window: int) -> Trace:
    """Arrivals of the Azure conversation trace; one in ten has the lengths of a Mooncake conversation request."""
    chat, long = whole["azure_conversation"], whole["mooncake_conversation"]
    rng = np.random.default_rng([11, int(offset * 100)])
    rows = slice(int(offset * len(chat)), min(len(chat), int(offset * len(chat)) + window))
    part = chat.select(rows)
    inputs, outputs = part.input_tokens.copy(), part.output_tokens.copy()
    chosen = np.flatnonzero(rng.random(len(part)) < 0.1)
    picks = rng.integers(0, len(long), size=chosen.size)
    inputs[chosen], outputs[chosen] = long.input_tokens[picks], long.output_tokens[picks]
    return Trace(name="mixed", arrival_s=part.arrival_s, input_tokens=inputs, output_tokens=outputs)


class Report:
    """Runs and writes."""

    def __init__(self) -> None:
        self.coefficients = read_coefficients(GPU, MODEL)
        self.lines: list[str] = []

    def run(
        self,
        case: Case,
        policy: str,
        *,
        load: float,
        options: L4Options | None = None,
        gb_per_s: float | None = 50.0,
    ) -> SimResult:
        """One policy on one case at a load."""
        cost = self.coefficients.cost
        if options is not None and "skew" in options.without:
            cost = replace(cost, sigma_ms=0.0)
        capacity = capacity_rps(case.trace, cost, num_instances=NUM_INSTANCES)
        trace = case.trace.scaled(load * capacity / case.trace.rate_rps)
        bandwidth = None if gb_per_s is None else gb_per_s * 1e9
        transfer = Transfer(
            bandwidth_bytes_per_s=bandwidth, kv_bytes_per_token=self.coefficients.kv_bytes_per_token
        )
        setting = Setting(cost=cost, num_instances=NUM_INSTANCES, transfer=transfer)
        return run_policy(
            make_policy(policy, trace=trace, setting=setting, options=options), trace, setting
        ).result

    def table(self, case: Case, *, load: float) -> None:
        """All policies on one case, and the ratios that matter."""
        found = {policy: self.run(case, policy, load=load) for policy in SHOWN}
        found["l4, re-prefill"] = self.run(case, "l4", load=load, gb_per_s=None)
        found["l4, mean"] = self.run(case, "l4", load=load, options=L4Options(objective="mean"))
        self.lines += [
            f"### {case.name}, offset {case.offset:.1f}, {load:.0%} load, {len(case.trace)} requests",
            "",
            "| policy | mean e2e s | p95 | p99 | p99 TTFT s | mean TPOT ms | short mean | long mean "
            "| hand-overs | steals |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name, r in found.items():
            self.lines.append(
                f"| {name} | {r.mean_e2e_s:.3f} | {r.p95_e2e_s:.2f} | {r.p99_e2e_s:.2f} | {r.p99_ttft_s:.2f} "
                f"| {(r.mean_tpot_s or 0) * 1000:.1f} | {r.short.mean_e2e_s or 0:.2f} "
                f"| {r.long.mean_e2e_s or 0:.2f} | {r.num_handovers} | {r.num_steals} |"
            )
        self.lines += ["", ratios(found), ""]
        print(case.name, case.offset, load, ratios(found), flush=True)

    def ablation(self, case: Case, *, load: float) -> None:
        """L4 with each ingredient switched off."""
        full = self.run(case, "l4", load=load)
        self.lines += [f"| {case.name}, {load:.0%} | 1.00 | "]
        cells = []
        for name in ABLATED:
            less = self.run(case, "l4", load=load, options=L4Options(without=frozenset({name})))
            cells.append(f"{less.mean_e2e_s / full.mean_e2e_s:.2f}")
        self.lines[-1] += " | ".join(cells) + " |"
        print("ablation", case.name, cells, flush=True)


def ratios(found: dict[str, SimResult]) -> str:
    """How l4 compares, in one line."""
    l4, rr = found["l4"], found["round-robin"]
    best = min((r for n, r in found.items() if n in LENGTH_BLIND), key=lambda r: r.mean_e2e_s)
    long = (l4.long.mean_e2e_s or 0.0) / (best.long.mean_e2e_s or 1.0)
    return (
        f"l4: {l4.mean_e2e_s / rr.mean_e2e_s:.2f}× round robin; against the best length-blind ({best.policy}) "
        f"mean {l4.mean_e2e_s / best.mean_e2e_s:.2f}×, p99 {l4.p99_e2e_s / best.p99_e2e_s:.2f}×, "
        f"longest 5 % {long:.2f}×; "
        f"`--objective mean` {found['l4, mean'].mean_e2e_s / best.mean_e2e_s:.2f}×; "
        f"re-prefill {found['l4, re-prefill'].mean_e2e_s / best.mean_e2e_s:.2f}×"
    )


def main() -> None:
    """Run and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one offset, 85 %% load only")
    parser.add_argument("--out", type=Path, default=Path("docs/reproduction.md"))
    given = parser.parse_args()
    shared = Path(os.environ.get("L4_SHARED_DIR", "../shared"))
    started_s = time.perf_counter()
    report = Report()
    all_cases = list(cases(shared, offsets=(0.0,) if given.quick else (0.0, 0.3, 0.6), window=WINDOW))
    report.lines += ["## 85 % load", ""]
    for case in all_cases:
        report.table(case, load=0.85)
    if not given.quick:
        report.lines += ["## Other loads (offset 0)", ""]
        for case in all_cases:
            if case.offset == 0.0 and case.name != "servegen_r1":
                for load in (0.5, 0.7, 0.95):
                    report.table(case, load=load)
    report.lines += [
        "## Ablation: mean end to end without an ingredient, as a multiple of the whole",
        "",
        "| case | whole | " + " | ".join(ABLATED) + " |",
        "|---|---|" + "---|" * len(ABLATED),
    ]
    for case in all_cases:
        if case.offset == 0.0 and case.name in (
            "mixed",
            "mooncake_conversation",
            "mooncake_synthetic",
            "azure_code",
        ):
            report.ablation(case, load=0.85)
    head = Path(__file__).with_name("reproduction_head.md").read_text("utf-8")
    made = (
        f"Made by `python bench/reproduction.py{' --quick' if given.quick else ''}` on "
        f"{datetime.now(UTC):%Y-%m-%d} in {time.perf_counter() - started_s:.0f} s on {os.cpu_count()} cores, "
        f"Python {platform.python_version()}; {NUM_INSTANCES} × {GPU}, {MODEL}; hand-over by KV transfer at "
        "50 GB/s unless it says re-prefill. All figures are simulated.\n"
    )
    given.out.write_text(f"{head}\n{made}\n" + "\n".join(report.lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
