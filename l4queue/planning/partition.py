"""The best partition of the length range into stages, and the predicted cost of any given one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from l4queue.cost.step import StepCost
from l4queue.errors import ConfigError
from l4queue.planning.histogram import Buckets, Demand
from l4queue.planning.search import Split, best_splits
from l4queue.planning.steady_state import PartitionSettings, RangeTerms, prefill_waits, range_terms, stage_cost

__all__ = ("Partition", "PartitionProblem", "StagePrediction", "partition")

OVERLOAD_RHO = 0.92
"""Demand beyond this utilisation of one stage is scaled down to it before the search: no plan serves more,
but shares of workers still have to be found, and a plan at the edge would be infinite or arbitrary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePrediction:
    """A stage and its steady state by the closed form. `step_ms` is the time per output token."""

    low_tokens: int
    high_tokens: int | None
    num_workers: int
    rho: float
    step_ms: float
    ttft_ms: float
    in_flight: float
    kv_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """Stages with their predictions. `demand_scale` < 1 says that the demand exceeds what can be served."""

    stages: tuple[StagePrediction, ...]
    objective: float
    objective_one_stage: float
    demand_scale: float = 1.0

    @property
    def gain(self) -> float:
        """Share of the objective of one stage that the partition saves, at least minus one."""
        if not np.isfinite(self.objective) or self.objective_one_stage <= 0.0:
            return 0.0 if self.objective == self.objective_one_stage else -1.0
        return max(-1.0, 1.0 - self.objective / self.objective_one_stage)


