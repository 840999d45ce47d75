"""The text of the reproduction report: tables of the runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from reproduction_cases import PAPER, SLO, Results, Spec, capacity, traffic
from reproduction_grid import (
    ABLATED,
    BANDWIDTHS,
    FLOORS,
    LOADS,
    SHOWN,
    SIGMAS,
    SWEEP,
    WARMUP_SHARE,
    Grid,
    blind,
    long_s,
    plans,
)

from l4queue.planning.steady_state import LONG_BOUND, P99_BOUND
from l4queue.sim.registry import LENGTH_BLIND
from l4queue.sim.results import SimResult


class Report:
    """Tables of a grid whose runs are all there."""

    def __init__(self, grid: Grid, results: Results) -> None:
        self.grid = grid
        self.results = results

    def lines(self, img: str | None) -> Iterator[str]:
        """The report below its head. What has not been run is left out."""
        grid, have = self.grid, self.results.has
        yield from self._paper()
        title = "Floors: windows that were looked at while constants were chosen, 85 % load"
        yield from self._summary(title, grid.windows)
        yield from self._hindsight()
        yield from self._warm() if grid.warmed else ()
        yield from self._summary("Traffic that nothing was tuned on, 85 % load", grid.fresh)
        if have(s for w in grid.first for load in LOADS for s in grid.compared(replace(w, load=load))):
            yield from self._loads()
        if have(spec for load in SWEEP for spec in grid.compared(Spec(case=PAPER, load=load))):
            yield from self._sweep()
        if img is not None:
            yield from (f"![mean latency against the rate]({img}/reproduction-rate.png)", "")
            yield from (f"![mean latency against the load on long-tailed mixes]({img}/reproduction-load.png)", "")
        yield from self._service_level() if grid.served else ()
        yield from self._ablation() if grid.ablated else ()
        yield from self._bandwidth()
        yield from self._skew() if grid.skewed else ()
        yield from ("## Tables, 85 % load", "")
        for window in (*grid.windows, *grid.fresh):
            yield from self._table(window)
        yield from ("## Tables, other loads (offset 0)", "")
        for window in (replace(w, load=load) for w in grid.first for load in LOADS):
            if have(grid.compared(window)):
                yield from self._table(window)

    def found(self, window: Spec) -> dict[str, SimResult]:
        """Every policy on a window, and the variants of l4."""
        specs = {spec.policy: spec for spec in self.grid.compared(window)}
        specs |= {"two-pool": replace(window, policy="two-pool"), **self.grid.variants(window)}
        return {name: self.results[spec] for name, spec in specs.items() if self.results.has([spec])}

    def _paper(self) -> Iterator[str]:
        yield from (
            "## Beside the paper",
            "",
            "Mean and p99 end to end of `l4`, change against round robin and against the best length-blind "
            "policy, 85 % load, offset 0. Throughput: of `l4` as a multiple, at the service level below.",
            "",
            "| | mean, round robin | mean, best length-blind | p99, round robin | p99, best length-blind "
            "| throughput, round robin | throughput, best length-blind |",
            "|---|---|---|---|---|---|---|",
            "| the paper, against the best multi-instance scheduler it measured | | −67 % | | −69 % | | 2.89× |",
        )
        for window in self.grid.first:
            found = self.found(window)
            best, own, rr = blind(found), found["l4"], found["round-robin"]
            cells = [
                change(getattr(own, k), getattr(o, k)) for k in ("mean_e2e_s", "p99_e2e_s") for o in (rr, best)
            ]
            if window in self.grid.served:
                loads = self._served_loads(window)
                cells += [f"{loads['l4'] / loads[n]:.2f}×" for n in ("round-robin", self._best_served(loads))]
            else:
                cells += ["", ""]
            yield f"| {window.case} | " + " | ".join(cells) + " |"
        yield ""

    def _summary(self, title: str, windows: list[Spec]) -> Iterator[str]:
        yield from (
            f"## {title}",
            "",
            "`l4` as a multiple of the best length-blind policy (named), and of round robin. In brackets the "
            "project's floor, bold where it is missed; p99 is to stay below 1.10, the longest 5 % below 1.25.",
            "",
            "| traffic | offset | requests | of round robin | of the best length-blind | which | p99 "
            "| longest 5 % | `mean` objective | re-prefill | two-pool | clairvoyant |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        )
        for window in windows:
            found = self.found(window)
            best, own = blind(found), found["l4"]
            of_rr, of_best = FLOORS.get(window.case, (None, None))

            def ratio(name: str, found: dict[str, SimResult] = found, best: SimResult = best) -> float | None:
                return found[name].mean_e2e_s / best.mean_e2e_s if name in found else None

            cells = (
                marked(own.mean_e2e_s / found["round-robin"].mean_e2e_s, of_rr),
                marked(ratio("l4"), of_best),
                best.policy,
                marked(own.p99_e2e_s / best.p99_e2e_s, P99_BOUND, is_shown=False),
                marked(long_s(own) / long_s(best), LONG_BOUND, is_shown=False),
                marked(ratio("l4, mean"), 0.72 if window.case == "mixed" else None),
                marked(ratio("l4, re-prefill"), None),
                marked(ratio("two-pool"), None),
                marked(ratio("clairvoyant"), None),
            )
            yield f"| {window.case} | {window.offset:.2f} | {own.num_requests} | " + " | ".join(cells) + " |"
        yield ""

    def _hindsight(self) -> Iterator[str]:
        for window in self.grid.missed(self.results):
            best = blind(self.results.of(window, LENGTH_BLIND))
            if not self.results.has(plans(window)):
                continue
            tried = sorted(((self.results[s], s.fixed) for s in plans(window)), key=lambda row: row[0].mean_e2e_s)
            yield from (
                f"### The miss: {window.case}, offset {window.offset:.1f}",
                "",
                f"{len(tried)} fixed plans of two stages on this very window, each with all other ingredients; "
                f"the five with the least mean, and `l4`, as multiples of {best.policy}.",
                "",
                "| plan | mean | p99 | longest 5 % |",
                "|---|---|---|---|",
            )
            rows = [(f"fixed: {p[1]} of 16 workers below {p[0]} tokens" if p else "", r) for r, p in tried[:5]]
            for name, r in (*rows, ("`l4`, which plans as it goes", self.results[window])):
                yield (
                    f"| {name} | {r.mean_e2e_s / best.mean_e2e_s:.3f} | {r.p99_e2e_s / best.p99_e2e_s:.3f} "
                    f"| {long_s(r) / long_s(best):.3f} |"
                )
            yield ""

    def _warm(self) -> Iterator[str]:
        yield from (
            "## What the time until the first plan costs",
            "",
            "Mean end to end as a multiple of the best length-blind policy, 85 % load: of all requests, and "
            f"without the first {WARMUP_SHARE:.0%} of the arrivals, which are served and not counted. `l4` begins "
            "each window without a plan; a deployment that was stopped and started keeps its last one.",
            "",
            "| traffic | offset | `balanced`, all | without the first | `mean`, all | without the first |",
            "|---|---|---|---|---|---|",
        )
        for window in self.grid.warmed:
            cells = []
            for objective in ("balanced", "mean"):
                for share in (0.0, WARMUP_SHARE):
                    counted = replace(window, warmup_share=share)
                    best = blind(self.results.of(counted, LENGTH_BLIND))
                    own = self.results[replace(counted, objective=objective)]
                    cells.append(f"{own.mean_e2e_s / best.mean_e2e_s:.3f}")
            yield f"| {window.case} | {window.offset:.2f} | " + " | ".join(cells) + " |"
        yield ""

    def _loads(self) -> Iterator[str]:
        loads = sorted((0.85, *LOADS))
        yield from (
            "## Load, offset 0",
            "",
            "Mean end to end of `l4` as a multiple of the best length-blind policy (p99; longest 5 %).",
            "",
            "| traffic | " + " | ".join(f"{load:.0%}" for load in loads) + " |",
            "|---|" + "---|" * len(loads),
        )
        for window in self.grid.first:
            cells = []
            for load in loads:
                found = self.results.of(replace(window, load=load), (*LENGTH_BLIND, "l4"))
                best, own = blind(found), found["l4"]
                tail = f"{own.p99_e2e_s / best.p99_e2e_s:.2f}; {long_s(own) / long_s(best):.2f}"
                cells.append(f"{own.mean_e2e_s / best.mean_e2e_s:.2f} ({tail})")
            yield f"| {window.case} | " + " | ".join(cells) + " |"
        yield ""

    def _sweep(self) -> Iterator[str]:
        rate = capacity(PAPER, 0.0)
        yield from (
            "## The paper's setting: ShareGPT-like lengths, Poisson arrivals, the rate swept",
            "",
            f"16 engines saturate at {rate:.1f} requests/s. Mean end to end, s (p99).",
            "",
            "| requests/s | " + " | ".join(SHOWN) + " |",
            "|---|" + "---|" * len(SHOWN),
        )
        for load in SWEEP:
            found = self.results.of(Spec(case=PAPER, load=load), SHOWN)
            cells = [f"{r.mean_e2e_s:.2f} ({r.p99_e2e_s:.1f})" for r in found.values()]
            yield f"| {load * rate:.1f} | " + " | ".join(cells) + " |"
        yield ""

    def _served_loads(self, window: Spec) -> dict[str, float]:
        return {name: self.results.load(replace(window, policy=name, slo=SLO)) for name in SHOWN}

    def _best_served(self, loads: dict[str, float]) -> str:
        return max((name for name in loads if name in LENGTH_BLIND), key=lambda name: loads[name])

    def _service_level(self) -> Iterator[str]:
        yield from (
            "## Throughput at a service level",
            "",
            f"Largest rate, requests/s, at which `{SLO}` holds over the window (share of the capacity).",
            "",
            "| traffic | " + " | ".join(SHOWN) + " | l4 of the best other |",
            "|---|" + "---|" * (len(SHOWN) + 1),
        )
        for window in self.grid.served:
            loads = self._served_loads(window)
            rate = capacity(window.case, window.offset)
            cells = [f"{load * rate:.1f} ({load:.0%})" for load in loads.values()]
            most = loads[self._best_served(loads)]
            cells.append(f"{loads['l4'] / most:.2f}×" if most else "-")
            yield f"| {window.case} | " + " | ".join(cells) + " |"
        yield ""

    def _ablation(self) -> Iterator[str]:
        yield from (
            "## Ablation: mean end to end without an ingredient, as a multiple of the whole (longest 5 %)",
            "",
            "| traffic | " + " | ".join(ABLATED) + " |",
            "|---|" + "---|" * len(ABLATED),
        )
        for window in self.grid.ablated:
            full = self.results[window]
            less = [self.results[replace(window, without=(name,))] for name in ABLATED]
            cells = [f"{r.mean_e2e_s / full.mean_e2e_s:.2f} ({long_s(r) / long_s(full):.2f})" for r in less]
            yield f"| {window.case} | " + " | ".join(cells) + " |"
        yield ""

    def _bandwidth(self) -> Iterator[str]:
        yield from (
            "## Ways of hand-over: mean end to end of `l4` as a multiple of the best length-blind policy",
            "",
            "| traffic | re-prefill | KV at 5 GB/s | KV at 50 GB/s | hand-overs (re-prefill, 5, 50) |",
            "|---|---|---|---|---|",
        )
        for window in self.grid.ablated:
            if not self.results.has(self.grid.speeds(window)):
                continue
            best = blind(self.found(window)).mean_e2e_s
            runs = [self.results[replace(window, gb_per_s=speed)] for speed in BANDWIDTHS]
            counts = ", ".join(str(r.num_handovers) for r in runs)
            cells = " | ".join(f"{r.mean_e2e_s / best:.2f}" for r in runs)
            yield f"| {window.case} | {cells} | {counts} |"
        yield ""

    def _skew(self) -> Iterator[str]:
        yield from (
            "## Sensitivity to the skew term",
            "",
            "σ as a multiple of the measured one, in the engines of all policies. `l4` with a planner that knows "
            "it, and with one that takes σ for zero; each against the best length-blind policy on these engines "
            f"(of {', '.join(SHOWN[:-1])}). The rates are those of 85 % load at the measured σ. The last column: "
            "what the term itself costs that policy, against σ = 0.",
            "",
            "| traffic | σ | planner knows it | planner ignores it | best length-blind, of σ = 0 |",
            "|---|---|---|---|---|",
        )
        for window in self.grid.skewed:
            none = blind(self.results.of(replace(window, sigma=0.0), SHOWN)).mean_e2e_s
            for sigma in SIGMAS:
                spec = replace(window, sigma=sigma)
                best = blind(self.results.of(spec, SHOWN)).mean_e2e_s
                knows = self.results[spec].mean_e2e_s / best
                ignores = self.results[replace(spec, without=("skew-in-planner",))].mean_e2e_s / best
                yield f"| {window.case} | {sigma:g}× | {knows:.2f} | {ignores:.2f} | {best / none:.2f} |"
        yield ""

    def _table(self, window: Spec) -> Iterator[str]:
        trace = traffic(window.case, window.offset)
        rate = window.load * capacity(window.case, window.offset)
        yield from (
            f"### {window.case}, offset {window.offset:.2f}, {window.load:.0%} load",
            "",
            f"{len(trace)} requests in {len(trace) / rate:.0f} s.",
            "",
            "| policy | mean e2e s | p95 | p99 | p50 TTFT s | p99 | mean TPOT ms | p99 | requests/s "
            "| short mean s | p99 TPOT ms | long mean s | p99 TPOT ms | hand-overs | steals |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        )
        for name, r in self.found(window).items():
            yield (
                f"| {name} | {r.mean_e2e_s:.3f} | {r.p95_e2e_s:.2f} | {r.p99_e2e_s:.2f} | {r.p50_ttft_s:.3f} "
                f"| {r.p99_ttft_s:.2f} | {ms(r.mean_tpot_s)} | {ms(r.p99_tpot_s)} | {r.throughput_rps:.1f} "
                f"| {r.short.mean_e2e_s or 0:.2f} | {ms(r.short.p99_tpot_s)} | {long_s(r):.2f} "
                f"| {ms(r.long.p99_tpot_s)} | {r.num_handovers} | {r.num_steals} |"
            )
        yield ""


def ms(seconds: float | None) -> str:
    """Milliseconds, or a dash where no request has the measure."""
    return "-" if seconds is None else f"{seconds * 1000:.1f}"


def change(value: float, reference: float) -> str:
    """Relative change in percent with a true minus sign."""
    return f"{100 * (value / reference - 1):+.0f} %".replace("-", "−")


def marked(value: float | None, floor: float | None, *, is_shown: bool = True) -> str:
    """A ratio, bold above its floor."""
    if value is None:
        return ""
    if floor is None:
        return f"{value:.2f}"
    text = f"{value:.3f}" if value <= floor else f"**{value:.3f}**"
    return f"{text} ({floor:.2f})" if is_shown else text
