"""Refinement between replans: each boundary moves by at most one bucket, and only where it clearly pays."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from l4queue.models import Plan
from l4queue.planning.partition import PartitionProblem

__all__ = ("Refinement", "refine")


@dataclass(frozen=True, slots=True, kw_only=True)
class Refinement:
    """The plan with moved boundaries, or None when it is best left alone."""

    plan: Plan | None
    reason: str


def refine(plan: Plan, problem: PartitionProblem, *, min_gain: float = 0.01) -> Refinement:
    """Move each boundary by at most one bucket if that lowers the objective of its two stages by `min_gain`.

    Lowest boundary first; each sees those before it moved. Worker counts stay. `problem` holds the demand
    observed now, backlog included, and the number of workers of the plan. While a stage is overrun, the
    boundary moves to where it is less so. The objective falls strictly, so repeated use settles; a pair for
    which neither side pays is a fixed point. Boundaries off the bucket edges count as on the nearest edge.
    A plan of one stage, or with a stage without workers, is left alone; so is one that only a replay found good.
    """
    if plan.details.get("is_proven"):
        return Refinement(plan=None, reason="proven by replay against the closed form")
    workers = [s.num_workers for s in plan.stages]
    buckets = problem.buckets
    bounds = [buckets.edge_near(s.low_tokens) for s in plan.stages] + [len(buckets)]
    if len(workers) == 1 or min(workers) < 1 or any(a >= b for a, b in itertools.pairwise(bounds)):
        return Refinement(plan=None, reason="nothing to refine")
    moved = []
    for i in range(1, len(workers)):
        here = _pair(problem, bounds, workers, i, bounds[i])
        best, best_value = bounds[i], here
        for place in (bounds[i] - 1, bounds[i] + 1):
            if bounds[i - 1] < place < bounds[i + 1]:
                value = _pair(problem, bounds, workers, i, place)
                if value < best_value and _saves(value, here, min_gain):
                    best, best_value = place, value
        if best != bounds[i]:
            bounds[i] = best
            moved.append(i)
    if not moved:
        return Refinement(plan=None, reason="balanced")
    edges = [buckets.edges[b] for b in bounds[:-1]]
    stages = tuple(
        replace(s, low_tokens=low, high_tokens=high)
        for s, low, high in zip(plan.stages, edges, [*edges[1:], None], strict=True)
    )
    return Refinement(
        plan=replace(plan, version=plan.version + 1, stages=stages, reason="refined"),
        reason="moved boundary " + ", ".join(str(i) for i in moved),
    )


def _pair(
    problem: PartitionProblem, bounds: list[int], workers: list[int], i: int, place: int
) -> tuple[float, float]:
    """Objective of the two stages beside boundary i, were it at `place`, and before it how far they are overrun.

    While both places break a bound the objective is infinite in both; the overrun still says which is nearer.
    """
    places, counts = (bounds[i - 1], place, bounds[i + 1]), (workers[i - 1], workers[i])
    return max(1.0, problem.strain(places, counts)), problem.objective(places, counts)


def _saves(value: tuple[float, float], here: tuple[float, float], min_gain: float) -> bool:
    """Whether a place is better by the share asked for: less overrun, or as little and a lower objective."""
    if value[0] != here[0]:
        return value[0] <= here[0] * (1.0 - min_gain) or (value[0] == 1.0 and here[1] == float("inf"))
    return value[1] <= here[1] * (1.0 - min_gain)
