"""Ratios of the reproduction's runs: the best other of a window, intervals, floors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from reproduction_cases import PARTS, SESSIONS, Spec
from reproduction_grid import FAST_LINK, LINKS, RIVALS, SEEDS, normal

from l4queue.sim.registry import AFFINITY

Figures = Mapping[str, Any]
T_VALUE = 2.1
"""Student's t of a two-sided interval of 95 % with as many values as a window has parts."""
MEAN, P99, LONG, TTFT = "mean_e2e_s", "p99_e2e_s", "long_mean_e2e_s", "mean_ttft_s"
MEAN_FLOORS = {LINKS[0]: 0.90, FAST_LINK: 0.80}
OTHER_FLOORS = {P99: 1.05, LONG: 1.15, TTFT: 1.10}
MOST_MEAN, LEAST_HITS = 1.02, 0.90
"""The project's floors, as parts of the best router's figures: the mean on any traffic, and the share of hits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One figure to that of the best other, for each seed; `floor`: the most that it should be on average."""

    values: tuple[float, ...]
    floor: float | None = None
    is_least: bool = False
    margin: float | None = None

    @property
    def average(self) -> float:
        """Over the seeds."""
        return fmean(self.values)

    @property
    def is_missed(self) -> bool:
        """Whether it is on the wrong side of its floor, to two digits."""
        if self.floor is None:
            return False
        value = round(self.average, 2)
        return value < self.floor if self.is_least else value > self.floor

    def __str__(self) -> str:
        """The average, bold where its floor is missed, with its interval and the range over the seeds."""
        text = f"{self.average:.2f}"
        text = f"**{text}**" if self.is_missed else text
        if self.margin is not None:
            text += f" ± {self.margin:.2f}"
        ends = f"{min(self.values):.2f}", f"{max(self.values):.2f}"
        return text if ends[0] == ends[1] else f"{text} ({ends[0]} to {ends[1]})"


class Compared:
    """Runs by spec, and what is told of them."""

    def __init__(self, found: Mapping[Spec, Figures]) -> None:
        self.found = found

    def get(self, spec: Spec) -> Figures | None:
        """Figures of a run, or of the one that is the same; None where there is none."""
        return self.found.get(normal(spec))

    def has(self, spec: Spec) -> bool:
        """Whether it was run."""
        return normal(spec) in self.found

    def seeds(self, spec: Spec, names: Sequence[str]) -> tuple[int, ...]:
        """Those with which this run and these policies were run."""
        return tuple(
            seed
            for seed in SEEDS
            if self.has(replace(spec, seed=seed))
            and all(self.has(replace(spec, seed=seed, policy=name, without=())) for name in names)
        )

    def average(self, spec: Spec, key: str, seeds: Sequence[int]) -> float:
        """Mean of a figure over the seeds."""
        return fmean(self.found[normal(replace(spec, seed=seed))][key] for seed in seeds)

    def best(self, spec: Spec, names: Sequence[str] = RIVALS) -> str | None:
        """The policy with the least mean on this traffic; None where one of them was not run."""
        seeds = self.seeds(spec, names)
        if not seeds:
            return None
        return min(names, key=lambda name: self.average(replace(spec, policy=name, without=()), MEAN, seeds))

    def ratio(
        self, spec: Spec, other: Spec, key: str, seeds: Sequence[int], *, floor: float | None = None
    ) -> Ratio:
        """A figure of one run to that of another."""
        pairs = [
            (self.found[normal(replace(spec, seed=seed))], self.found[normal(replace(other, seed=seed))])
            for seed in seeds
        ]
        return Ratio(
            values=tuple(own[key] / its[key] for own, its in pairs),
            floor=floor,
            margin=self._margin(spec, pairs) if key == MEAN else None,
        )

    def _margin(self, spec: Spec, pairs: Sequence[tuple[Figures, Figures]]) -> float:
        """Half of an interval of 95 %, from the parts of the windows: a ratio estimator (Cochran, 1977).

        Other seeds of a recorded trace are the same arrivals: they bring no more parts.
        """
        taken = pairs if spec.case in SESSIONS else pairs[:1]
        own = [part for mine, _ in taken for part in mine["parts_e2e_s"]]
        its = [part for _, other in taken for part in other["parts_e2e_s"]]
        ratio = fmean(own) / fmean(its)
        count = PARTS * len(taken)
        variance = sum((x - ratio * y) ** 2 for x, y in zip(own, its, strict=True)) / (count - 1) / count
        return T_VALUE * variance**0.5 / fmean(its)

    def first_ratios(self, spec: Spec, best: str, seeds: Sequence[int]) -> dict[str, Ratio]:
        """The figures that have floors, by name."""
        other = replace(spec, policy=best)
        return {
            MEAN: self.ratio(spec, other, MEAN, seeds, floor=MEAN_FLOORS.get(spec.gb_per_s, MOST_MEAN)),
            **{key: self.ratio(spec, other, key, seeds, floor=floor) for key, floor in OTHER_FLOORS.items()},
            "hits": self.hits(spec, seeds),
        }

    def hits(self, spec: Spec, seeds: Sequence[int]) -> Ratio:
        """Share of the prompt tokens that are found, to that of the router that finds most."""
        key = "cached_share"
        most = max(AFFINITY, key=lambda name: self.average(replace(spec, policy=name), key, seeds))
        found = self.ratio(spec, replace(spec, policy=most), key, seeds)
        return replace(found, floor=LEAST_HITS, is_least=True)
