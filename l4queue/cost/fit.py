"""Fit of the cost model to step records by non-negative least squares, with its error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from l4queue.cost.step import StepCost
from l4queue.errors import ConfigError

__all__ = (
    "Fit",
    "RegimeError",
    "StepSample",
    "design_matrix",
    "error_by_regime",
    "features_of",
    "fit_step_cost",
    "limits_of_engine",
    "with_coefficients",
)

Floats: TypeAlias = npt.NDArray[np.float64]

COEFFICIENTS = ("alpha_ms", "beta_ms", "gamma_ms", "pi_ms", "psi_ms", "sigma_ms")


class StepSample(Protocol):
    """A measured step; the engines' step records have these fields.

    `tokens_per_decode` are the tokens that a decoding request gains on average: more than 1 where the engine
    speculates.
    """

    @property
    def elapsed_ms(self) -> float: ...
    @property
    def num_decodes(self) -> int: ...
    @property
    def context_tokens(self) -> int: ...
    @property
    def prefill_tokens(self) -> int: ...
    @property
    def prefill_pairs(self) -> float: ...
    @property
    def skew_tokens(self) -> float: ...
    @property
    def tokens_per_decode(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RegimeError:
    """Error of a fit on one kind of step. Residuals are measured less predicted; R² is None without variance."""

    num_steps: int
    r2: float | None
    mape: float
    residual_p05_ms: float
    residual_p50_ms: float
    residual_p95_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Coefficients and their error: over all steps, and for each regime that occurs."""

    cost: StepCost
    errors: dict[str, RegimeError]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"cost": self.cost.to_dict(), "errors": {name: asdict(e) for name, e in self.errors.items()}}


def fit_step_cost(samples: Sequence[StepSample], *, limits: StepCost | None = None, relative: bool = True) -> Fit:
    """Fit all six coefficients, each ≥ 0. Capacities are copied from `limits`.

    `relative` weighs each step by 1/time, so that short decode steps count as much as long prefills. Needs
    scipy (an extra). ConfigError for no samples or times that are not positive and finite.
    """
    from scipy.optimize import nnls  # scipy is an extra: the base install predicts but does not fit

    x, y = design_matrix(samples)
    # columns differ by ten orders of magnitude
    weight = 1.0 / y if relative else np.ones_like(y)
    scale = np.linalg.norm(x * weight[:, None], axis=0)
    scale[scale == 0.0] = 1.0
    solution, _ = nnls(x * weight[:, None] / scale, y * weight)
    base = limits or limits_of_engine()
    cost = with_coefficients(base, solution / scale)
    return Fit(cost=cost, errors=error_by_regime(cost, samples))


def limits_of_engine(
    *, kv_capacity_tokens: int = 0, max_batched_tokens: int = 8192, max_num_seqs: int = 256
) -> StepCost:
    """An engine's limits with all coefficients zero: what a fit begins with."""
    return StepCost(
        alpha_ms=0.0,
        beta_ms=0.0,
        gamma_ms=0.0,
        pi_ms=0.0,
        psi_ms=0.0,
        kv_capacity_tokens=kv_capacity_tokens,
        max_batched_tokens=max_batched_tokens,
        max_num_seqs=max_num_seqs,
    )


def error_by_regime(cost: StepCost, samples: Sequence[StepSample]) -> dict[str, RegimeError]:
    """Error of any coefficients on measured steps: `all`, `decode_only`, `with_prefill`."""
    x, y = design_matrix(samples)
    predicted = x @ np.array([getattr(cost, name) for name in COEFFICIENTS])
    has_prefill = x[:, 3] > 0.0
    masks = {"all": np.ones_like(has_prefill), "decode_only": ~has_prefill, "with_prefill": has_prefill}
    return {name: _error(y[mask], predicted[mask]) for name, mask in masks.items() if mask.any()}


def with_coefficients(base: StepCost, values: Floats) -> StepCost:
    """Limits of `base` with these six coefficients, in the order of `COEFFICIENTS`."""
    alpha, beta, gamma, pi, psi, sigma = (float(v) for v in values)
    return replace(base, alpha_ms=alpha, beta_ms=beta, gamma_ms=gamma, pi_ms=pi, psi_ms=psi, sigma_ms=sigma)


def design_matrix(samples: Sequence[StepSample]) -> tuple[Floats, Floats]:
    """Features (columns in the order of the coefficients) and times, ms."""
    if not samples:
        raise ConfigError("no step records to fit: run the engine under load first")
    x = np.array([features_of(sample) for sample in samples], dtype=np.float64)
    y = np.array([s.elapsed_ms for s in samples], dtype=np.float64)
    if not np.isfinite(x).all() or not np.isfinite(y).all() or (y <= 0.0).any() or (x < 0.0).any():
        raise ConfigError("step records must have finite times above zero and finite counts of at least zero")
    return x, y


def features_of(step: StepSample) -> tuple[float, float, float, float, float, float]:
    """A measured step in the order of `COEFFICIENTS`.

    A step of the cost model gives each request one token. A step that gives more counts as one for each token,
    and these share its prefill. So the coefficients stay those of a token, by which everything is priced.
    """
    n = step.tokens_per_decode
    return (
        n,
        n * step.num_decodes,
        n * step.context_tokens,
        step.prefill_tokens,
        step.prefill_pairs,
        n * step.skew_tokens,
    )


def _error(y: Floats, predicted: Floats) -> RegimeError:
    residual = y - predicted
    spread = float(((y - y.mean()) ** 2).sum())
    low, middle, high = (float(q) for q in np.quantile(residual, (0.05, 0.5, 0.95)))
    return RegimeError(
        num_steps=len(y),
        r2=1.0 - float((residual**2).sum()) / spread if spread > 0.0 else None,
        mape=float(np.mean(np.abs(residual) / y)),
        residual_p05_ms=low,
        residual_p50_ms=middle,
        residual_p95_ms=high,
    )
