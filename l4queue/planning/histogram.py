"""Length histograms: log-spaced buckets, counters that only grow, and the demand rates read from them.

A request with prompt p and output o arrives in the bucket of p, where its prompt is prefilled. It makes one decode
step at each length from p to p+o, so it contributes to every bucket between the two.

Four counters per bucket: arrivals, prompt tokens, decode steps, and the context of these steps. As fields of a
Redis hash they are `a:<bucket>`, `p:<bucket>`, `d:<bucket>`, `c:<bucket>`.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from l4queue.errors import ConfigError

__all__ = (
    "Buckets",
    "Counts",
    "Demand",
    "counts_of",
    "difference",
    "growth_fields",
    "merge",
    "with_backlog",
    "with_unfinished",
)

Floats: TypeAlias = npt.NDArray[np.float64]

FIELDS = ("a", "p", "d", "c")


@dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    """Length buckets: number i holds lengths in [edges[i], edges[i+1]), the last one everything above.

    Edges do not depend on the largest length, so an index means the same range in every deployment.
    """

    edges: tuple[int, ...]

    def __post_init__(self) -> None:
        edges = self.edges
        if not edges or edges[0] != 0 or any(a >= b for a, b in itertools.pairwise(edges)):
            raise ConfigError(f"bucket edges must start at 0 and rise strictly, got {edges[:8]}")

    @classmethod
    def log_spaced(cls, max_tokens: int = 131_072, *, per_octave: int = 4, first_tokens: int = 16) -> Buckets:
        """One bucket below `first_tokens`, then `per_octave` per doubling until `max_tokens` is covered."""
        edges = [0]
        step = 0
        while (edge := round(first_tokens * 2 ** (step / per_octave))) < max_tokens:
            if edge > edges[-1]:
                edges.append(edge)
            step += 1
        return cls(edges=tuple(edges))

    def __len__(self) -> int:
        return len(self.edges)

    def index(self, length_tokens: int) -> int:
        """Bucket of a length; an edge belongs to the upper bucket, lengths above the end to the last."""
        return max(0, bisect_right(self.edges, length_tokens) - 1)

    def edge_near(self, length_tokens: int) -> int:
        """Index of the edge with the nearest logarithm to a length (the lower one of two)."""
        upper = self.index(length_tokens)
        if upper + 1 >= len(self.edges) or length_tokens <= self.edges[upper]:
            return upper
        low, high = max(1, self.edges[upper]), self.edges[upper + 1]
        return upper if length_tokens * length_tokens <= low * high else upper + 1

    @property
    def low_tokens(self) -> Floats:
        """Lower edges."""
        return np.asarray(self.edges, dtype=np.float64)

    @property
    def width_tokens(self) -> Floats:
        """Widths; the open last bucket counts as wide as its neighbour in proportion."""
        edges = self.low_tokens
        if len(edges) == 1:
            return np.ones(1)
        last = edges[-1] * (edges[-1] / edges[-2] - 1.0) if edges[-2] > 0 else edges[-1]
        return np.append(np.diff(edges), last)

    @property
    def middle_tokens(self) -> Floats:
        """A typical length of each bucket: the middle."""
        return self.low_tokens + self.width_tokens / 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Counts:
    """Amounts per bucket, gathered in `observed_s` seconds. After a decay both have shrunk alike."""

    arrivals: Floats
    prompt_tokens: Floats
    decode_steps: Floats
    context_tokens: Floats
    observed_s: float = 0.0

    @classmethod
    def zero(cls, buckets: Buckets) -> Counts:
        """Nothing, seen for no time."""
        n = len(buckets)
        return cls(
            arrivals=np.zeros(n), prompt_tokens=np.zeros(n), decode_steps=np.zeros(n), context_tokens=np.zeros(n)
        )

    @classmethod
    def from_fields(cls, buckets: Buckets, fields: Mapping[str, str | int], *, observed_s: float = 0.0) -> Counts:
        """Read hash fields such as `a:12`; buckets beyond the last are added to it, others are ignored."""
        table = np.zeros((4, len(buckets)))
        for name, value in fields.items():
            kind, _, number = name.partition(":")
            if kind in FIELDS and number.isdecimal() and len(number) < 10:
                table[FIELDS.index(kind), min(int(number), len(buckets) - 1)] += float(value)
        return cls._of_table(table, observed_s)

    def to_fields(self) -> dict[str, int]:
        """The inverse of `from_fields`, rounded to whole numbers, zeros left out."""
        return {
            f"{kind}:{i}": round(float(value))
            for kind, row in zip(FIELDS, self._table(), strict=True)
            for i, value in enumerate(row)
            if round(float(value))
        }

    def decay(self, elapsed_s: float, *, half_life_s: float) -> Counts:
        """Forget: after one half-life everything, the observed time included, has half its weight."""
        factor = 0.5 ** (max(0.0, elapsed_s) / half_life_s)
        return self._of_table(self._table() * factor, self.observed_s * factor)

    def quantile(self, share: float, buckets: Buckets) -> int:
        """Upper edge of the bucket at which `share` of the arrivals is reached, tokens; 0 when empty."""
        total = float(self.arrivals.sum())
        if total <= 0.0:
            return 0
        i = int(np.searchsorted(np.cumsum(self.arrivals), min(max(share, 0.0), 1.0) * total * (1 - 1e-12)))
        i = min(i, len(buckets) - 1)
        return buckets.edges[i + 1] if i + 1 < len(buckets) else ceil(buckets.edges[i] + buckets.width_tokens[i])

    def demand(self) -> Demand:
        """Rates per second; all zero when nothing has been observed."""
        scale = 1.0 / self.observed_s if self.observed_s > 0.0 else 0.0
        return Demand(
            arrivals_per_s=self.arrivals * scale,
            prompt_tokens_per_s=self.prompt_tokens * scale,
            decode_steps_per_s=self.decode_steps * scale,
            context_tokens_per_s=self.context_tokens * scale,
            window_s=self.observed_s,
        )

    def _table(self) -> Floats:
        return np.stack((self.arrivals, self.prompt_tokens, self.decode_steps, self.context_tokens))

    @classmethod
    def _of_table(cls, table: Floats, observed_s: float) -> Counts:
        return cls(
            arrivals=table[0],
            prompt_tokens=table[1],
            decode_steps=table[2],
            context_tokens=table[3],
            observed_s=observed_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Demand:
    """Traffic as rates per bucket. `context_tokens_per_s` sums the lengths at which the steps are made.

    `window_s` says over how long the rates were seen; a backlog is worked off over that time.
    """

    arrivals_per_s: Floats
    prompt_tokens_per_s: Floats
    decode_steps_per_s: Floats
    context_tokens_per_s: Floats
    window_s: float = 60.0

    @classmethod
    def of_requests(
        cls, buckets: Buckets, prompts: npt.ArrayLike, outputs: npt.ArrayLike, *, duration_s: float
    ) -> Demand:
        """The demand of requests that arrived within `duration_s` seconds."""
        return counts_of(buckets, prompts, outputs, observed_s=duration_s).demand()

    @property
    def is_empty(self) -> bool:
        """Whether nothing arrives and nothing is decoded."""
        return float(self.arrivals_per_s.sum()) <= 0.0 and float(self.decode_steps_per_s.sum()) <= 0.0

    def scaled(self, factor: float) -> Demand:
        """The same mix at another rate."""
        return Demand(
            arrivals_per_s=self.arrivals_per_s * factor,
            prompt_tokens_per_s=self.prompt_tokens_per_s * factor,
            decode_steps_per_s=self.decode_steps_per_s * factor,
            context_tokens_per_s=self.context_tokens_per_s * factor,
            window_s=self.window_s,
        )

    def crossings_per_s(self, buckets: Buckets) -> Floats:
        """Requests per second that grow past the lower edge of each bucket; 0 at the first.

        Decode steps per token of length *are* the rate of requests that pass this length. At an edge the
        densities of both sides are averaged; no more can pass than have arrived below.
        """
        density = self.decode_steps_per_s / buckets.width_tokens
        flow = np.zeros_like(density)
        flow[1:] = np.minimum((density[:-1] + density[1:]) / 2, np.cumsum(self.arrivals_per_s)[:-1])
        return flow

    def origins(self, buckets: Buckets) -> Floats:
        """Share of the steps in a bucket (row) that requests make which arrived in another (column).

        What is in a bucket has arrived there or grew out of the one below, in proportion to the two rates.
        Rows sum to one; a bucket that nothing enters counts as its own origin.
        """
        size = len(buckets)
        share = np.eye(size)
        flow = self.crossings_per_s(buckets).tolist()
        for i, (rate, inflow) in enumerate(zip(self.arrivals_per_s.tolist(), flow, strict=True)):
            if i and inflow > 0.0:
                share[i] = share[i - 1] * (inflow / (rate + inflow))
                share[i, i] = rate / (rate + inflow)
        return share

    def by_arrival(self, buckets: Buckets) -> Demand:
        """The same demand with all steps counted in the bucket where the request arrived."""
        share = self.origins(buckets)
        return replace(
            self,
            decode_steps_per_s=self.decode_steps_per_s @ share,
            context_tokens_per_s=self.context_tokens_per_s @ share,
        )

    def reach_per_s(self, buckets: Buckets) -> Floats:
        """Requests per second that get at least as long as each lower edge."""
        above = np.cumsum(self.arrivals_per_s[::-1])[::-1]
        return above + self.crossings_per_s(buckets)


def counts_of(
    buckets: Buckets, prompts: npt.ArrayLike, outputs: npt.ArrayLike, *, observed_s: float = 0.0
) -> Counts:
    """Counts of whole requests: prompts and outputs in tokens. The j-th step is made at length p+j."""
    p = np.asarray(prompts, dtype=np.float64)
    o = np.asarray(outputs, dtype=np.float64)
    edges = buckets.low_tokens
    index = np.maximum(0, np.searchsorted(edges, p, side="right") - 1)
    upper = np.append(edges[1:], np.inf)
    low = np.maximum(p[:, None], edges[None, :]) if p.size else np.zeros((0, len(edges)))
    steps = np.maximum(0.0, np.minimum((p + o)[:, None], upper[None, :]) - low)
    return Counts(
        arrivals=np.bincount(index, minlength=len(edges)).astype(np.float64),
        prompt_tokens=np.bincount(index, weights=p, minlength=len(edges)).astype(np.float64),
        decode_steps=steps.sum(axis=0),
        context_tokens=(steps * (low + (steps - 1.0) / 2)).sum(axis=0),
        observed_s=observed_s,
    )


def growth_fields(buckets: Buckets, *, from_tokens: int, to_tokens: int) -> dict[str, int]:
    """Hash increments of one request that grew from one length to another: `d:` and `c:` fields.

    Step j is made at length from+j, so the steps are at the lengths in [from, to).
    """
    fields: dict[str, int] = {}
    start = from_tokens
    while start < to_tokens:
        i = buckets.index(start)
        end = min(to_tokens, buckets.edges[i + 1]) if i + 1 < len(buckets.edges) else to_tokens
        fields[f"d:{i}"] = end - start
        fields[f"c:{i}"] = (start + end - 1) * (end - start) // 2
        start = end
    return fields


def merge(*parts: Counts) -> Counts:
    """Sum of everything, observed time included: pass the time with one part only when parts overlap."""
    if not parts:
        raise ConfigError("nothing to merge: give at least one histogram")
    return Counts._of_table(
        sum((p._table() for p in parts[1:]), parts[0]._table()), sum(p.observed_s for p in parts)
    )


def difference(later: Counts, earlier: Counts, *, elapsed_s: float) -> Counts:
    """Increase between two readings of growing counters, `elapsed_s` apart.

    Where a counter is lower than before it was reset in between: then the later reading counts whole.
    """
    after, before = later._table(), earlier._table()
    return Counts._of_table(np.where(after >= before, after - before, after), max(0.0, elapsed_s))


def with_backlog(demand: Demand, queued: Iterable[tuple[int, int]], *, buckets: Buckets) -> Demand:
    """Demand that also works off the backlog within the window: arrivals × (1 + queued/arrived).

    `queued` holds pairs of bucket and number of waiting requests. Served tokens alone would show a saturated
    class no more than its own capacity, and it would starve. Decode steps in a bucket come from requests that
    arrived there and from requests that grew into it; each part is raised by the factor of where it came from.
    Requests of a bucket that saw no arrivals are taken to be of its middle length and of average output.
    """
    window_s = demand.window_s if demand.window_s > 0.0 else 1.0
    extra = np.zeros(len(buckets))
    for bucket, number in queued:
        extra[min(max(0, bucket), len(buckets) - 1)] += number / window_s
    if not extra.any():
        return demand
    arrivals = demand.arrivals_per_s
    total = float(arrivals.sum())
    mean_output = float(demand.decode_steps_per_s.sum()) / total if total > 0.0 else 0.0
    factor = np.where(arrivals > 0.0, 1.0 + extra / np.where(arrivals > 0.0, arrivals, 1.0), 1.0)
    unseen = np.where(arrivals > 0.0, 0.0, extra)
    mixed = demand.origins(buckets) @ factor
    middle = buckets.middle_tokens
    return Demand(
        arrivals_per_s=arrivals * factor + unseen,
        prompt_tokens_per_s=demand.prompt_tokens_per_s * factor + unseen * middle,
        decode_steps_per_s=demand.decode_steps_per_s * mixed + unseen * mean_output,
        context_tokens_per_s=demand.context_tokens_per_s * mixed
        + unseen * mean_output * (middle + mean_output / 2),
        window_s=demand.window_s,
    )


def with_unfinished(demand: Demand, num_running: int) -> Demand:
    """Demand in which the steps that running requests have yet to make count as well.

    Prompts are counted when they come, decode steps when they are made, so that a system that fills up shows too
    few steps for its arrivals. Requests that run are half done on average: the A arrivals of the window
    account for the steps of A - N/2. Over a long window, in which as many were running at the start, the
    difference is small; at most the steps are doubled.
    """
    arrived = float(demand.arrivals_per_s.sum()) * demand.window_s
    if arrived <= 0.0:
        return demand
    factor = 1.0 / max(0.5, 1.0 - num_running / 2.0 / arrived)
    return replace(
        demand,
        decode_steps_per_s=demand.decode_steps_per_s * factor,
        context_tokens_per_s=demand.context_tokens_per_s * factor,
    )
