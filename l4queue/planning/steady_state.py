"""The closed form of a stage: m workers of a length range, prefill first, decodes as a shared processor.

Per second the requests of a range make d decode steps over s context tokens and bring λ prompts of w ms of
prefill. One worker offers 1000 ms. In units of workers the load is

    R = (β·d + γ·s + σ·skew + Σλw + hand-over work) / 1000        ρ = R/m

*Decoding.* By Little's law with the n = D·t requests that decode at a rate D per worker, t = α + (β + γL)·n +
prefill gives t = α/(1-ρ).

*Prefill* goes before decodes, in chunks that fill a step: a prompt takes α + w, and the rest of the prefill
under way when it comes. With one queue for m workers that wait is that of M/G/m (Sakasegawa, 1977):

    W = Λ₂/(2Λ₁) · (P/m)^(√(2(m+1))-1) / (m-P)         Λ₁ = Σλw, Λ₂ = Σλw², P = Λ₁/1000

*Both.* A request meets the same backlog when it begins to decode, and as the lower class of a priority queue it
gets past it at the rate that is left: W/(1-ρ). So the requests in flight in a range are

    N = K·m/(m-R) + C + λW·(1 + m/(m-R))       K = Σ α·d,   C = Σ λ·(α+w) + hand-over delay

which is mean latency × rate. R, K, C, λ, Λ₁ and Λ₂ are sums over buckets: prefix sums give them for any range.
KV tokens in use are proportional to 1/(1-ρ) too, so the cache bound is linear in m: m ≥ R + (s·α + ...)/C.
docs/simulator.md has the error of this form against the simulation.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import StrEnum
from math import inf
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from l4queue.config import default_of
from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost
from l4queue.errors import ConfigError
from l4queue.planning.histogram import Buckets, Demand

__all__ = (
    "LONG_BOUND",
    "LONG_SHARE",
    "P99_BOUND",
    "P99_SHARE",
    "Objective",
    "PartitionSettings",
    "RangeTerms",
    "prefill_waits",
    "range_terms",
    "stage_cost",
)

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.intp]

LONG_SHARE = 0.05
"""The `long` class: this share of requests, those of greatest prompt + output; `short` is the rest."""
P99_SHARE = 0.01
"""The share of requests beyond the 99th percentile."""
LONG_BOUND, P99_BOUND = 1.25, 1.10
"""Chosen, factors against one stage: how much slower the longest requests, and the 99th percentile, may become for
the sake of the mean. docs/reproduction.md holds every policy against the same two."""


class Objective(StrEnum):
    """Objective of a partition."""

    #: requests in flight: mean end-to-end latency × rate
    MEAN = "mean"
    #: mean over requests of latency per output token × rate, ms/s
    NORMALIZED = "normalized"
    #: requests per second that miss the service level
    GOODPUT = "goodput"
    #: as `mean`, but what serves the longest requests may be slowed only within bounds against one stage
    BALANCED = "balanced"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionSettings:
    """Parameters of the closed form and of the search. Shares and factors have no unit."""

    objective: Objective = Objective.BALANCED
    max_stages: int = int(default_of("max_stages"))
    #: what a ms of waiting for the first token counts, in ms of latency
    ttft_weight: float = 1.0
    #: share of the KV cache kept free
    kv_margin: float = 0.1
    #: no stage is planned above this utilisation
    max_rho: float = 0.97
    #: the longest context of a batch is taken at this quantile of the stage's steps
    skew_quantile: float = 0.98
    #: the stages of the longest 5 % (1 %) may have steps at most this much slower than one stage would
    long_bound: float = LONG_BOUND
    p99_bound: float = P99_BOUND
    #: service level of `goodput`
    slo_ttft_ms: float = default_of("slo_ttft_ms")
    slo_tpot_ms: float = default_of("slo_tpot_ms")
    move_price: MovePrice = field(default_factory=MovePrice)
    #: False: no running request is moved, so a request stays where its prompt put it
    moves_requests: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.max_rho < 1.0 or not 0.0 <= self.kv_margin < 1.0:
            raise ConfigError(
                f"max_rho {self.max_rho} and kv_margin {self.kv_margin} must lie in (0, 1) and [0, 1)"
            )
        if self.long_bound < 1.0 or self.p99_bound < 1.0 or self.max_stages < 1:
            raise ConfigError("long_bound and p99_bound must be at least 1, and so must max_stages")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RangeTerms:
    """R, K, C and bounds of every range [i, j) of buckets, as (B+1)×(B+1) matrices; only i < j has a meaning.

    `least` is the smallest number of workers (a real number) with which the range keeps its bounds. `prefill` is P
    in workers, `wait` is λΛ₂/2Λ₁ in the unit of the objective, `wait_ms` Λ₂/2Λ₁ of one request.
    """

    load: Floats
    weight: Floats
    constant: Floats
    prefill: Floats
    wait: Floats
    wait_ms: Floats
    entries: Floats
    least: Floats
    requests: Floats
    ttft_ms: Floats
    step_rate: Floats
    kv_ms: Floats
    alpha_ms: float
    #: whole workers that keep the bounds, and log P: derived, kept because every evaluation needs them
    fewest: Floats
    log_prefill: Floats

    def of(self, *index: Ints) -> RangeTerms:
        """The terms of some ranges, in the shape of the indices: i and j, or places among those picked before."""
        picked = {name: getattr(self, name)[index] for name in _MATRICES}
        return RangeTerms(alpha_ms=self.alpha_ms, **picked)

    @property
    def num_buckets(self) -> int:
        """Number of buckets."""
        return len(self.load) - 1


_MATRICES = tuple(f.name for f in fields(RangeTerms) if f.name != "alpha_ms")


def range_terms(
    demand: Demand, *, buckets: Buckets, cost: StepCost, settings: PartitionSettings, num_workers: int
) -> RangeTerms:
    """Terms of all ranges. O(B²) memory and time; ranges that end before they begin are never read."""
    given = demand
    if not settings.moves_requests:
        demand = demand.by_arrival(buckets)
    per_bucket = _Amounts.of(demand, buckets=buckets, cost=cost, settings=settings)
    load = _ranges(per_bucket.load) + _skew_load(demand, cost=cost, quantile=settings.skew_quantile)
    constant = _ranges(per_bucket.constant)
    first, second = _ranges(per_bucket.prefill_ms), _ranges(per_bucket.prefill_ms2)
    entries = _ranges(demand.arrivals_per_s)
    steps = _ranges(demand.decode_steps_per_s)
    kv_ms = _ranges(per_bucket.kv_ms)
    if settings.moves_requests:
        inflow = np.append(demand.crossings_per_s(buckets), 0.0)[:, None]
        price = settings.move_price
        work = np.array([price.work_ms(e, cost) for e in buckets.edges] + [0.0])[:, None]
        delay = np.array([price.delay_ms(e, cost) for e in buckets.edges] + [0.0])[:, None]
        load = load + inflow * work / 1000.0
        first, second, entries = first + inflow * work, second + inflow * work**2, entries + inflow
        if settings.objective in (Objective.MEAN, Objective.BALANCED):
            constant = constant + inflow * delay / 1000.0
    wait_ms = _ratio(second, 2.0 * first)
    capacity = cost.kv_capacity_tokens * (1.0 - settings.kv_margin)
    least = load / settings.max_rho
    if capacity > 0.0:
        least = np.maximum(least, load + kv_ms / 1000.0 / capacity)
    if cost.max_num_seqs > 0:
        least = np.maximum(least, load + steps * cost.alpha_ms / 1000.0 / cost.max_num_seqs)
    requests = _ranges(per_bucket.requests)
    if settings.objective is Objective.BALANCED:
        least = _with_bounds(least, load, given, buckets=buckets, settings=settings, num_workers=num_workers)
    return RangeTerms(
        load=load,
        weight=_ranges(per_bucket.weight),
        constant=constant,
        prefill=first / 1000.0,
        wait=entries * wait_ms * per_bucket.wait_unit,
        wait_ms=wait_ms,
        entries=entries,
        least=least,
        requests=requests,
        ttft_ms=_ratio(_ranges(per_bucket.first_token_ms), _ranges(demand.arrivals_per_s)),
        step_rate=steps,
        kv_ms=kv_ms,
        alpha_ms=cost.alpha_ms,
        fewest=np.maximum(1.0, least * (1.0 - 1e-12)),
        log_prefill=_log(first / 1000.0),
    )


def stage_cost(terms: RangeTerms, m: Floats, *, settings: PartitionSettings) -> Floats:
    """Objective of stages over the ranges of `terms` with m workers; infinite where a bound is not kept.

    `goodput` counts misses: a latency with mean x meets a limit with probability 1/(1 + (x/limit)⁴), the
    log-logistic law; both limits must be met. An empty range costs nothing with one worker or more.
    """
    ok = (m >= terms.fewest) & (m > terms.load)
    slow = m / np.maximum(m - np.where(ok, terms.load, 0.0), 1e-9)
    rest = np.maximum(m - np.where(ok, terms.prefill, 0.0), 1e-9)
    waits = _waits(terms.log_prefill, m, rest)
    if settings.objective is not Objective.GOODPUT:
        value = terms.weight * slow + terms.constant + terms.wait * waits * (1.0 + slow)
        return np.where(ok, value, np.inf)
    tpot = np.square(slow * terms.alpha_ms / settings.slo_tpot_ms)
    ttft = np.square((terms.ttft_ms + terms.wait_ms * waits) / settings.slo_ttft_ms)
    met = 1.0 / ((1.0 + tpot * tpot) * (1.0 + ttft * ttft))  # x⁴, without the slow power
    return np.where(ok, terms.requests * (1.0 - met), np.inf)


def prefill_waits(prefill: float, m: int) -> float:
    """Wait of a prompt for prefill begun before it, in units of Λ₂/2Λ₁: zero without any prefill."""
    if prefill <= 0.0:
        return 0.0
    return (
        float(_waits(np.log([prefill]), np.array([float(m)]), np.array([m - prefill]))[0]) if m > prefill else inf
    )


def _waits(log_prefill: Floats, m: Floats, rest: Floats) -> Floats:
    """(P/m)^(√(2(m+1))-1)/(m-P), of log P and m - P > 0; at most 1/(m-P), also where no such m can be."""
    power = np.minimum(log_prefill - np.log(np.maximum(m, 1e-9)), 0.0) * (np.sqrt(2.0 * m + 2.0) - 1.0)
    return np.asarray(np.exp(power) / rest)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Amounts:
    """Per bucket, a second: load (workers), K, C (requests), Λ₁, Λ₂, shares of requests, KV·ms, ms to first token.

    `wait_unit` turns requests times ms of waiting per second into the unit of K and C.
    """

    load: Floats
    weight: Floats
    constant: Floats
    wait_unit: float
    prefill_ms: Floats
    prefill_ms2: Floats
    requests: Floats
    kv_ms: Floats
    first_token_ms: Floats

    @classmethod
    def of(cls, demand: Demand, *, buckets: Buckets, cost: StepCost, settings: PartitionSettings) -> _Amounts:
        rate = demand.arrivals_per_s
        prompt = np.where(rate > 0.0, demand.prompt_tokens_per_s / np.where(rate > 0.0, rate, 1.0), 0.0)
        prefill_ms = prompt * (cost.pi_ms + cost.psi_ms * prompt / 2)
        first_ms = rate * (cost.alpha_ms + prefill_ms)
        steps, context = demand.decode_steps_per_s, demand.context_tokens_per_s
        decode_ms = cost.beta_ms * steps + cost.gamma_ms * context
        total, total_steps = float(rate.sum()), float(steps.sum())
        # a request counts in each bucket with the share of its steps that it makes there
        shares = steps * (total / total_steps) if total_steps > 0.0 else rate
        if settings.objective is Objective.NORMALIZED:
            mean_output = max(1.0, total_steps / total) if total > 0.0 else 1.0
            weight, unit = shares * cost.alpha_ms, settings.ttft_weight / mean_output
        else:
            weight, unit = steps * cost.alpha_ms / 1000.0, settings.ttft_weight / 1000.0
        return cls(
            load=(decode_ms + rate * prefill_ms) / 1000.0,
            weight=weight,
            constant=first_ms * unit,
            wait_unit=unit,
            prefill_ms=rate * prefill_ms,
            prefill_ms2=rate * prefill_ms**2,
            requests=shares,
            kv_ms=context * cost.alpha_ms + first_ms * prompt / 2,
            first_token_ms=first_ms,
        )


def _ranges(per_bucket: Floats) -> Floats:
    """Sums over [i, j) for all i ≤ j."""
    total = np.concatenate(([0.0], np.cumsum(per_bucket)))
    return np.asarray(np.maximum(0.0, total[None, :] - total[:, None]))


def _log(values: Floats) -> Floats:
    return np.asarray(np.where(values > 0.0, np.log(np.where(values > 0.0, values, 1.0)), -np.inf))


def _ratio(top: Floats, bottom: Floats) -> Floats:
    return np.asarray(np.where(bottom > 0.0, top / np.where(bottom > 0.0, bottom, 1.0), 0.0))


def _skew_load(demand: Demand, *, cost: StepCost, quantile: float) -> Floats:
    """Load by the skew term: σ·(longest - mean) per step, longest at a quantile of the range's steps."""
    size = len(demand.decode_steps_per_s) + 1
    if cost.sigma_ms <= 0.0:
        return np.zeros((size, size))
    steps = np.concatenate(([0.0], np.cumsum(demand.decode_steps_per_s)))
    mean_in_bucket = _ratio(demand.context_tokens_per_s, demand.decode_steps_per_s)
    target = steps[:, None] + quantile * (steps[None, :] - steps[:, None])
    at = np.clip(np.searchsorted(steps, target, side="left") - 1, 0, size - 2)
    in_range = _ranges(demand.decode_steps_per_s)
    mean = _ratio(_ranges(demand.context_tokens_per_s), in_range)
    excess = np.maximum(0.0, mean_in_bucket[at] - mean)
    return np.asarray(cost.sigma_ms * in_range * excess / 1000.0)


