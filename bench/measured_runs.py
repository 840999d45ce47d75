"""Measured vLLM runs beside their simulation, for `validate_simulator.py`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from coefficients import Profiles, Step, _in_m
from scipy.optimize import nnls

from l4queue.cost.fit import error_by_regime, fit_step_cost, limits_of_engine
from l4queue.cost.step import BatchShape, StepCost
from l4queue.sim.plots import save_figure
from l4queue.sim.policies.length_blind import RoundRobin
from l4queue.sim.runner import RunConfig, run_policy
from l4queue.sim.traces.trace import Trace

__all__ = ("error", "measured_runs")


@dataclass(frozen=True)
class Device:
    """A measured run: layers of the model, KV tokens and batch limit of the engine."""

    name: str
    model: str
    layers: int
    kv_tokens: int
    max_num_seqs: int
    note: str


DEVICES = (
    Device("RTX4090", "Llama-3.1-8B", 32, 41_408, 256, "the overhead of 0.87 ms was read from this very run"),
    Device("RTXPRO6000", "Llama-3.1-8B", 32, 520_000, 128, "no time was read from this run, its shapes were"),
)


def error(found: float, reference: float) -> str:
    """Relative error with its sign."""
    return f"{(found - reference) / reference:+.1%}"


def compose(profiles: Profiles, device: Device, *, overhead_ms: float, is_narrow: bool = True) -> list[Step]:
    """Engine steps from the device's measured kernels; `is_narrow`: only of shapes that the measured run has."""
    dense: dict[str, dict[int, float]] = defaultdict(dict)
    once: dict[str, dict[int, float]] = defaultdict(dict)
    key = (device.name, device.model, "1")
    for r in profiles.rows("llmservingsim_dense"):
        if (r["device"], r["model"], r["tp"]) == key:
            dense[r["layer"]][int(r["tokens"])] = float(r["time_us"]) / 1000.0
    for r in profiles.rows("llmservingsim_per_sequence"):
        if (r["device"], r["model"], r["tp"]) == key:
            once[r["layer"]][int(r["sequences"])] = float(r["time_us"]) / 1000.0
    layered = [name for name in dense if name not in ("embedding", "final_layernorm")]
    cache: dict[int, float] = {}

    def dense_ms(tokens: int) -> float:
        if tokens not in cache:
            layer = sum(_in_m(dense[name], tokens) for name in layered) + _in_m(dense["layernorm"], tokens)
            cache[tokens] = device.layers * layer + sum(
                _in_m(dense[name], tokens) for name in ("embedding", "final_layernorm")
            )
        return cache[tokens]

    steps = []
    for r in profiles.rows("llmservingsim_attention"):
        if (r["device"], r["model"], r["tp"]) != key:
            continue
        chunk, cached = int(r["prefill_chunk"]), int(r["kv_prefill"])
        n, context = int(r["n_decode"]), int(r["kv_decode"])
        if n > device.max_num_seqs or n * context + cached > device.kv_tokens or chunk + n > 2048:
            continue
        if is_narrow and ((n and not (n >= 8 and 256 <= context <= 2048)) or cached > 2048):
            continue
        sequences = n + (1 if chunk else 0)
        kernels = dense_ms(chunk + n) + device.layers * float(r["time_us"]) / 1000.0
        kernels += sum(_in_m(times, sequences) for times in once.values())
        steps.append(
            Step(
                elapsed_ms=overhead_ms + kernels,
                num_decodes=n,
                context_tokens=n * context,
                prefill_tokens=chunk,
                prefill_pairs=chunk * (cached + chunk / 2.0),
            )
        )
    return steps


