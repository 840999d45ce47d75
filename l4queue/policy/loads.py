"""Work and load of stages and workers in milliseconds of engine time, the unit of every decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from l4queue.cost.step import StepCost
from l4queue.models import WorkerLoad

__all__ = (
    "EARLY_NEWS_S",
    "NEWS_INTERVAL_S",
    "StageLoad",
    "backlog_ms",
    "decode_step_ms",
    "prefill_ahead_ms",
    "request_work_ms",
    "running_work_ms",
    "stage_load",
)

NEWS_INTERVAL_S = 0.5
"""A worker publishes its load, and looks at the others', at least this often. Chosen: news of this
age costs 1 to 4 % of the mean (docs/simulator.md); younger news costs every worker more calls."""
EARLY_NEWS_S = 0.05
"""News of other stages' queues bring the next look forward to so long after the last one. Chosen: a tenth of the
interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLoad:
    """Work of a stage. `drain_ms` is the engine time of all of it over the workers; None: no worker."""

    stage: int
    num_workers: int
    queued_requests: int = 0
    queued_tokens: int = 0
    num_running: int = 0
    context_tokens: int = 0
    drain_ms: float | None = None

    @property
    def running_per_worker(self) -> float:
        """Mean number of requests in one engine of the stage."""
        return self.num_running / self.num_workers if self.num_workers else 0.0


def request_work_ms(length_tokens: float, *, expected_output_tokens: float, cost: StepCost) -> float:
    """Engine time that a waiting request adds: its prefill and its share of every decode step to come."""
    mean_length = length_tokens + expected_output_tokens / 2
    return cost.prefill_ms(length_tokens) + expected_output_tokens * (cost.beta_ms + cost.gamma_ms * mean_length)


def running_work_ms(
    num_running: float, context_tokens: float, *, expected_remaining_tokens: float, cost: StepCost
) -> float:
    """Engine time that running requests still need, without the fixed cost of the steps."""
    grown = context_tokens + num_running * expected_remaining_tokens / 2
    return expected_remaining_tokens * (cost.beta_ms * num_running + cost.gamma_ms * grown)


def decode_step_ms(num_running: float, context_tokens: float, *, cost: StepCost) -> float:
    """Time of a decode step of this many requests; 0 for none."""
    if num_running <= 0:
        return 0.0
    return cost.alpha_ms + cost.beta_ms * num_running + cost.gamma_ms * context_tokens


def backlog_ms(num_running: int, context_tokens: int, *, pending_prefill_tokens: int, cost: StepCost) -> float:
    """Work before an engine, ms: a decode step without its fixed part, and the pending prefill."""
    return cost.beta_ms * num_running + cost.gamma_ms * context_tokens + cost.pi_ms * pending_prefill_tokens


def prefill_ahead_ms(
    pending_tokens: int, *, queued_requests: int, queued_tokens: int, num_workers: int, cost: StepCost
) -> float:
    """Prefill before what a worker runs, ms: pending in its engine, and its share of the queue of its stage."""
    pending_ms = cost.prefill_ms(pending_tokens)
    if not queued_requests:
        return pending_ms
    return pending_ms + queued_requests * cost.prefill_ms(queued_tokens / queued_requests) / max(1, num_workers)


def stage_load(
    stage: int,
    workers: Sequence[WorkerLoad],
    *,
    queued_requests: int,
    queued_tokens: int,
    expected_output_tokens: float,
    cost: StepCost,
    share: float = 1.0,
    least_workers: int = 0,
) -> StageLoad:
    """Load of a stage from its queue and from the workers that take work.

    Of a running request half of the expected output is taken to be left. `share` is the part of the fleet of which
    loads are known; where none of this stage is among them, it has `least_workers`.
    """
    able = [w for w in workers if w.is_open]
    num_running = sum(w.num_running for w in able) / share
    context = sum(w.context_tokens for w in able) / share
    num_workers = len(able) / share or least_workers
    mean = queued_tokens / queued_requests if queued_requests else 0.0
    waiting_ms = queued_requests * request_work_ms(mean, expected_output_tokens=expected_output_tokens, cost=cost)
    running_ms = running_work_ms(
        num_running, context, expected_remaining_tokens=expected_output_tokens / 2, cost=cost
    )
    return StageLoad(
        stage=stage,
        num_workers=round(num_workers),
        queued_requests=queued_requests,
        queued_tokens=queued_tokens,
        num_running=round(num_running),
        context_tokens=round(context),
        drain_ms=(waiting_ms + running_ms) / num_workers if num_workers else None,
    )
