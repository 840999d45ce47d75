"""Online calibration: a worker's own step times replace the shipped coefficients.

The equations are decayed normal equations of a relative least squares: each step weighs 1/expected time². By
1/measured time² slow steps would count less than quick ones, and the model would fall short of the mean step time.
Where the steps say nothing about a coefficient, a weak pull keeps it at the prior, scaled to the engine's speed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from l4queue.cost.fit import COEFFICIENTS, StepSample, features_of, with_coefficients
from l4queue.cost.step import StepCost

__all__ = ("Calibrator", "predict_ms")

Floats: TypeAlias = npt.NDArray[np.float64]

SIZE = len(COEFFICIENTS)


@dataclass(frozen=True, kw_only=True, eq=False)  # no slots: `cost` is solved once
class Calibrator:
    """A value: `update` returns the next one. `cost` is the prior until enough steps have been seen.

    `half_life_steps` says how fast old steps are forgotten, `prior_steps` how many steps the prior is worth,
    `min_steps` how many (decayed) steps are needed. A step slower or faster than expected by more than
    `outlier_factor` times the usual error weighs less than one at that limit, the less the further it is off; one
    that is not finite or positive is dropped. Until there is a model of its own, a time above what the prior leads
    to expect weighs by itself: the prior may be off by any factor. The errors of a time and of its inverse count
    alike: a step that was seen late, together with the next one, leaves that with next to no time.
    """

    prior: StepCost
    half_life_steps: float = 5000.0
    prior_steps: float = 5.0
    min_steps: float = 50.0
    outlier_factor: float = 4.0
    num_steps: int = 0
    num_dropped: int = 0
    weight: float = 0.0
    log_ratio: float = 0.0
    usual_error: float = 0.25
    gram: Floats | None = None
    moment: Floats | None = None

    def update(self, records: Iterable[StepSample]) -> Calibrator:
        """Take in measured steps, oldest first. Coefficients are solved once per call, not once per step."""
        records = list(records)
        if not records:
            return self
        gram = np.zeros((SIZE, SIZE)) if self.gram is None else self.gram.copy()
        moment = np.zeros(SIZE) if self.moment is None else self.moment.copy()
        keep = 0.5 ** (1.0 / self.half_life_steps)
        now, prior = self.cost, self.prior
        weight, ratio, usual = self.weight, self.log_ratio, self.usual_error
        seen, dropped = self.num_steps, self.num_dropped
        is_known = self.is_identified
        for step in records:
            x, y = np.array(features_of(step), dtype=np.float64), step.elapsed_ms
            expected, first = predict_ms(now, step), predict_ms(prior, step)
            if not (math.isfinite(y) and y > 0.0 and first > 0.0 and bool(np.isfinite(x).all())):
                dropped += 1
                continue
            # without a model of one's own yet, compare with the prior at the speed seen so far
            base = expected if is_known else first * math.exp(ratio)
            base = max(base, 1e-9)
            error = max(y / base, base / y) - 1.0
            limit = self.outlier_factor * usual
            trust = 1.0 if seen < 8 or error <= limit else limit / error
            share = 1.0 / (1.0 + min(seen, 200))
            usual += share * (min(error, limit) - usual)
            ratio += share * trust * (math.log(y / first) - ratio)
            w = (trust / (base if is_known else max(y, base / (1.0 + limit)))) ** 2
            gram = gram * keep + w * np.outer(x, x)
            moment = moment * keep + w * y * x
            weight = weight * keep + trust
            seen += 1
        return replace(
            self,
            num_steps=seen,
            num_dropped=dropped,
            weight=weight,
            log_ratio=ratio,
            usual_error=max(usual, 0.01),
            gram=gram,
            moment=moment,
        )

    @property
    def is_identified(self) -> bool:
        """Whether `cost` is the worker's own."""
        return self.gram is not None and self.weight >= self.min_steps

    @cached_property
    def cost(self) -> StepCost:
        """Coefficients in force; limits are always those of the prior."""
        if not self.is_identified or self.gram is None or self.moment is None:
            return self.prior
        speed = math.exp(self.log_ratio)
        prior = np.array([getattr(self.prior, name) for name in COEFFICIENTS]) * speed
        # unit of each coefficient: the prior, or what would explain a step by that feature alone
        size = np.sqrt(np.diag(self.gram))
        unit = np.where(prior > 0.0, prior, 1.0 / np.where(size > 0.0, size, 1.0) * math.sqrt(self.weight) * 1e-3)
        a = self.gram * unit[:, None] * unit[None, :]
        pull = self.prior_steps * np.maximum(np.diag(a) / max(self.weight, 1.0), 1e-6)
        b = self.moment * unit + pull * (prior / unit)
        solution = _nonnegative(a + np.diag(pull), b)
        return with_coefficients(self.prior, solution * unit)


def predict_ms(cost: StepCost, step: StepSample) -> float:
    """The model's time for a measured step, ms; 0 for an empty one."""
    if step.num_decodes == 0 and step.prefill_tokens == 0:
        return 0.0
    features = zip(features_of(step), COEFFICIENTS, strict=True)
    return float(sum(value * getattr(cost, name) for value, name in features))


def _nonnegative(a: Floats, b: Floats) -> Floats:
    """argmin of xᵀax/2 - bᵀx over x ≥ 0 for a positive definite matrix: the active set with KKT, else the best.

    Six unknowns: the passive set shrinks by the most negative and grows by the steepest, as in Lawson-Hanson.
    """
    x = np.zeros(SIZE)
    passive = np.zeros(SIZE, dtype=bool)
    for _ in range(8 * SIZE):
        slope = b - a @ x
        slope[passive] = -np.inf
        best = int(slope.argmax())
        if slope[best] <= 1e-12 * max(1.0, float(np.abs(b).max())):
            break
        passive[best] = True
        while True:
            trial = np.zeros(SIZE)
            trial[passive] = np.linalg.solve(a[np.ix_(passive, passive)], b[passive])
            if (trial[passive] > 0.0).all():
                x = trial
                break
            falling = passive & (trial <= 0.0)
            step = float(np.min(x[falling] / np.maximum(x[falling] - trial[falling], 1e-300)))
            x = np.maximum(0.0, x + step * (trial - x))
            passive &= x > 1e-14
            if not passive.any():
                break
    return x