class PartitionProblem:
    """One demand on a number of workers, ready to be solved or to judge given partitions.

    Building it takes O(B²). Zero workers is an error of the caller, as is a demand of another size.
    """

    def __init__(
        self, demand: Demand, num_workers: int, *, buckets: Buckets, cost: StepCost, settings: PartitionSettings
    ) -> None:
        if num_workers < 1:
            raise ConfigError(f"a partition needs at least one worker, got {num_workers}")
        if len(demand.arrivals_per_s) != len(buckets):
            raise ConfigError(f"the demand has {len(demand.arrivals_per_s)} buckets, expected {len(buckets)}")
        self.given = demand
        self.num_workers = num_workers
        self.buckets = buckets
        self.cost = cost
        self.settings = settings
        self.demand = demand
        self.terms: RangeTerms = range_terms(
            demand, buckets=buckets, cost=cost, settings=settings, num_workers=num_workers
        )
        self.demand_scale = _servable_share(self.terms, num_workers, cost=cost, settings=settings)
        if self.demand_scale < 1.0:
            self.demand = demand.scaled(self.demand_scale)
            self.terms = range_terms(
                self.demand, buckets=buckets, cost=cost, settings=settings, num_workers=num_workers
            )
        self.one_stage_objective = self.objective((0, len(buckets)), (num_workers,))

    def candidates(self, *, method: str = "auto") -> tuple[Partition, ...]:
        """The best partition for each possible number of stages, fewest first; one stage is always there."""
        splits = best_splits(self.terms, self.num_workers, settings=self.settings, method=method)
        found = tuple(self.of_split(split) for split in splits)
        return found or (self.judge((), (self.num_workers,)),)

    def under(self, settings: PartitionSettings) -> PartitionProblem:
        """The same demand and workers judged by other settings."""
        return PartitionProblem(
            self.given, self.num_workers, buckets=self.buckets, cost=self.cost, settings=settings
        )

    def judge(self, boundaries_tokens: Sequence[int], workers: Sequence[int]) -> Partition:
        """Predict a given partition; boundaries are moved to the nearest bucket edge.

        Stages that become empty of buckets by that have no meaning: a ConfigError.
        """
        bounds = (0, *(self.buckets.edge_near(b) for b in boundaries_tokens), len(self.buckets))
        if len(bounds) != len(workers) + 1 or any(a >= b for a, b in itertools.pairwise(bounds)):
            raise ConfigError(
                f"boundaries {tuple(boundaries_tokens)} and workers {tuple(workers)} make no partition"
            )
        return self.of_split(Split(bounds=bounds, workers=tuple(workers), cost=self.objective(bounds, workers)))

    def of_split(self, split: Split) -> Partition:
        """A split in bucket numbers as stages in tokens, with predictions."""
        stages = tuple(
            self._predict(i, j, m) for i, j, m in zip(split.bounds, split.bounds[1:], split.workers, strict=False)
        )
        return Partition(
            stages=stages,
            objective=split.cost,
            objective_one_stage=self.one_stage_objective,
            demand_scale=self.demand_scale,
        )

    def objective(self, bounds: Sequence[int], workers: Sequence[int]) -> float:
        """Objective of neighbouring stages given by bucket numbers; infinite where a bound is not kept."""
        i, j = np.array(bounds[:-1]), np.array(bounds[1:])
        return float(
            stage_cost(self.terms.of(i, j), np.array(workers, dtype=np.float64), settings=self.settings).sum()
        )

    def strain(self, bounds: Sequence[int], workers: Sequence[int]) -> float:
        """Workers needed over workers there, of the stage where that is worst; above 1 a bound is broken."""
        least = self.terms.least[np.array(bounds[:-1]), np.array(bounds[1:])]
        return float((least / np.maximum(np.array(workers, dtype=np.float64), 1e-9)).max())

    def _predict(self, i: int, j: int, m: int) -> StagePrediction:
        terms, edges = self.terms, self.buckets.edges
        load = float(terms.load[i, j])
        slow = m / (m - load) if m > load else float("inf")
        wait_ms = float(terms.wait_ms[i, j])
        wait_ms *= prefill_waits(float(terms.prefill[i, j]), m) if wait_ms else 1.0
        steps, entries = float(terms.step_rate[i, j]), float(terms.entries[i, j])
        own_ms = steps * terms.alpha_ms + entries * wait_ms
        capacity = m * self.cost.kv_capacity_tokens
        return StagePrediction(
            low_tokens=edges[i],
            high_tokens=edges[j] if j < len(edges) else None,
            num_workers=m,
            rho=load / m if m else float("inf"),
            step_ms=(own_ms / steps if steps else terms.alpha_ms) * slow,
            ttft_ms=float(terms.ttft_ms[i, j]) + wait_ms,
            in_flight=own_ms / 1000.0 * slow if steps else 0.0,
            kv_share=float(terms.kv_ms[i, j]) / 1000.0 * slow / capacity if capacity else 0.0,
        )


def partition(
    demand: Demand,
    num_workers: int,
    *,
    buckets: Buckets,
    cost: StepCost,
    settings: PartitionSettings | None = None,
) -> Partition:
    """The partition with the least objective; of equals the one with the fewest stages."""
    problem = PartitionProblem(
        demand, num_workers, buckets=buckets, cost=cost, settings=settings or PartitionSettings()
    )
    candidates = problem.candidates()
    return min(
        candidates, key=lambda p: (p.objective * (1.0 if len(p.stages) == 1 else 1.0 + 1e-9), len(p.stages))
    )


def _servable_share(terms: RangeTerms, num_workers: int, *, cost: StepCost, settings: PartitionSettings) -> float:
    """Largest share of the demand that one stage serves at `OVERLOAD_RHO` and within its other bounds."""
    load, steps, kv_ms = (float(m[0, -1]) for m in (terms.load, terms.step_rate, terms.kv_ms))
    capacity = cost.kv_capacity_tokens * (1.0 - settings.kv_margin)
    least = load / min(settings.max_rho, OVERLOAD_RHO)
    if capacity > 0.0:
        least = max(least, load + kv_ms / 1000.0 / capacity)
    if cost.max_num_seqs > 0:
        least = max(least, load + steps * cost.alpha_ms / 1000.0 / cost.max_num_seqs)
    return 1.0 if least <= num_workers else num_workers / least * (1.0 - 1e-9)
