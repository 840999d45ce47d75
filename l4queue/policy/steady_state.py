"""The closed form of a stage: m workers that share the work of a length range as a processor does.

Per second the requests of a range make d decode steps over s context tokens and bring W ms of prefill. One
worker offers 1000 ms. In units of workers the load is

    R = (β·d + γ·s + σ·skew + f·W + hand-over work) / 1000        ρ = R/m

and, by Little's law with the n = D·t requests that decode at a rate D per worker, t = α + (β + γL)·n + prefill
gives t = α/(1-ρ). A piece of prefill work w takes (α+w)/(1-ρ). So the requests in flight in a range are

    N = K·m/(m-R)    K = Σ α·d + ttft_weight·Σ λ·(α+w) + hand-over delay, all per second, in requests

which is mean latency × rate. R and K are sums over buckets, so prefix sums give them for any range at once.
KV tokens in use are proportional to 1/(1-ρ) too, so the cache bound is linear in m: m ≥ R + (s·α + ...)/C.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from l4queue.errors import ConfigError
from l4queue.policy.cost import StepCost
from l4queue.policy.histogram import Buckets, Demand
from l4queue.policy.prices import MovePrice

__all__ = ("Objective", "PartitionSettings", "RangeTerms", "range_terms", "stage_cost")

Floats: TypeAlias = npt.NDArray[np.float64]


class Objective(StrEnum):
    """What a partition minimises."""

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
    max_stages: int = 4
    #: the reading of weights and caches hides under prefill, so prefill weighs less than alone
    prefill_overlap: float = 0.87
    #: what a ms of waiting for the first token counts, in ms of latency
    ttft_weight: float = 1.0
    #: share of the KV cache kept free
    kv_margin: float = 0.1
    #: no stage is planned above this utilisation
    max_rho: float = 0.97
    #: the longest context of a batch is taken at this quantile of the stage's steps
    skew_quantile: float = 0.98
    #: the stages of the longest 5 % (1 %) may have steps at most this much slower than one stage would
    long_bound: float = 1.25
    p99_bound: float = 1.10
    #: service level of `goodput`
    slo_ttft_ms: float = 5000.0
    slo_tpot_ms: float = 100.0
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
    """R, K and bounds of every range [i, j) of buckets, as (B+1)×(B+1) matrices; only i < j has a meaning.

    `least` is the smallest number of workers (a real number) with which the range keeps its bounds.
    """

    load: Floats
    weight: Floats
    least: Floats
    requests: Floats
    ttft_ms: Floats
    step_rate: Floats
    kv_ms: Floats
    alpha_ms: float

    @property
    def num_buckets(self) -> int:
        """Number of buckets."""
        return len(self.load) - 1


def range_terms(
    demand: Demand, *, buckets: Buckets, cost: StepCost, settings: PartitionSettings, num_workers: int
) -> RangeTerms:
    """Terms of all ranges. O(B²) memory and time; ranges that end before they begin are never read."""
    given = demand
    if not settings.moves_requests:
        demand = demand.by_arrival(buckets)
    per_bucket = _Amounts.of(demand, buckets=buckets, cost=cost, settings=settings)
    load = _ranges(per_bucket.load) + _skew_load(demand, cost=cost, quantile=settings.skew_quantile)
    weight = _ranges(per_bucket.weight)
    steps = _ranges(demand.decode_steps_per_s)
    kv_ms = _ranges(per_bucket.kv_ms)
    inflow = np.append(demand.crossings_per_s(buckets), 0.0)[:, None]
    if settings.moves_requests:
        price = settings.move_price
        edges = buckets.edges
        work = np.array([price.work_ms(e, cost) for e in edges] + [0.0])[:, None]
        delay = np.array([price.delay_ms(e, cost) for e in edges] + [0.0])[:, None]
        load = load + inflow * work / 1000.0
        if settings.objective in (Objective.MEAN, Objective.BALANCED):
            weight = weight + inflow * delay / 1000.0
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
        weight=weight,
        least=least,
        requests=requests,
        ttft_ms=_ratio(_ranges(per_bucket.first_token_ms), _ranges(demand.arrivals_per_s)),
        step_rate=steps,
        kv_ms=kv_ms,
        alpha_ms=cost.alpha_ms,
    )


def stage_cost(
    terms: RangeTerms, i: npt.NDArray[np.intp], j: npt.NDArray[np.intp], m: Floats, *, settings: PartitionSettings
) -> Floats:
    """Objective of stages over the ranges [i, j) with m workers; infinite where a bound is not kept.

    `goodput` counts misses: a latency with mean x meets a limit with probability 1/(1 + (x/limit)⁴), the
    log-logistic law; both limits must be met. An empty range costs nothing with one worker or more.
    """
    load, least = terms.load[i, j], terms.least[i, j]
    ok = (m >= 1.0) & (m >= least * (1.0 - 1e-12)) & (m > load)
    slow = np.where(ok, m / np.where(ok, m - load, 1.0), np.inf)
    if settings.objective is not Objective.GOODPUT:
        return np.where(ok, terms.weight[i, j] * np.where(ok, slow, 0.0), np.inf)
    tpot = np.where(ok, slow, 0.0) * terms.alpha_ms / settings.slo_tpot_ms
    ttft = np.where(ok, slow, 0.0) * terms.ttft_ms[i, j] / settings.slo_ttft_ms
    met = 1.0 / ((1.0 + tpot**4) * (1.0 + ttft**4))
    return np.where(ok, terms.requests[i, j] * (1.0 - met), np.inf)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Amounts:
    """Per bucket and second: load (workers), weight (requests), shares of requests, KV·ms, ms to first token."""

    load: Floats
    weight: Floats
    requests: Floats
    kv_ms: Floats
    first_token_ms: Floats

    @classmethod
    def of(cls, demand: Demand, *, buckets: Buckets, cost: StepCost, settings: PartitionSettings) -> _Amounts:
        rate = demand.arrivals_per_s
        prompt = np.where(rate > 0.0, demand.prompt_tokens_per_s / np.where(rate > 0.0, rate, 1.0), 0.0)
        prefill_ms = settings.prefill_overlap * prompt * (cost.pi_ms + cost.psi_ms * prompt / 2)
        first_ms = rate * (cost.alpha_ms + prefill_ms)
        steps, context = demand.decode_steps_per_s, demand.context_tokens_per_s
        decode_ms = cost.beta_ms * steps + cost.gamma_ms * context
        total, total_steps = float(rate.sum()), float(steps.sum())
        # a request counts in each bucket with the share of its steps that it makes there
        shares = steps * (total / total_steps) if total_steps > 0.0 else rate
        if settings.objective is Objective.NORMALIZED:
            mean_output = max(1.0, total_steps / total) if total > 0.0 else 1.0
            weight = shares * cost.alpha_ms + settings.ttft_weight * first_ms / mean_output
        else:
            weight = (steps * cost.alpha_ms + settings.ttft_weight * first_ms) / 1000.0
        return cls(
            load=(decode_ms + rate * prefill_ms) / 1000.0,
            weight=weight,
            requests=shares,
            kv_ms=context * cost.alpha_ms + first_ms * prompt / 2,
            first_token_ms=first_ms,
        )


def _ranges(per_bucket: Floats) -> Floats:
    """Sums over [i, j) for all i ≤ j."""
    total = np.concatenate(([0.0], np.cumsum(per_bucket)))
    return np.asarray(np.maximum(0.0, total[None, :] - total[:, None]))


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
    for share, bound in ((0.05, settings.long_bound), (0.01, settings.p99_bound)):
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