def measured_runs(plt: object, img: Path, folder: Path) -> list[str]:
    """Each run simulated with the same arrivals and lengths."""
    profiles = Profiles(folder)
    overhead_ms, _ = profiles.overhead_ms()
    lines = [
        "**Measured vLLM runs.** 300 ShareGPT requests at 10/s on one GPU, outputs of 512 to 1,224 tokens, "
        "vLLM 0.19, `max_num_batched_tokens` 2048 (LLMServingSim, commit 5daddb2). The same arrivals and lengths "
        "are simulated; step times are composed from that GPU's measured kernels plus the overhead of "
        "0.87 ms and fitted by the formula. The kernels are those of the shapes that the run has (8 decodes or "
        "more, contexts of 256 to 2,048), and that choice was made with the runs known: the last row of each "
        "shows the fit over all shapes of the table, lone contexts of 16k too. So only the arrivals, the "
        "lengths and the cache were given to the simulator, but neither run is one that nobody had looked at.",
        "",
        "| run | measure | measured | simulated | error |",
        "|---|---|---|---|---|",
    ]
    figure, axes = plt.subplots(1, len(DEVICES), figsize=(9, 3.6), sharey=True)  # type: ignore[attr-defined]
    notes = []
    for axis, device in zip(axes, DEVICES, strict=True):
        limits = limits_of_engine(
            kv_capacity_tokens=device.kv_tokens,
            max_batched_tokens=2048,
            max_num_seqs=device.max_num_seqs,
        )
        cost, mape = fitted(compose(profiles, device, overhead_ms=overhead_ms), limits)
        wide, _ = fitted(compose(profiles, device, overhead_ms=overhead_ms, is_narrow=False), limits)
        rows = [
            r
            for r in profiles.rows("vllm_measured_requests")
            if (r["device"], r["model"]) == (device.name, device.model)
        ]
        rows.sort(key=lambda r: float(r["queued_s"]))
        real, simulated = replay(rows, cost)
        name = f"{device.name}, {device.model}"
        for label, one, two in compare(real, simulated):
            lines.append(f"| {name} | {label} | {one:.3f} | {two:.3f} | {error(two, one)} |")
        one, two = (float(v["e2e"].mean()) for v in (real, replay(rows, wide)[1]))
        lines.append(
            f"| {name} | mean end to end, s, fit over all shapes | {one:.3f} | {two:.3f} | {error(two, one)} |"
        )
        notes.append(f"{name}: {device.note}; the formula is off by {mape[0]:.1%} on composed decode steps and by "
                     f"{mape[1]:.1%} on those with prefill (mean absolute error).")  # fmt: skip
        for values, label in ((real["e2e"], "measured"), (simulated["e2e"], "simulated")):
            axis.plot(np.sort(values), np.arange(1, len(values) + 1) / len(values), label=label)
        axis.set(xlabel="end-to-end latency, s", title=name)
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("share of requests")
    save_figure(plt, figure, img / "validation-vllm.png")
    return [*lines, "", *notes, "", "![measured and simulated latencies](img/validation-vllm.png)", ""]


def fitted(steps: list[Step], limits: StepCost) -> tuple[StepCost, tuple[float, float]]:
    """Decode terms from decode-only steps, which are nearly all steps of the run; prefill terms from the rest.

    Returns the cost and its mean absolute percentage error in both regimes.
    """
    pure = [s for s in steps if not s.prefill_tokens]
    mixed = [s for s in steps if s.prefill_tokens]
    decode = fit_step_cost(pure, limits=limits).cost
    # one prefill token stands for "the engine steps": alone, an empty decode batch would cost nothing
    shapes = [
        BatchShape(num_decodes=s.num_decodes, context_tokens=s.context_tokens, prefill_tokens=1) for s in mixed
    ]
    rest = np.array([s.elapsed_ms - decode.step_ms(shape) for s, shape in zip(mixed, shapes, strict=True)])
    x = np.array([(s.prefill_tokens, s.prefill_pairs) for s in mixed])
    weight = np.array([1.0 / s.elapsed_ms for s in mixed])
    solution, _ = nnls(x * weight[:, None], rest * weight)
    cost = replace(decode, pi_ms=float(solution[0]), psi_ms=float(solution[1]))
    errors = error_by_regime(cost, steps)
    return cost, (errors["decode_only"].mape, errors["with_prefill"].mape)


def replay(rows: list[dict[str, str]], cost: StepCost) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Measures of the run and of its simulation; the arrival is when the engine queued the request."""
    values = {k: np.array([float(r[k]) for r in rows]) for k in ("queued_s", "first_token_s", "last_token_s")}
    output = np.array([float(r["output_toks"]) for r in rows])
    trace = Trace(
        name="measured",
        arrival_s=values["queued_s"],
        input_tokens=np.array([int(r["input_toks"]) for r in rows], dtype=np.int64),
        output_tokens=output.astype(np.int64),
    )
    run = run_policy(RoundRobin(), trace, RunConfig(cost=cost, num_instances=1)).measured
    real = {
        "e2e": values["last_token_s"] - values["queued_s"],
        "ttft": values["first_token_s"] - values["queued_s"],
        "tpot": (values["last_token_s"] - values["first_token_s"]) / (output - 1),
        "end": values["last_token_s"].max() - values["queued_s"].min(),
    }
    end = run.finish_s.max() - run.arrival_s.min()
    return real, {"e2e": run.e2e_s, "ttft": run.ttft_s, "tpot": run.tpot_s, "end": end}


def compare(real: dict[str, np.ndarray], simulated: dict[str, np.ndarray]) -> Iterable[tuple[str, float, float]]:
    """Label, measured and simulated value."""
    for key, label in (("e2e", "end to end, s"), ("ttft", "TTFT, s"), ("tpot", "TPOT, s")):
        yield f"mean {label}", float(real[key].mean()), float(simulated[key].mean())
    for share in (0.5, 0.99):
        yield (
            f"p{share * 100:.0f} end to end, s",
            *(float(np.quantile(v["e2e"], share)) for v in (real, simulated)),
        )
    yield "length of the run, s", float(real["end"]), float(simulated["end"])
