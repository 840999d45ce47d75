"""One policy over one trace: builds the cluster, runs it, returns figures and plot data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from l4queue.cost.move import MovePrice
from l4queue.cost.step import BLOCK_TOKENS, StepCost
from l4queue.errors import ConfigError
from l4queue.sim.cluster import Cluster
from l4queue.sim.policy import Policy
from l4queue.sim.results import Measured, SimResult, cached_share, measure, summarize
from l4queue.sim.traces.trace import Trace

__all__ = ("Run", "RunConfig", "check_fits", "run_policy")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything of a run but policy and trace. `warmup_share` of the arrivals are simulated, not counted.

    `block_tokens` is the engines' KV block, by which the content of the trace is numbered.
    """

    cost: StepCost
    num_instances: int
    seed: int = 0
    warmup_share: float = 0.0
    price: MovePrice = field(default_factory=MovePrice)
    block_tokens: int = BLOCK_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A finished run. `busy_share[i]` is the share of time that instance i computed."""

    result: SimResult
    measured: Measured
    busy_share: tuple[float, ...]
    policy: Policy


def check_fits(trace: Trace, cost: StepCost) -> None:
    """Raise ConfigError when a request of the trace can never run: it outgrows the KV cache alone."""
    total = trace.input_tokens + trace.output_tokens
    worst = int(total.argmax())
    if cost.kv_capacity_tokens and total[worst] > cost.kv_capacity_tokens:
        raise ConfigError(
            f"request {worst + 1} of {trace.name} needs {total[worst]} tokens of KV cache, an instance holds "
            f"{cost.kv_capacity_tokens}; choose a larger GPU or drop such requests from the trace"
        )


def run_policy(
    policy: Policy,
    trace: Trace,
    setting: RunConfig,
    *,
    observe: Callable[[Cluster], None] | None = None,
) -> Run:
    """Simulate to the last finish. The same arguments give the same figures."""
    requests = trace.requests()
    cluster = Cluster(
        requests,
        cost=setting.cost,
        num_instances=setting.num_instances,
        policy=policy,
        rng=np.random.default_rng(setting.seed),
        price=setting.price,
        block_tokens=setting.block_tokens,
        observe=observe,
    )
    cluster.run()
    measured = measure(requests, warmup_share=setting.warmup_share)
    result = summarize(
        policy.name,
        measured,
        num_handovers=cluster.num_handovers,
        num_steals=cluster.num_steals,
        num_preemptions=sum(i.num_preempted for i in cluster.instances),
        cached_share=None if trace.chains is None else cached_share(requests, warmup_share=setting.warmup_share),
    )
    end_s = cluster.now_s or 1.0
    busy = tuple(i.busy_s / end_s for i in cluster.instances)
    return Run(result=result, measured=measured, busy_share=busy, policy=policy)
