"""Small engines: one to compare with oracles, step by step or block by block, and one for tests of prefixes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from l4queue.cost.step import StepCost
from l4queue.sim.cluster import Cluster
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.policies.length_blind import RoundRobin

__all__ = ("COST", "GPU", "TICK_S", "run_alone")

COST = StepCost(
    alpha_ms=5.0,
    beta_ms=0.3,
    gamma_ms=0.01,
    pi_ms=0.1,
    psi_ms=0.001,
    sigma_ms=0.002,
    kv_capacity_tokens=4096,
    max_batched_tokens=128,
    max_num_seqs=6,
)
GPU = StepCost(
    alpha_ms=6.0,
    beta_ms=0.05,
    gamma_ms=0.0002,
    pi_ms=0.05,
    psi_ms=1e-6,
    kv_capacity_tokens=150_000,
    max_batched_tokens=2048,
    max_num_seqs=32,
)
"""An engine for conversations: its cache holds 150,000 tokens."""
TICK_S = 0.000731377  # an odd unit: arrivals never fall on a step boundary by rounding alone


def run_alone(requests: Sequence[SimRequest], cost: StepCost, observe: Callable[[Cluster], None]) -> None:
    """Serve requests on one engine; `observe` sees it after every event."""
    Cluster(
        requests,
        cost=cost,
        num_instances=1,
        policy=RoundRobin(),
        rng=np.random.default_rng(0),
        observe=observe,
    ).run()
