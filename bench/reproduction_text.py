"""The text of the reproduction: tables for docs/reproduction.md, long ones for bench/results/reproduction.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from reproduction_cases import LEAST_STEP, LOAD_STEP, Spec
from reproduction_figures import LEAST_HITS, LONG, MEAN, MEAN_FLOORS, MOST_MEAN, OTHER_FLOORS, P99, TTFT, Compared
from reproduction_grid import (
    BY_AFFINITY,
    BY_STAGES,
    ENDS,
    FAST_LINK,
    FLEETS,
    HOST_LINK,
    LINKS,
    LOADS,
    QUEUES,
    RIVALS,
    ROUTERS,
    SEEDS,
    SERVED,
    SERVED_REQUESTS,
    SHARE,
    SPLITS,
    Grid,
    run,
)

from l4queue.sim.registry import LENGTH_BLIND

LEAST_LOAD = 0.85 * LOAD_STEP**LEAST_STEP
"""The least load that a search tries."""
MANY = 10.0
"""A ratio from which on digits behind the point tell nothing."""
NAMES = {MEAN: "mean", P99: "p99", LONG: "longest 5 %", TTFT: "TTFT mean", "hits": "hit share"}


def told(link: float) -> str:
    """A link in words."""
    return f"{link:g} GB/s" if link else "prefill again"


def told_load(load: float) -> str:
    """A load in digits; 0 where the least that was tried is too much."""
    return f"{load:.2f}" if load else f"< {LEAST_LOAD:.2f}"


def row(*cells: object) -> str:
    """A row of a table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def head(*cells: str) -> Iterator[str]:
    """The head of a table."""
    yield row(*cells)
    yield "|" + "---|" * len(cells)


