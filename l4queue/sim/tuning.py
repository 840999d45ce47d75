"""Tuning of the static two-pool baseline: threshold and pool sizes by simulation on the given trace."""

from __future__ import annotations

import numpy as np

from l4queue.sim.capacity import trace_work_ms
from l4queue.sim.policies.central import TwoPool
from l4queue.sim.runner import RunConfig, run_policy
from l4queue.sim.traces.trace import Trace

__all__ = ("tune_two_pool",)

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
