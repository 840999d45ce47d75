"""The cost model, its fit, its calibration while running, and the shipped files."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4queue.cost.calibrate import Calibrator, predict_ms
from l4queue.cost.coefficients import (
    known_coefficients,
    load_coefficients,
    parse_coefficients,
    read_coefficients,
)
from l4queue.cost.fit import error_by_regime, fit_step_cost
from l4queue.cost.step import BatchShape, StepCost
from l4queue.errors import ConfigError

H100 = load_coefficients("h100", "llama-3.1-8b")
SLOW = replace(H100, alpha_ms=40.0, beta_ms=1.0, gamma_ms=3e-3, pi_ms=0.4, psi_ms=5e-5, sigma_ms=1e-4)
COUNTS = st.tuples(st.integers(0, 256), st.integers(0, 400_000), st.integers(0, 8192), st.floats(0, 1e9))


@dataclass(frozen=True)
class Record:
    """A measured step, as engines report it."""

    elapsed_ms: float
    num_decodes: int
    context_tokens: int
    prefill_tokens: int
    prefill_pairs: float
    skew_tokens: float
    tokens_per_decode: float = 1.0


def _records(cost: StepCost, n: int, *, seed: int, noise: float = 0.03, outliers: float = 0.0) -> list[Record]:
    rng = np.random.default_rng(seed)
    records = []
    for _ in range(n):
        count = int(rng.integers(1, 64))
        context = int(count * rng.integers(50, 3000))
        skew = float(count * rng.integers(0, 2000))
        prefill = int(rng.integers(100, 2000)) if rng.random() < 0.3 else 0
        shape = BatchShape(
            num_decodes=count,
            context_tokens=context,
            prefill_tokens=prefill,
            prefill_pairs=prefill**2 / 2,
            skew_tokens=skew,
        )
        elapsed = cost.step_ms(shape) * float(rng.lognormal(0, noise))
        if rng.random() < outliers:
            elapsed *= 30.0
        records.append(Record(elapsed, count, context, prefill, prefill**2 / 2, skew))
    return records


def _worst(found: StepCost, true: StepCost) -> float:
    """Largest relative error of predicted step times over typical batches."""
    shapes = [
        BatchShape(num_decodes=n, context_tokens=n * length, prefill_tokens=p, prefill_pairs=p * p / 2)
        for n in (1, 16, 60)
        for length in (100, 2500)
        for p in (0, 1500)
    ]
    return max(abs(found.step_ms(s) / true.step_ms(s) - 1.0) for s in shapes)


@given(COUNTS, COUNTS)
def test_predicted_times_are_at_least_zero_and_rise_with_everything(a, b) -> None:
    """More of anything never makes a step shorter; an empty one takes no time."""
    low = [min(x, y) for x, y in zip(a, b, strict=True)]

    def predict(row: list[float]) -> float:
        shape = BatchShape(
            num_decodes=int(row[0]),
            context_tokens=int(row[1]),
            prefill_tokens=int(row[2]),
            prefill_pairs=row[3],
        )
        return H100.step_ms(shape)

    assert 0.0 <= predict(low) <= predict(list(a)) + 1e-9
    assert predict([0, 0, 0, 0.0]) == 0.0


def test_a_fit_finds_the_coefficients_that_made_the_steps() -> None:
    """With 3 % noise: predictions within 5 %, R² above 0.99, errors per regime, limits copied."""
    records = _records(SLOW, 600, seed=1)

    fit = fit_step_cost(records, limits=H100)

    assert _worst(fit.cost, SLOW) < 0.05
    assert fit.cost.kv_capacity_tokens == H100.kv_capacity_tokens
    assert set(fit.errors) == {"all", "decode_only", "with_prefill"}
    assert fit.errors["all"].num_steps == 600
    assert fit.errors["decode_only"].num_steps + fit.errors["with_prefill"].num_steps == 600
    r2 = fit.errors["all"].r2
    assert r2 is not None
    assert r2 > 0.99
    assert fit.errors["all"].mape < 0.04
    assert fit.errors["all"].residual_p05_ms < 0.0 < fit.errors["all"].residual_p95_ms
    assert json.loads(json.dumps(fit.to_dict()))["cost"]["alpha_ms"] == fit.cost.alpha_ms


def test_coefficients_are_never_negative_even_when_that_would_fit_better() -> None:
    """Times that fall with the batch give zero slopes, not negative ones."""
    records = [Record(100.0 - n, n, 100 * n, 0, 0.0, 0.0) for n in range(1, 60)]

    cost = fit_step_cost(records).cost

    assert min(cost.alpha_ms, cost.beta_ms, cost.gamma_ms, cost.pi_ms, cost.psi_ms, cost.sigma_ms) >= 0.0


def test_steps_that_cannot_be_are_refused() -> None:
    """No steps, no time, NaN, negative counts."""
    good = Record(1.0, 1, 10, 0, 0.0, 0.0)

    with pytest.raises(ConfigError, match="no step records"):
        fit_step_cost([])
    for bad in (
        replace(good, elapsed_ms=0.0),
        replace(good, elapsed_ms=math.nan),
        replace(good, context_tokens=-1),
    ):
        with pytest.raises(ConfigError, match="finite"):
            fit_step_cost([good, bad])
    assert error_by_regime(H100, [good])["all"].r2 is None


def test_calibration_moves_from_the_prior_to_what_is_measured() -> None:
    """A machine 6 to 80 times slower is known after 400 steps to within 10 %, with 2 % of wild outliers."""
    state = Calibrator(prior=H100)
    assert state.cost == H100

    for part in range(8):
        state = state.update(_records(SLOW, 50, seed=10 + part, outliers=0.02))

    assert state.is_identified
    assert state.num_steps == 400
    assert _worst(state.cost, SLOW) < 0.10
    assert state.cost.kv_capacity_tokens == H100.kv_capacity_tokens


def test_calibration_is_not_led_astray_by_steps_that_seem_to_take_no_time() -> None:
    """One step in a hundred is seen together with the one before it and gets 0.2 ms, prefill or not."""
    records = _records(SLOW, 2000, seed=7)
    odd = [replace(record, elapsed_ms=0.2) if i % 100 == 50 else record for i, record in enumerate(records)]
    state = Calibrator(prior=H100)

    for first in range(0, len(odd), 100):
        state = state.update(odd[first : first + 100])

    assert _worst(state.cost, SLOW) < 0.10


def test_calibration_tells_what_steps_take_on_average_however_much_they_scatter() -> None:
    """Times that scatter by a factor of 1.35 either way: in sum the model is within 5 % of what was measured."""
    state = Calibrator(prior=H100)
    for part in range(20):
        state = state.update(_records(SLOW, 50, seed=100 + part, noise=0.3))
    after = _records(SLOW, 2000, seed=200, noise=0.3)

    predicted = sum(predict_ms(state.cost, record) for record in after)

    assert sum(record.elapsed_ms for record in after) == pytest.approx(predicted, rel=0.05)


def test_coefficients_of_an_engine_that_speculates_are_those_of_a_token() -> None:
    """A step that gives each request 2.5 tokens takes as long as 2.5 steps of one, with one share of prefill."""
    records = [
        replace(record, elapsed_ms=2.5 * record.elapsed_ms - 1.5 * _prefill_ms(record), tokens_per_decode=2.5)
        for record in _records(SLOW, 3000, seed=11, noise=0.0)
    ]
    assert _worst(fit_step_cost(records).cost, SLOW) < 0.01
    state = Calibrator(prior=H100)
    for first in range(0, len(records), 100):
        state = state.update(records[first : first + 100])
    assert _worst(state.cost, SLOW) < 0.10
    decode = next(record for record in records if not record.prefill_tokens)
    assert predict_ms(SLOW, decode) == pytest.approx(decode.elapsed_ms)


def _prefill_ms(record: Record) -> float:
    return SLOW.pi_ms * record.prefill_tokens + SLOW.psi_ms * record.prefill_pairs


def test_calibration_forgets_an_engine_that_has_changed() -> None:
    """After a few half-lives of new steps the old machine is forgotten."""
    state = Calibrator(prior=H100, half_life_steps=200.0).update(_records(SLOW, 500, seed=3))
    slower = replace(SLOW, alpha_ms=80.0, beta_ms=2.0)

    for part in range(10):
        state = state.update(_records(slower, 200, seed=30 + part))

    assert _worst(state.cost, slower) < 0.12


def test_what_the_steps_do_not_show_stays_at_the_prior_scaled_to_the_speed_seen() -> None:
    """Pure decoding on a machine ten times slower says nothing about prefill: ten times the prior is kept."""
    ten = replace(H100, **{k: 10 * v for k, v in H100.to_dict().items() if k.endswith("_ms")})
    records = [r for r in _records(ten, 600, seed=5, noise=0.01) if r.prefill_tokens == 0]

    cost = Calibrator(prior=H100).update(records).cost

    assert cost.pi_ms == pytest.approx(10 * H100.pi_ms, rel=0.1)
    assert cost.psi_ms == pytest.approx(10 * H100.psi_ms, rel=0.1)


def test_calibration_is_a_value_and_drops_what_cannot_be() -> None:
    """The old state is unchanged; NaN, zero and empty steps are counted, not used."""
    state = Calibrator(prior=H100)
    bad = [Record(math.nan, 1, 10, 0, 0.0, 0.0), Record(0.0, 1, 10, 0, 0.0, 0.0), Record(1.0, 0, 0, 0, 0.0, 0.0)]

    after = state.update(bad)

    assert (after.num_dropped, after.num_steps, state.num_dropped) == (3, 0, 0)
    assert after.cost == H100
    few = state.update(_records(SLOW, 10, seed=1))
    assert not few.is_identified
    assert few.cost == H100


def test_all_shipped_coefficients_load_and_say_where_they_come_from() -> None:
    """Each with source, date, errors and assumptions; A100 slower than H100 slower than H200."""
    assert known_coefficients() == (
        ("a100", "llama-3.1-8b"),
        ("h100", "llama-3.1-70b-tp4"),
        ("h100", "llama-3.1-8b"),
        ("h100-vllm", "llama-3.1-8b"),
        ("h200", "llama-3.1-8b"),
    )
    for gpu, model in known_coefficients():
        file = read_coefficients(gpu.upper(), model)
        assert (file.gpu, file.model) == (gpu, model)
        assert file.source
        assert file.date
        assert file.errors["all"]["mape"] < 0.08
        composed = {"gemm", "decode_attention", "overhead", "kv_capacity"}
        assert set(file.assumptions) >= (
            composed if "kernels" in file.engine else {"weights", "engine", "left_out"}
        )
        assert min(file.cost.to_dict().values()) >= 0
    shape = BatchShape(num_decodes=64, context_tokens=64_000)
    times = [load_coefficients(g, "llama-3.1-8b").step_ms(shape) for g in ("a100", "h100", "h200")]
    assert times == sorted(times, reverse=True)


def test_an_unknown_gpu_is_told_what_is_known() -> None:
    """The error lists the pairs."""
    with pytest.raises(ConfigError, match=r"no coefficients for model 'gpt' on GPU 'tpu'; known: .*h200"):
        load_coefficients("tpu", "gpt")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"coefficients": {"alpha_ms": 1}}', '{"coefficients": {"tau": 1}}', "[" * 100_000,
     "9" * 5000, '{"coefficients": []}', '{"coefficients": [[]]}', '{"coefficients": 5}', "\ud800",
     '{"coefficients": {"a": NaN}}', '{"coefficients": {}, "coefficients": {}}'],
)  # fmt: skip
def test_a_broken_coefficient_file_is_named(text: str) -> None:
    """Whatever is wrong in it, the error begins with the name of the file."""
    with pytest.raises(ConfigError, match=r"^mine\.json: "):
        parse_coefficients(text, name="mine.json")


def test_a_coefficient_below_zero_is_refused() -> None:
    """The field is named."""
    file = read_coefficients("h100", "llama-3.1-8b")
    data = {
        name: getattr(file, name) for name in ("gpu", "model", "engine", "source", "date", "assumptions", "errors")
    }
    data |= {"kv_bytes_per_token": 1, "coefficients": file.cost.to_dict() | {"psi_ms": -1.0}}

    with pytest.raises(ConfigError, match="psi_ms must be a finite number"):
        parse_coefficients(json.dumps(data), name="mine.json")
    data["coefficients"] = file.cost.to_dict()
    assert parse_coefficients(json.dumps(data), name="mine.json").cost == file.cost
    for name, value in (("gpu", 5), ("kv_bytes_per_token", True), ("kv_bytes_per_token", -1), ("errors", [])):
        with pytest.raises(ConfigError, match=f"{name} must be "):
            parse_coefficients(json.dumps({**data, name: value}), name="mine.json")
    huge = {**data, "coefficients": file.cost.to_dict() | {"psi_ms": 10**400}}
    with pytest.raises(ConfigError, match="64 bits"):
        parse_coefficients(json.dumps(huge), name="mine.json")