class Tables:
    """The blocks of docs/reproduction.md by name. What has not been run is left out."""

    def __init__(self, grid: Grid, compared: Compared) -> None:
        self.grid, self.runs = grid, compared

    def blocks(self) -> dict[str, list[str]]:
        """Lines of each."""
        return {
            "first": [*self._first(), "", *self._floors()],
            "ingredients": [
                *self._ingredients(BY_AFFINITY),
                "",
                *self._ingredients(BY_STAGES, base=("affinity",)),
            ],
            "measured": list(self._measured()),
            "fleets": list(self._over("num_instances", sorted((16, *FLEETS)), "instances", self.grid.fleets)),
            "loads": list(self._over("load", sorted((0.85, *LOADS)), "load", self.grid.known)),
            "served": list(self._served()),
            "lengths": list(self._lengths()),
        }

    def _windows(self, links: Sequence[float]) -> Iterator[tuple[Spec, str, tuple[int, ...]]]:
        """`l4` with each link on each traffic, the best router there, and the seeds of both."""
        for case in self.grid.known:
            for link in links:
                spec = run(case, gb_per_s=link)
                best = self.runs.best(spec, ROUTERS)
                if best is not None:
                    yield spec, best, self.runs.seeds(spec, ROUTERS)

    def _first(self) -> Iterator[str]:
        yield from head(
            "trace",
            "link",
            "best router, its mean",
            *(NAMES[key] for key in (MEAN, *OTHER_FLOORS)),
            "tokens cached",
            "of the most of a router",
            "mean, of round robin",
            "`split`: mean",
            "p99",
            "TTFT mean",
            "`split-by-load`: mean",
        )
        floors = " / ".join(f"{floor:.2f}" for floor in MEAN_FLOORS.values())
        others = [f"{floor:.2f}" for floor in OTHER_FLOORS.values()]
        yield row(
            "*floor*",
            " / ".join(told(link) for link in MEAN_FLOORS),
            "",
            floors,
            *others,
            "",
            LEAST_HITS,
            *[""] * 5,
        )
        for spec, best, seeds in self._windows(LINKS):
            ratios = self.runs.first_ratios(spec, best, seeds)
            other = replace(spec, policy=best)
            yield row(
                f"`{spec.case}`" if spec.gb_per_s == LINKS[0] else "",
                told(spec.gb_per_s),
                f"`{best}`, {self.runs.average(other, MEAN, seeds):.2f} s",
                *(ratios[key] for key in (MEAN, *OTHER_FLOORS)),
                f"{self.runs.average(spec, 'cached_share', seeds):.1%}".replace("%", " %"),
                ratios["hits"],
                f"{self.runs.ratio(spec, replace(spec, policy='round-robin'), MEAN, seeds).average:.2f}",
                *self._split(spec, best, keys=(MEAN, P99, TTFT)),
                *self._split(spec, best, policy="split-by-load"),
            )

    def _split(self, spec: Spec, best: str, *, policy: str = "split", keys: Sequence[str] = (MEAN,)) -> list[str]:
        split = replace(spec, policy=policy)
        seeds = [seed for seed in self.runs.seeds(split, (best,)) if spec.gb_per_s]
        if not seeds:
            return [""] * len(keys)
        ratios = [self.runs.ratio(split, replace(spec, policy=best), key, seeds) for key in keys]
        return [f"{ratio.average:.2f}" if ratio.average < MANY else f"{ratio.average:.0f}" for ratio in ratios]

    def _floors(self) -> Iterator[str]:
        """Which floors are met, link by link."""
        for link in MEAN_FLOORS:
            missed, total = [], 0
            for spec, best, seeds in self._windows((link,)):
                ratios = self.runs.first_ratios(spec, best, seeds)
                total += len(ratios) + 1
                missed += [
                    f"{NAMES[key]} of `{spec.case}` ({ratio.average:.2f})"
                    for key, ratio in ratios.items()
                    if ratio.is_missed
                ]
                if round(ratios[MEAN].average, 2) > MOST_MEAN:
                    missed.append(f"mean of `{spec.case}` above {MOST_MEAN}")
            listed = ", ".join(missed) or "none"
            met = f"{total - len(missed)} of {total} floors are met"
            yield f"- {told(link)}: {met}. Missed: {listed}."

    def _ingredients(self, names: Sequence[str], *, base: tuple[str, ...] = ()) -> Iterator[str]:
        title = "no affinity: mean, s" if base else "whole: mean, s"
        yield from head("trace", "link", title, *(f"no {name}" for name in names))
        for case in self.grid.known:
            for link in (*ENDS, HOST_LINK):
                whole = run(case, gb_per_s=link, without=base)
                less = [replace(whole, without=(*base, name)) for name in names]
                if not self.runs.has(whole) or not any(map(self.runs.has, less)):
                    continue
                seeds = sorted({seed for one in less for seed in self.runs.seeds(one, ())})
                cells = [self._without(one, whole) for one in less]
                yield row(f"`{case}`", told(link), f"{self.runs.average(whole, MEAN, seeds):.2f}", *cells)

    def _without(self, less: Spec, whole: Spec) -> str:
        seeds = [seed for seed in self.runs.seeds(less, ()) if self.runs.has(replace(whole, seed=seed))]
        if not seeds:
            return ""
        mean, p99 = (self.runs.ratio(less, whole, key, seeds) for key in (MEAN, P99))
        return f"{replace(mean, margin=None)}; {p99.average:.2f}"

    def _measured(self) -> Iterator[str]:
        keys = (MEAN, P99, LONG, TTFT)
        yield from head(
            "trace",
            "link",
            "best router, composed",
            *(NAMES[key] for key in keys),
            "split",
            "best router, measured",
            *(NAMES[key] for key in keys),
            "split",
        )
        for case in self.grid.known:
            for link in ENDS:
                cells: list[object] = []
                for gpu in ("h100", "h100-vllm"):
                    spec = run(case, gb_per_s=link, gpu=gpu)
                    best = self.runs.best(spec)
                    if best is None:
                        break
                    seeds = self.runs.seeds(spec, RIVALS)
                    ratios = [self.runs.ratio(spec, replace(spec, policy=best), key, seeds) for key in keys]
                    cells += [f"`{best}`", ratios[0], *(f"{one.average:.2f}" for one in ratios[1:])]
                    cells += self._split(spec, best)
                else:
                    yield row(f"`{case}`", told(link), *cells)

    def _over(self, name: str, values: Sequence[float], title: str, cases: Sequence[str]) -> Iterator[str]:
        """Mean, p99 and longest 5 % to the best of a few routers, for several values of a setting."""
        shown = [f"{value:.0%}".replace("%", " %") if value <= 1 else str(value) for value in values]
        yield from head("trace", "link", *(f"{title} {value}" for value in shown))
        for case in cases:
            for link in ENDS:
                cells = []
                for value in values:
                    spec = replace(run(case, gb_per_s=link), **{name: value})  # type: ignore[arg-type]
                    best = self.runs.best(spec)
                    if best is None:
                        cells.append("")
                        continue
                    other, seeds = replace(spec, policy=best), self.runs.seeds(spec, RIVALS)
                    mean, *tails = (self.runs.ratio(spec, other, key, seeds) for key in (MEAN, P99, LONG))
                    told_tails = "; ".join(f"{one.average:.2f}" for one in tails)
                    cells.append(f"{mean.average:.2f} ± {mean.margin:.2f}; {told_tails} of `{best}`")
                yield row(f"`{case}`", told(link), *cells)

    def _served(self) -> Iterator[str]:
        yield from head(
            "trace",
            *(f"`{name}`" for name in SERVED),
            "`split`, 50 GB/s",
            *(f"`l4`, {told(link)}" for link in ENDS),
            "of the best router",
            "of `central`",
            "of round robin",
        )
        for case in self.grid.known:
            level = run(case, share=SHARE, first=SERVED_REQUESTS)
            others = [self.runs.get(replace(level, policy=name)) for name in SERVED]
            own = [self.runs.get(replace(level, gb_per_s=link)) for link in ENDS]
            if None in (*others, *own):
                continue
            loads = dict(zip(SERVED, (it["load"] for it in others if it), strict=True))
            most = max(load for name, load in loads.items() if name not in QUEUES)
            served = [it["load"] for it in own if it]
            split = self.runs.get(replace(level, policy="split", gb_per_s=FAST_LINK))
            ratios = [
                [f"{load / of:.2f}×" if of else f"> {load / LEAST_LOAD:.1f}×" for load in served]
                for of in (most, loads["central"], loads["round-robin"])
            ]
            shown = [told_load(load) for load in (*loads.values(), *served)]
            shown.insert(len(loads), told_load(split["load"]) if split else "not run")
            yield row(f"`{case}`", *shown, *(", ".join(cells) for cells in ratios))

    def _lengths(self) -> Iterator[str]:
        yield from head(
            "traffic",
            "link",
            "best length-blind",
            *(NAMES[key] for key in (MEAN, P99, LONG, TTFT)),
            "mean, of round robin",
        )
        for case in self.grid.unknown:
            for link in ENDS:
                spec = run(case, gb_per_s=link)
                best = self.runs.best(spec, LENGTH_BLIND)
                if best is None:
                    continue
                seeds = self.runs.seeds(spec, LENGTH_BLIND)
                other = replace(spec, policy=best)
                mean = self.runs.ratio(spec, other, MEAN, seeds, floor=MOST_MEAN)
                ratios = [self.runs.ratio(spec, other, key, seeds) for key in (P99, LONG, TTFT)]
                in_turn = self.runs.ratio(spec, replace(spec, policy="round-robin"), MEAN, seeds)
                yield row(f"`{case}`", told(link), f"`{best}`", mean, *ratios, f"{in_turn.average:.2f}")


