"""A second, slow implementation of the closed form and of the search, straight from the formulas."""

from __future__ import annotations

import itertools
import math

from l4queue.cost.step import StepCost
from l4queue.planning.histogram import Buckets, Demand
from l4queue.planning.steady_state import Objective, PartitionSettings


def brute_force(
    demand: Demand, num_workers: int, *, buckets: Buckets, cost: StepCost, settings: PartitionSettings
) -> dict[int, float]:
    """Least objective for each number of stages, by trying every boundary and every count of workers."""
    size = len(buckets)
    best: dict[int, float] = {}
    for k in range(1, min(settings.max_stages, size, num_workers) + 1):
        best[k] = math.inf
        for inner in itertools.combinations(range(1, size), k - 1):
            bounds = (0, *inner, size)
            for cuts in itertools.combinations(range(1, num_workers), k - 1):
                workers = [b - a for a, b in itertools.pairwise((0, *cuts, num_workers))]
                total = sum(
                    stage_objective(demand, i, j, m, num_workers, buckets=buckets, cost=cost, settings=settings)
                    for i, j, m in zip(bounds, bounds[1:], workers, strict=False)
                )
                best[k] = min(best[k], total)
    return best


def stage_objective(
    demand: Demand,
    i: int,
    j: int,
    m: int,
    num_workers: int,
    *,
    buckets: Buckets,
    cost: StepCost,
    settings: PartitionSettings,
) -> float:
    """Objective of m workers serving the buckets from i to j-1; infinite where a bound is broken."""
    load = _load(demand, i, j, buckets=buckets, cost=cost, settings=settings)
    if load > settings.max_rho * m * (1 + 1e-9) or m <= load:
        return math.inf
    slow = m / (m - load)  # 1/(1-ρ)
    steps = sum(demand.decode_steps_per_s[i:j])
    context = sum(demand.context_tokens_per_s[i:j])
    first_ms = sum(_rate(demand, b) * (cost.alpha_ms + _prefill_ms(demand, b, cost)) for b in range(i, j))
    kv = context * cost.alpha_ms * slow / 1000.0 + slow / 1000.0 * sum(
        _rate(demand, b) * _prompt(demand, b) / 2 * (cost.alpha_ms + _prefill_ms(demand, b, cost))
        for b in range(i, j)
    )
    if kv > m * cost.kv_capacity_tokens * (1 - settings.kv_margin) * (1 + 1e-9):
        return math.inf
    if steps * cost.alpha_ms * slow / 1000.0 > m * cost.max_num_seqs * (1 + 1e-9):
        return math.inf
    if settings.objective is Objective.BALANCED and not _keeps_bounds(
        demand, j, slow, num_workers, buckets=buckets, cost=cost, settings=settings
    ):
        return math.inf
    flow = _inflow(demand, i, buckets) if settings.moves_requests else 0.0
    wait_ms, per_request = _wait(demand, i, j, m, flow, buckets=buckets, cost=cost, settings=settings)
    if settings.objective is Objective.GOODPUT:
        arrivals, all_steps = sum(demand.arrivals_per_s), sum(demand.decode_steps_per_s)
        requests = steps * arrivals / all_steps
        rate = sum(demand.arrivals_per_s[i:j])
        tpot = slow * cost.alpha_ms / settings.slo_tpot_ms
        ttft = ((first_ms / rate if rate > 0 else 0.0) + per_request) / settings.slo_ttft_ms
        return requests * (1 - 1 / (1 + tpot**4) / (1 + ttft**4))
    if settings.objective is Objective.NORMALIZED:
        arrivals, all_steps = sum(demand.arrivals_per_s), sum(demand.decode_steps_per_s)
        shares = steps * arrivals / all_steps
        mean_output = max(1.0, all_steps / arrivals)
        late = settings.ttft_weight * (first_ms + wait_ms * (1 + slow)) / mean_output
        return slow * shares * cost.alpha_ms + late
    delay = settings.move_price.delay_ms(buckets.edges[i], cost)
    late = settings.ttft_weight * (first_ms + wait_ms * (1 + slow))
    return (slow * steps * cost.alpha_ms + late + flow * delay) / 1000.0