def _with_bounds(
    least: Floats, load: Floats, demand: Demand, *, buckets: Buckets, settings: PartitionSettings, num_workers: int
) -> Floats:
    """Raise `least` where a range serves long requests: 1/(1-R/m) ≤ bound/(1-ρ of one stage).

    One stage itself always keeps the bounds, for they are at least 1.
    """
    end = len(load) - 1
    slack_of_one = 1.0 - float(load[0, end]) / max(1, num_workers)
    if slack_of_one <= 0.0:
        return least
    for share, bound in ((LONG_SHARE, settings.long_bound), (P99_SHARE, settings.p99_bound)):
        first = _first_long_bucket(demand, buckets=buckets, share=share)
        slack = slack_of_one / bound
        needs = load[:, first + 1 :] / (1.0 - slack)
        least[:, first + 1 :] = np.maximum(least[:, first + 1 :], needs)
    return least


def _first_long_bucket(demand: Demand, *, buckets: Buckets, share: float) -> int:
    """First bucket whose lower edge at most `share` of the requests reach; never beyond the last in use."""
    reach = demand.reach_per_s(buckets)
    used = np.flatnonzero((demand.arrivals_per_s > 0.0) | (demand.decode_steps_per_s > 0.0))
    if not used.size:
        return len(reach) - 1
    above = np.flatnonzero(reach <= share * float(demand.arrivals_per_s.sum()) * (1.0 + 1e-9))
    return int(min(above[0], used[-1])) if above.size else int(used[-1])