class LongTables:
    """Every policy on every window, in seconds."""

    def __init__(self, grid: Grid, compared: Compared) -> None:
        self.grid, self.runs = grid, compared

    def lines(self) -> Iterator[str]:
        """The tables below their head."""
        for case in (*self.grid.known, *self.grid.unknown):
            yield from self._table(
                f"{case}, 85 % load", run(case), (*ROUTERS, *QUEUES, "random", "least-tokens", "two-pool")
            )
        for case in self.grid.known:
            yield from self._table(f"{case}, step costs measured on an H100", run(case, gpu="h100-vllm"), RIVALS)
        for case in self.grid.known:
            for load in LOADS:
                yield from self._table(f"{case}, {load:.0%} load".replace("%", " %"), run(case, load=load), RIVALS)
        for case in self.grid.fleets:
            for number in FLEETS:
                yield from self._table(f"{case}, {number} instances", run(case, num_instances=number), RIVALS)

    def _table(self, title: str, spec: Spec, names: Sequence[str]) -> Iterator[str]:
        links = sorted({*LINKS, FAST_LINK})
        specs = {f"`{name}`": replace(spec, policy=name) for name in names}
        for name, link in product(SPLITS, links[1:]):
            specs[f"`{name}`, {told(link)}"] = replace(spec, policy=name, gb_per_s=link)
        specs |= {f"`l4`, {told(link)}": replace(spec, gb_per_s=link) for link in links}
        for without in ("affinity", *(f"affinity, {name}" for name in BY_STAGES), *BY_AFFINITY[1:]):
            less = replace(spec, without=tuple(without.split(", ")))
            specs |= {f"`l4`, {told(link)}, no {without}": replace(less, gb_per_s=link) for link in ENDS}
        there = {
            name: tuple(s for s in SEEDS if self.runs.has(replace(one, seed=s))) for name, one in specs.items()
        }
        if not any(there.values()):
            return
        yield from (f"## {title}", "")
        yield from head(
            "policy",
            "seeds",
            "mean, s",
            "least to most",
            "p99",
            "longest 5 %",
            "TTFT mean",
            "TTFT p99",
            "ms a token",
            "tokens cached",
            "hand-overs",
            "steals",
        )
        for name, seeds in there.items():
            if seeds:
                yield self._row(name, specs[name], seeds)
        yield ""

    def _row(self, name: str, spec: Spec, seeds: Sequence[int]) -> str:
        means = [found[MEAN] for seed in seeds if (found := self.runs.get(replace(spec, seed=seed)))]
        different = sorted(set(means))
        cached = self.runs.get(replace(spec, seed=seeds[0])) or {}
        count = cached.get("num_prefill")
        return row(
            name if count is None else f"{name} ({count} prefill)",
            len(seeds),
            f"{sum(means) / len(means):.3f}",
            f"{different[0]:.3f} to {different[-1]:.3f}" if len(different) > 1 else "",
            *(f"{self.runs.average(spec, key, seeds):.2f}" for key in (P99, LONG)),
            *(f"{self.runs.average(spec, key, seeds):.3f}" for key in (TTFT, "p99_ttft_s")),
            f"{self.runs.average(spec, 'mean_tpot_s', seeds) * 1000:.1f}",
            f"{self.runs.average(spec, 'cached_share', seeds):.1%}".replace("%", " %")
            if "cached_share" in cached
            else "",
            *(f"{self.runs.average(spec, key, seeds):.0f}" for key in ("num_handovers", "num_steals")),
        )