def _wait(
    demand: Demand,
    i: int,
    j: int,
    m: int,
    flow: float,
    *,
    buckets: Buckets,
    cost: StepCost,
    settings: PartitionSettings,
) -> tuple[float, float]:
    """Wait for prefill by Sakasegawa's form of M/G/m: of all that enter the range a second, and of one, ms."""
    pieces = [(_rate(demand, b), _prefill_ms(demand, b, cost)) for b in range(i, j)]
    pieces.append((flow, settings.move_price.work_ms(buckets.edges[i], cost)))
    first = sum(rate * w for rate, w in pieces)
    if first <= 0:
        return 0.0, 0.0
    busy = first / 1000.0 / m
    queue = busy ** (math.sqrt(2 * (m + 1)) - 1) / (m * (1 - busy))
    one = sum(rate * w * w for rate, w in pieces) / (2 * first) * queue
    return sum(rate for rate, _ in pieces) * one, one


def _load(
    demand: Demand, i: int, j: int, *, buckets: Buckets, cost: StepCost, settings: PartitionSettings
) -> float:
    work = sum(
        cost.beta_ms * demand.decode_steps_per_s[b]
        + cost.gamma_ms * demand.context_tokens_per_s[b]
        + _rate(demand, b) * _prefill_ms(demand, b, cost)
        for b in range(i, j)
    )
    if settings.moves_requests:
        work += _inflow(demand, i, buckets) * settings.move_price.work_ms(buckets.edges[i], cost)
    return float(work / 1000.0)


def _keeps_bounds(
    demand: Demand,
    j: int,
    slow: float,
    num_workers: int,
    *,
    buckets: Buckets,
    cost: StepCost,
    settings: PartitionSettings,
) -> bool:
    rho_of_one = _load(demand, 0, len(buckets), buckets=buckets, cost=cost, settings=settings) / num_workers
    slow_of_one = 1.0 / (1.0 - rho_of_one)
    for share, bound in ((0.05, settings.long_bound), (0.01, settings.p99_bound)):
        if j > _first_long(demand, share, buckets) and slow > bound * slow_of_one * (1 + 1e-9):
            return False
    return True


def _first_long(demand: Demand, share: float, buckets: Buckets) -> int:
    """First bucket that at most `share` of the requests reach, but never beyond the last one in use."""
    total = sum(demand.arrivals_per_s)
    used = [b for b in range(len(buckets)) if demand.arrivals_per_s[b] > 0 or demand.decode_steps_per_s[b] > 0]
    for b in range(len(buckets)):
        reach = sum(demand.arrivals_per_s[b:]) + _inflow(demand, b, buckets)
        if reach <= share * total * (1 + 1e-9):
            return min(b, used[-1])
    return used[-1]


def _rate(demand: Demand, b: int) -> float:
    return float(demand.arrivals_per_s[b])


def _prompt(demand: Demand, b: int) -> float:
    return float(demand.prompt_tokens_per_s[b] / demand.arrivals_per_s[b]) if demand.arrivals_per_s[b] else 0.0


def _prefill_ms(demand: Demand, b: int, cost: StepCost) -> float:
    return cost.pi_ms * _prompt(demand, b) + cost.psi_ms * _prompt(demand, b) ** 2 / 2


def _inflow(demand: Demand, b: int, buckets: Buckets) -> float:
    """Requests per second that grow past the lower edge of bucket b."""
    if b == 0:
        return 0.0
    width = buckets.width_tokens
    density = float(demand.decode_steps_per_s[b - 1] / width[b - 1] + demand.decode_steps_per_s[b] / width[b]) / 2
    return min(density, float(sum(demand.arrivals_per_s[:b])))
