"""A worker's snapshot for its metrics: its engine's steps, held against the cost model in force."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from l4queue.cost.calibrate import predict_ms
from l4queue.cost.step import StepCost
from l4queue.metrics import Tally
from l4queue.models import WorkerLoad
from workers.engine.base import EngineStats, StepRecord

__all__ = ("StepMeter", "WorkerSnapshot")

# bucket limits, s: from a small model's decode step to a prefill of a long prompt
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class StepMeter:
    """Counts engine steps in the batches in which the cost model takes them in, twice a second."""

    def __init__(self) -> None:
        self.decode_s = Tally(_STEP_SECONDS)
        self.prefill_s = Tally(_STEP_SECONDS)
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.predicted_s = 0.0
        self.num_predicted = 0
        self.error_ratio_sum = 0.0

    def add(self, records: Iterable[StepRecord], cost: StepCost) -> None:
        """Take in steps; `cost` is the model that was in force while they ran."""
        for step in records:
            has_prefill = step.prefill_tokens > 0
            (self.prefill_s if has_prefill else self.decode_s).add(step.elapsed_ms / 1000)
            self.prefill_tokens += step.prefill_tokens
            self.decode_tokens += round(step.num_decodes * step.tokens_per_decode)
            if step.elapsed_ms > 0:
                predicted_ms = predict_ms(cost, step)
                self.predicted_s += predicted_ms / 1000
                self.error_ratio_sum += abs(predicted_ms - step.elapsed_ms) / step.elapsed_ms
                self.num_predicted += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSnapshot:
    """One worker at the moment of a scrape."""

    load: WorkerLoad
    engine: EngineStats
    steps: StepMeter
    plan_version: int
    num_stolen: int
    num_handed_over: int
    is_calibrated: bool
