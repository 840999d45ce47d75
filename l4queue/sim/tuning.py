"""Tuning of the static baselines by simulation on the given trace: two pools, and prefill apart from decode."""

from __future__ import annotations

import numpy as np

from l4queue.sim.capacity import trace_work_ms
from l4queue.sim.policies.central import TwoPool
from l4queue.sim.policies.split import PrefillSplit
from l4queue.sim.runner import RunConfig, run_policy
from l4queue.sim.traces.trace import Trace

__all__ = ("tune_split", "tune_two_pool")

QUANTILES = (0.5, 0.7, 0.8, 0.9, 0.95)
"""Quantiles of the prompts that are tried as the threshold of two pools. Chosen: from the median up, as most
prompts are short; each one more costs simulations."""


def tune_two_pool(trace: Trace, setting: RunConfig, *, max_requests: int = 2500) -> TwoPool:
    """The split with least mean latency among thresholds at prompt quantiles and three pool sizes around
    the share of work below the threshold. Looks at the trace beforehand: its advantage over online policies."""
    sample = trace.select(slice(0, max_requests))
    work = trace_work_ms(sample, setting.cost)
    best: tuple[float, int, int] | None = None
    for threshold in sorted({int(np.quantile(sample.input_tokens, q)) + 1 for q in QUANTILES}):
        is_short = sample.input_tokens < threshold
        share = float(work[is_short].sum() / work.sum())
        fair = round(share * setting.num_instances)
        for num_short in sorted({fair, fair + 1, fair + 2}):
            if not 0 < num_short < setting.num_instances:
                continue
            policy = TwoPool(threshold_tokens=threshold, num_short=num_short)
            mean_s = run_policy(policy, sample, setting).result.mean_e2e_s
            if best is None or mean_s < best[0]:
                best = (mean_s, threshold, num_short)
    if best is None:  # one instance: no two pools
        return TwoPool(threshold_tokens=0, num_short=0)
    return TwoPool(threshold_tokens=best[1], num_short=best[2])


def tune_split(trace: Trace, setting: RunConfig, *, max_requests: int = 2500) -> PrefillSplit:
    """The number of prefilling engines with the least mean latency, found from the prefill's share of the work on.

    It goes down by ones while that pays, since cached prefixes spare prefill, and up if down never paid. Looks at
    the trace beforehand: its advantage over online policies.
    """
    most = setting.num_instances - 1
    if most < 1:
        return PrefillSplit(num_prefill=0)
    sample = trace.select(slice(0, max_requests))
    prefill_ms = sum(setting.cost.prefill_ms(tokens) for tokens in sample.input_tokens.tolist())
    fair = round(prefill_ms / float(trace_work_ms(sample, setting.cost).sum()) * setting.num_instances)
    begin = min(most, max(1, fair))

    def mean_s(count: int) -> float:
        return run_policy(PrefillSplit(num_prefill=count), sample, setting).result.mean_e2e_s

    best, best_s = begin, mean_s(begin)
    for step in (-1, 1):
        while 1 <= best + step <= most and (found_s := mean_s(best + step)) < best_s:
            best, best_s = best + step, found_s
        if best != begin:
            break
    return PrefillSplit(num_prefill=best)
