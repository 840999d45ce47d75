"""Further plans for a replay to try, since the closed form knows nothing of stealing."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from l4queue.planning.partition import Partition, PartitionProblem

__all__ = ("MOST_WORKERS", "proposals")

Floats: TypeAlias = npt.NDArray[np.float64]

MOST_WORKERS = 8
"""Beyond it the closed form is good enough on its own, and a replay costs more."""
_REQUEST_SHARES = (0.5, 0.75, 0.9, 0.95)
"""Shares of the requests below a boundary. Chosen: from the median to the longest twentieth, where lengths
spread."""
_WORK_SHARES = (0.3, 0.5, 0.7)
"""Shares of the work below a boundary. Chosen: around the even split. Every share more is a replay more."""
_EMPTY_SHARE = 0.001
"""A bucket with less of the requests than this belongs to a gap between kinds of requests."""


def proposals(problem: PartitionProblem) -> tuple[Partition, ...]:
    """At most eight partitions into two stages, for fleets of up to `MOST_WORKERS`; none for larger ones.

    Boundaries lie in the widest gap of the lengths and where given shares of the requests, or of the work, are
    below. Workers are in proportion to the work, so that a stage may be more than full: on a small fleet it lives
    by what others steal from it. Their objective may therefore be infinite.
    """
    workers, buckets = problem.num_workers, problem.buckets
    if not 2 <= workers <= MOST_WORKERS or len(buckets) < 2:
        return ()
    requests = np.cumsum(problem.demand.arrivals_per_s)
    work = problem.terms.load[0, 1:]
    found: dict[int, int] = {}
    edges = _gap(problem.demand.arrivals_per_s)
    for below, shares in ((requests, _REQUEST_SHARES), (work, _WORK_SHARES)):
        total = float(below[-1])
        if total <= 0.0:
            continue
        edges += [int(np.abs(below[:-1] / total - share).argmin()) + 1 for share in shares]
    for edge in edges:
        if 0.0 < requests[edge - 1] < requests[-1]:
            part = float(work[edge - 1]) / float(work[-1])
            found[edge] = min(workers - 1, max(1, round(part * workers)))
    return tuple(
        problem.judge((buckets.edges[edge],), (count, workers - count)) for edge, count in sorted(found.items())
    )


def _gap(arrivals: Floats) -> list[int]:
    """The lower end of the longest run of nearly empty buckets with requests on both sides; none without one."""
    is_full = np.flatnonzero(arrivals > _EMPTY_SHARE * float(arrivals.sum()))
    if len(is_full) < 2:
        return []
    widths = np.diff(is_full)
    return [int(is_full[widths.argmax()]) + 1] if widths.max() > 1 else []
