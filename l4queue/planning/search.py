"""Exact search for the best boundaries and worker counts, for each number of stages.

    f_k[j][m] = min over i < j, m' < m of  f_{k-1}[i][m-m'] + g(i, j, m')

is the least cost of covering the buckets [0, j) by k stages with m workers. Two ways lead to the same optimum:

*dense*   the recurrence as it stands, O(k·B²·M²), vectorised: best while B·M is small
*pruned*  a price λ per worker removes m from the state (O(k·B²) per λ) and gives a lower bound for every plan
          that uses a stage (i, j, m); stages whose bound exceeds a known plan are dropped, and the recurrence runs
          over what is left, usually a few hundred of B²·M/2 stages

Ties: the lowest first boundary from the right, then the fewest workers in the last stage; always the same.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from l4queue.planning.steady_state import Objective, PartitionSettings, RangeTerms, stage_cost

__all__ = ("Split", "best_splits")

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.intp]

DENSE_LIMIT = 14_000_000
"""Largest B²·M² for which the dense recurrence is used."""

MOST_JOINS = 50_000_000
"""Labels times stages beyond which the best plan known is returned, not a proven optimum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Boundaries as bucket numbers (0 first, B last), workers per stage, and what it costs."""

    bounds: tuple[int, ...]
    workers: tuple[int, ...]
    cost: float


def best_splits(
    terms: RangeTerms, num_workers: int, *, settings: PartitionSettings, method: str = "auto"
) -> tuple[Split, ...]:
    """The cheapest split for each number of stages from 1 to `max_stages`, as far as one is possible.

    `method` is "dense", "pruned" or "auto". Empty when even one stage keeps no bound.
    """
    b = terms.num_buckets
    kmax = min(settings.max_stages, num_workers, b)
    one = _one_stage(terms, num_workers, settings=settings)
    if kmax < 1:
        return ()
    dense = method == "dense" or (method == "auto" and (b * num_workers) ** 2 <= DENSE_LIMIT)
    if kmax == 1:
        more: list[Split] = []
    elif dense:
        more = _dense(terms, num_workers, kmax, settings=settings)
    else:
        more = _Pruned(terms, num_workers, kmax, settings=settings).splits()
    return tuple(s for s in (one, *more) if np.isfinite(s.cost))


def _one_stage(terms: RangeTerms, num_workers: int, *, settings: PartitionSettings) -> Split:
    b = terms.num_buckets
    whole = terms.of(np.array([0]), np.array([b]))
    cost = stage_cost(whole, np.array([num_workers], dtype=np.float64), settings=settings)
    return Split(bounds=(0, b), workers=(num_workers,), cost=float(cost[0]))


# ---------------------------------------------------------------- dense


def _dense(terms: RangeTerms, num_workers: int, kmax: int, *, settings: PartitionSettings) -> list[Split]:
    b, m = terms.num_buckets, num_workers
    # g[m, i, j]: the number of workers first, so that each slice is one contiguous matrix
    g = np.full((m + 1, b + 1, b + 1), np.inf)
    i, j = np.triu_indices(b + 1, 1)
    counts = np.arange(m + 1, dtype=np.float64)[:, None]
    g[:, i, j] = stage_cost(terms.of(i[None, :], j[None, :]), counts, settings=settings)
    levels = [np.ascontiguousarray(g[:, 0, :].T)]  # f_1[j][m]
    splits: list[Split] = []
    for k in range(2, kmax + 1):
        total = _join(levels[-1][:b], g[:, :b, b], m)
        splits.append(_trace(levels, g, k, float(total.min())))
        if k < kmax:
            levels.append(_next_level(levels[-1], g, k))
    return splits


def _next_level(before: Floats, g: Floats, k: int) -> Floats:
    """f_k from f_{k-1} for all j < B and all m. Minima run over the first axis, which numpy does fastest."""
    b, m = g.shape[1] - 1, g.shape[0] - 1
    first = k - 1  # k-1 stages need at least as many buckets and as many workers
    after = np.full_like(before, np.inf)
    for used in range(1, m - first + 1):
        joined = before[first:b, None, first : m - used + 1] + g[used, first:b, k:b, None]
        if joined.size:
            part = after[k:b, first + used : m + 1]
            np.minimum(part, joined.min(axis=0), out=part)
    return after


def _join(before: Floats, last: Floats, m: int) -> Floats:
    """Cost of ending with a stage [i, j) of m' workers, all i and m' (0 to m), m workers in total."""
    return before[:, m::-1] + last[: m + 1].T


def _trace(levels: list[Floats], g: Floats, k: int, cost: float) -> Split:
    """Walk back from the end, taking the first of the best choices at each stage."""
    j, m = g.shape[1] - 1, g.shape[0] - 1
    bounds, workers = [j], []
    if np.isfinite(cost):
        for level in range(k - 1, 0, -1):
            choice = int(_join(levels[level - 1][:j], g[:, :j, j], m).argmin())
            i, used = divmod(choice, m + 1)
            bounds.append(i)
            workers.append(used)
            j, m = i, m - used
    return Split(bounds=(0, *reversed(bounds)), workers=(m, *reversed(workers)), cost=cost)


# ---------------------------------------------------------------- pruned


class _Pruned:
    """The search with a price per worker; holds the arrays that its steps share."""

    def __init__(self, terms: RangeTerms, num_workers: int, kmax: int, *, settings: PartitionSettings) -> None:
        self.m, self.kmax, self.settings = num_workers, kmax, settings
        self.b = terms.num_buckets
        self.i, self.j = np.triu_indices(self.b + 1, 1)
        self.whole = (terms.weight[0, -1] or terms.requests[0, -1], terms.load[0, -1])
        self.terms = terms = terms.of(self.i, self.j)
        self.known: dict[float, tuple[Floats, Floats]] = {}
        load, least = terms.load, terms.least
        lowest = np.maximum(1.0, np.ceil(least * (1.0 - 1e-12)))
        self.lowest = np.where(lowest > load, lowest, np.floor(load) + 1.0)
        self.load = load
        self.root = np.sqrt(terms.weight * load)
        self.is_open = self.lowest <= num_workers
        self.waits = terms.wait > 0.0
        self.table: Floats | None = None
        if settings.objective is Objective.GOODPUT:
            counts = np.arange(num_workers + 1, dtype=np.float64)[None, :]
            everything = np.arange(len(self.i))[:, None]
            self.table = stage_cost(terms.of(everything), counts, settings=settings)

    def splits(self) -> list[Split]:
        return [self._split(k) for k in range(2, self.kmax + 1)]

    def _split(self, k: int) -> Split:
        price, best = self._best_price(k)
        if best is None:
            return Split(bounds=(0, self.b), workers=(), cost=float("inf"))
        return self._exact(k, price, best)

    def _cost(self, pairs: Ints, m: Floats) -> Floats:
        return stage_cost(self.terms.of(pairs), m, settings=self.settings)

    def _priced(self, price: float) -> tuple[Floats, Floats]:
        """min over m of g + price·m for each range, and the m that gives it; infinite where none fits."""
        if self.table is not None:
            total = self.table + price * np.arange(self.m + 1)
            at = total.argmin(axis=1)
            return total[np.arange(len(at)), at], at.astype(np.float64)
        ideal = np.clip(self.load + self.root / np.sqrt(price), self.lowest, self.m)
        low, high = np.maximum(np.floor(ideal), self.lowest), np.minimum(np.ceil(ideal), self.m)
        low_cost = stage_cost(self.terms, low, settings=self.settings) + price * low
        high_cost = stage_cost(self.terms, high, settings=self.settings) + price * high
        take_low = low_cost <= high_cost
        total, at = np.where(take_low, low_cost, high_cost), np.where(take_low, low, high)
        # `ideal` leaves out the wait for prefill, which only asks for more: the sum is convex, so climb from there
        climbing = np.flatnonzero(self.is_open & self.waits & ((low == high) | ~take_low) & (at < self.m))
        while climbing.size:
            more = self._cost(climbing, at[climbing] + 1.0) + price * (at[climbing] + 1.0)
            better = more < total[climbing]
            climbing, more = climbing[better], more[better]
            at[climbing] += 1.0
            total[climbing] = more
            climbing = climbing[at[climbing] < self.m]
        return np.where(self.is_open, total, np.inf), at

    def _best_at(self, price: float) -> tuple[Floats, Floats]:
        """Least priced cost as a matrix, and the workers that give it by pair; kept, for each k begins alike."""
        if price not in self.known:
            cost, at = self._priced(price)
            self.known[price] = (self._matrix(cost), at)
        return self.known[price]

    def _pairs(self, bounds: tuple[int, ...]) -> Ints:
        """Numbers of the ranges between neighbouring bounds."""
        size = self.b + 1
        return np.array([i * size - i * (i + 1) // 2 + j - i - 1 for i, j in itertools.pairwise(bounds)])

    def _matrix(self, values: Floats) -> Floats:
        full = np.full((self.b + 1, self.b + 1), np.inf)
        full[self.i, self.j] = values
        return full

    def _forward(self, h: Floats, k: int) -> list[Floats]:
        """forward[p][j]: least priced cost of covering [0, j) by p stages."""
        start = np.full(self.b + 1, np.inf)
        start[0] = 0.0
        rows = [start]
        for _ in range(k):
            rows.append((rows[-1][:, None] + h).min(axis=0))
        return rows

    def _backward(self, h: Floats, k: int) -> list[Floats]:
        """backward[p][i]: least priced cost of covering [i, B) by p stages."""
        end = np.full(self.b + 1, np.inf)
        end[self.b] = 0.0
        rows = [end]
        for _ in range(k):
            rows.append((h + rows[-1][None, :]).min(axis=1))
        return rows

    def _best_price(self, k: int) -> tuple[float, Split | None]:
        """The price at which k stages ask for just about all workers, and a plan made from its boundaries.

        The lower bound is concave in the price and its slope is the number of workers asked for less those
        there are, so a bisection finds its top.
        """
        scale = self._first_price()
        low, high = scale / 4096.0, scale * 4096.0
        best: Split | None = None
        tried: set[tuple[int, ...]] = set()
        for _ in range(16):
            price = float(np.sqrt(low * high))
            h, at = self._best_at(price)
            rows = self._forward(h, k)
            if not np.isfinite(rows[k][self.b]):
                return price, None
            bounds = _walk_back(rows, h, k, self.b)
            asked = at[self._pairs(bounds)]
            if bounds not in tried:
                tried.add(bounds)
                plan = self._repaired(bounds, asked)
                if plan is not None and (best is None or plan.cost < best.cost):
                    best = plan
            if asked.sum() > self.m:
                low = price
            else:
                high = price
        return float(np.sqrt(low * high)), best

    def _first_price(self) -> float:
        weight, load = (float(x) for x in self.whole)
        spare = max(self.m - load, 0.5)
        return max(weight * max(load, 1e-3) / spare**2, 1e-12)

    def _repaired(self, bounds: tuple[int, ...], asked: Floats) -> Split | None:
        """Worker counts made to sum up: in proportion first, then one at a time, then by swaps that help."""
        pairs = self._pairs(bounds)
        lowest = self.lowest[pairs]
        spare = self.m - float(lowest.sum())
        if spare < 0:
            return None
        extra = asked - lowest
        total = float(extra.sum())
        workers = lowest + (np.floor(extra * min(1.0, spare / total)) if total > 0.0 else 0.0)
        while workers.sum() < self.m:
            short = self.m - workers.sum()
            jump = max(1.0, np.floor(short / (2 * len(workers))))
            won = self._cost(pairs, workers + jump) - self._cost(pairs, workers)
            workers[int(won.argmin())] += jump
        for _ in range(8 * len(workers)):
            here = self._cost(pairs, workers)
            more = self._cost(pairs, workers + 1) - here
            fewer = np.where(workers > lowest, self._cost(pairs, np.maximum(workers - 1, lowest)) - here, np.inf)
            to, source = int(more.argmin()), int(fewer.argmin())
            if to == source or not more[to] + fewer[source] < 0.0:
                break
            workers[to] += 1
            workers[source] -= 1
        cost = float(self._cost(pairs, workers).sum())
        return (
            Split(bounds=bounds, workers=tuple(int(w) for w in workers), cost=cost) if np.isfinite(cost) else None
        )

    def _exact(self, k: int, price: float, best: Split) -> Split:
        """The recurrence over the stages that may be part of a plan at least as cheap as `best`."""
        cost, _ = self._priced(price)
        h = self._matrix(cost)
        forward, backward = self._forward(h, k), self._backward(h, k)
        limit = best.cost * (1.0 + 1e-12) + price * self.m + 1e-15
        labels = _Labels.start()
        history = [labels]
        for p in range(1, k + 1):
            bound = forward[p - 1][self.i] + cost + backward[k - p][self.j]
            pairs = np.flatnonzero(bound <= limit)
            rest = backward[k - p][self.j[pairs]]
            arcs = self._arcs(pairs, limit - forward[p - 1][self.i[pairs]] - rest, price)
            if len(arcs[0]) * max(1, len(labels.at)) > MOST_JOINS:
                return best
            labels = labels.extended(arcs, backward[k - p], price=price, limit=limit, most=self.m - (k - p))
            history.append(labels)
        found = np.flatnonzero((labels.at == self.b) & (labels.used == self.m))
        if not found.size:
            return best
        return _unwind(history, int(found[labels.cost[found].argmin()]))

    def _arcs(self, pairs: Ints, slack: Floats, price: float) -> tuple[Ints, Ints, Ints, Floats]:
        """Stages (i, j, m) over these ranges whose priced cost is within the slack of their range."""
        m = np.arange(1, self.m + 1, dtype=np.float64)
        rows: list[tuple[Ints, Ints, Floats]] = []
        for part in np.array_split(np.arange(len(pairs)), max(1, len(pairs) // 512)):
            cost = self._cost(pairs[part][:, None], m[None, :])
            row, column = np.nonzero(cost + price * m <= slack[part][:, None])
            rows.append((part[row], column + 1, cost[row, column]))
        row = np.concatenate([r[0] for r in rows])
        chosen = pairs[row]
        return (
            self.i[chosen],
            self.j[chosen],
            np.concatenate([r[1] for r in rows]),
            np.concatenate([r[2] for r in rows]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Labels:
    """States reached after some stages: bucket, workers used, cost, and the label before."""

    at: Ints
    used: Ints
    cost: Floats
    parent: Ints

    @classmethod
    def start(cls) -> _Labels:
        zero = np.zeros(1, dtype=np.intp)
        return cls(at=zero, used=zero, cost=np.zeros(1), parent=zero)

    def extended(
        self, arcs: tuple[Ints, Ints, Ints, Floats], rest: Floats, *, price: float, limit: float, most: int
    ) -> _Labels:
        """All labels one stage further that may still end within the limit; the best of equal states."""
        i, j, m, g = arcs
        order = np.argsort(i, kind="stable")
        starts = np.searchsorted(i[order], np.arange(len(rest) + 1))
        parts: list[tuple[Ints, Ints, Floats, Ints]] = []
        for at in np.unique(self.at):
            arc = order[starts[at] : starts[at + 1]]
            label = np.flatnonzero(self.at == at)
            if not arc.size:
                continue
            used = self.used[label][:, None] + m[arc][None, :]
            cost = self.cost[label][:, None] + g[arc][None, :]
            keep = (used <= most) & (cost + price * used + rest[j[arc]][None, :] <= limit)
            row, column = np.nonzero(keep)
            parts.append((j[arc][column], used[row, column], cost[row, column], label[row]))
        if not parts:
            none = np.zeros(0, dtype=np.intp)
            return _Labels(at=none, used=none, cost=np.zeros(0), parent=none)
        at, used, cost, parent = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.lexsort((parent, cost, used, at))
        at, used, cost, parent = at[order], used[order], cost[order], parent[order]
        first = np.ones(len(at), dtype=bool)
        first[1:] = (at[1:] != at[:-1]) | (used[1:] != used[:-1])
        return _Labels(at=at[first], used=used[first], cost=cost[first], parent=parent[first])


def _walk_back(rows: list[Floats], h: Floats, k: int, end: int) -> tuple[int, ...]:
    bounds = [end]
    for p in range(k, 0, -1):
        bounds.append(int((rows[p - 1] + h[:, bounds[-1]]).argmin()))
    return tuple(reversed(bounds))


def _unwind(history: list[_Labels], last: int) -> Split:
    bounds, workers = [], []
    total = float(history[-1].cost[last])
    for p in range(len(history) - 1, 0, -1):
        labels = history[p]
        bounds.append(int(labels.at[last]))
        before = int(labels.parent[last])
        workers.append(int(labels.used[last] - history[p - 1].used[before]))
        last = before
    return Split(bounds=(0, *reversed(bounds)), workers=tuple(reversed(workers)), cost=total)
