"""Builds the shipped coefficient files from measured kernels, and states what was assumed.

    python bench/coefficients.py --profiles ../shared/profiles [--out l4queue/coefficients] [--date 2026-11-24]

No table holds whole engine steps of these models on these GPUs, so steps are composed: for each batch shape of a
grid the measured times of its kernels are added up (dense layers by interpolation), then the step-time formula
is fitted to the composed steps by non-negative least squares, each step weighted by 1/time.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import statistics
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from l4queue.cost.fit import fit_step_cost, limits_of_engine

GIB = 2**30
ASSUMPTIONS = {
    "gemm": "bf16, measured by aiconfigurator (vLLM); linear interpolation between the nearest grid points in m, "
    "n and k; lm_head (n beyond the grid) scaled in proportion to n from n = 65,536",
    "decode_attention": "measured by aiconfigurator per layer, all contexts of a batch equal, times the layers",
    "prefill_attention": "measured by aiconfigurator per layer without cached prefix; a chunk that continues a "
    "prompt is extrapolated by its query-key pairs",
    "mixed_steps": "prefill and decode attention of one step add up; dense layers run over all tokens at once",
    "small_kernels": "norms, rotary embedding and activation per layer from vidur (A100: Llama-3-8B; H100: "
    "Llama-2-7B with the activation scaled to 14,336 and rotary embedding to 40 of 64 heads; 70B: Llama-2-70B "
    "TP4; H200 as H100); residual adds are fused into the norms",
    "heterogeneity": "sigma is the measured ratio sigma/gamma of pure decode batches with unequal contexts on the "
    "RTX PRO 6000 (llmservingsim, Llama-3.1-8B, contexts to 16k, skew mostly 4) times this GPU's gamma; not "
    "measured on Hopper or Ampere",
    "tensor_parallel": "two all-reduces a layer at 9 us + 1.5 x bytes / 360 GB/s each; assumed, not measured",
    "kv_capacity": "0.9 of the GPU's memory less bf16 weights and 2 GiB of activations and graphs per GPU",
}


@dataclass(frozen=True)
class Model:
    """The numbers of a model that its kernels depend on, per GPU where sharded."""

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    weights: float  # parameters
    tp: int

    def gemms(self) -> list[tuple[int, int]]:
        """(n, k) of the dense layers of one transformer layer on one GPU."""
        qkv = (self.heads + 2 * self.kv_heads) * 128 // self.tp
        inner = self.ffn // self.tp
        return [
            (qkv, self.hidden),
            (self.hidden, self.heads * 128 // self.tp),
            (2 * inner, self.hidden),
            (self.hidden, inner),
        ]

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's keys and values over all GPUs of the group."""
        return 2 * self.layers * self.kv_heads * 128 * 2


@dataclass(frozen=True)
class Gpu:
    """A GPU by the names that the tables use for it."""

    name: str
    table: str
    memory_gib: float
    vidur: str
    vllm: str


MODEL_8B = Model("llama-3.1-8b", 32, 4096, 14336, 32, 8, 128256, 8.03e9, 1)
MODEL_70B = Model("llama-3.1-70b-tp4", 80, 8192, 28672, 64, 8, 128256, 70.6e9, 4)
GPUS = (
    Gpu("a100", "a100_sxm", 79.2, "a100", "0.14.0"),
    Gpu("h100", "h100_sxm", 79.2, "h100", "0.24.0"),
    Gpu("h200", "h200_sxm", 139.8, "h100", "0.24.0"),
)


@dataclass(frozen=True)
class Step:
    """A composed step, in the shape of the engines' step records."""

    elapsed_ms: float
    num_decodes: int
    context_tokens: int
    prefill_tokens: int
    prefill_pairs: float
    skew_tokens: float = 0.0


class Profiles:
    """The tables, read once. `folder` holds the CSV files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gemm: dict[str, dict[tuple[int, int], dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
        for r in self.rows("aiconfigurator_vllm_gemm_bf16"):
            self.gemm[r["device"]][int(r["n"]), int(r["k"])][int(r["m"])] = float(r["latency_ms"])

    def rows(self, name: str) -> Iterator[dict[str, str]]:
        """Rows of one table."""
        with gzip.open(self.folder / f"{name}.csv.gz", "rt", encoding="utf-8") as file:
            yield from csv.DictReader(file)

    def gemm_ms(self, device: str, m: int, n: int, k: int) -> float:
        """Time of an m×k by k×n product, interpolated linearly; beyond the grid in proportion."""
        table = self.gemm[device]
        scale = 1.0
        if n > 65_536:
            scale, n = n / 65_536, 65_536
        ks = sorted({kk for _, kk in table})
        low_k, high_k = _around(ks, k)
        at_k = []
        for kk in (low_k, high_k):
            ns = sorted(nn for nn, kkk in table if kkk == kk)
            low_n, high_n = _around(ns, n)
            ends = [_in_m(table[nn, kk], m) for nn in (low_n, high_n)]
            at_k.append(_between(low_n, high_n, n, ends[0], ends[1]))
        return scale * _between(low_k, high_k, k, at_k[0], at_k[1])

    def decode_rows(self, device: str, heads: int, kv_heads: int) -> list[tuple[int, int, float]]:
        """(batch, context, ms of one layer) with the context as after the step."""
        return [
            (int(r["batch_size"]), int(r["kv_len"]), float(r["latency_ms"]))
            for r in self.rows("aiconfigurator_vllm_decode_attention_bf16")
            if r["device"] == device and r["num_heads"] == str(heads) and r["num_key_value_heads"] == str(kv_heads)
        ]

    def prefill_rows(self, device: str, heads: int, kv_heads: int) -> list[tuple[int, int, float]]:
        """(batch, prompt, ms of one layer)."""
        return [
            (int(r["batch_size"]), int(r["isl"]), float(r["latency_ms"]))
            for r in self.rows("aiconfigurator_vllm_prefill_attention_bf16")
            if r["device"] == device and r["num_heads"] == str(heads) and r["num_key_value_heads"] == str(kv_heads)
        ]

    def small_ms(self, gpu: Gpu, model: Model) -> dict[int, float]:
        """Norms, rotary embedding and activation of one layer by number of tokens, ms."""
        if model.tp > 1:
            name, tp, act, rope = "Llama-2-70b-hf", str(model.tp), 1.0, 1.0
        elif gpu.vidur == "a100":
            name, tp, act, rope = "Meta-Llama-3-8B", "1", 1.0, 1.0
        else:
            name, tp, act, rope = "Llama-2-7b-hf", "1", 14336 / 11008, 40 / 64
        return {
            int(r["num_tokens"]): float(r["input_layernorm_ms"])
            + float(r["post_attention_layernorm_ms"])
            + rope * float(r["attn_rope_ms"])
            + act * float(r["mlp_act_ms"])
            for r in self.rows("vidur_mlp")
            if (r["device"], r["model"], r["tp"]) == (gpu.vidur, name, tp)
        }

    def skew_ratio(self) -> float:
        """σ/γ of pure decode batches: extra time per token of skew against time per token of context."""
        rows = [
            r
            for r in self.rows("llmservingsim_skew")
            if (r["device"], r["model"], r["tp"], r["regime"]) == ("RTXPRO6000", "Llama-3.1-8B", "1", "pure")
        ]
        n = np.array([float(r["n"]) for r in rows])
        mean = np.array([float(r["kv_mean"]) for r in rows])
        longest = np.array([float(r["kv_big"]) for r in rows])
        base = np.array([float(r["t_mean_us"]) for r in rows])
        extra = np.array([float(r["t_skew_us"]) for r in rows]) - base
        ones = np.ones_like(n)
        weight = 1.0 / base
        gamma = np.linalg.lstsq(np.stack((ones, n, n * mean), 1) * weight[:, None], base * weight, rcond=None)[0][
            2
        ]
        skew = n * (longest - mean)
        sigma = float((skew * extra * weight**2).sum() / (skew * skew * weight**2).sum())
        return max(0.0, sigma / float(gamma))

    def overhead_ms(self) -> tuple[float, int]:
        """Step time of whole vLLM 0.19 runs beyond their kernels, median over seconds of pure decoding.

        Llama-3.1-8B on an RTX 4090, whose KV space is known (41,408 tokens).
        """
        device, model = "RTX4090", "Llama-3.1-8B"
        dense: dict[str, dict[int, float]] = defaultdict(dict)
        for r in self.rows("llmservingsim_dense"):
            if (r["device"], r["model"]) == (device, model):
                dense[r["layer"]][int(r["tokens"])] = float(r["time_us"]) / 1000.0
        once: dict[str, dict[int, float]] = defaultdict(dict)
        for r in self.rows("llmservingsim_per_sequence"):
            if (r["device"], r["model"]) == (device, model):
                once[r["layer"]][int(r["sequences"])] = float(r["time_us"]) / 1000.0
        pure = [
            (int(r["n_decode"]), int(r["n_decode"]) * int(r["kv_decode"]), float(r["time_us"]) / 1000.0)
            for r in self.rows("llmservingsim_attention")
            if (r["device"], r["model"], r["prefill_chunk"]) == (device, model, "0")
        ]
        x = np.array([(1.0, n, s) for n, s, _ in pure])
        y = np.array([t for _, _, t in pure])
        attention = np.linalg.lstsq(x / y[:, None], np.ones_like(y), rcond=None)[0]
        left = []
        for r in self.rows("vllm_measured_timeseries"):
            running = int(float(r["running"]))
            if (r["device"], r["model"]) != (device, model) or float(r["prompt_throughput"]) > 0 or running < 4:
                continue
            step_ms = 1000.0 * running / float(r["gen_throughput"])
            context = float(r["kv_cache_pct"]) / 100.0 * 41_408
            layer = sum(
                _in_m(t, running) for name, t in dense.items() if name not in ("embedding", "final_layernorm")
            )
            layer += _in_m(dense["layernorm"], running)  # two norms a layer
            kernels = 32 * (layer + float(attention @ (1.0, running, context)))
            kernels += sum(_in_m(t, running) for t in once.values())
            left.append(step_ms - kernels)
        return statistics.median(left), len(left)


def compose(profiles: Profiles, gpu: Gpu, model: Model, *, overhead_ms: float) -> list[Step]:
    """Steps of all measured decode and prefill shapes, alone and together."""
    heads, kv_heads = model.heads // model.tp, model.kv_heads // model.tp
    small = profiles.small_ms(gpu, model)
    dense_cache: dict[int, float] = {}

    def dense_ms(tokens: int) -> float:
        if tokens not in dense_cache:
            layer = sum(profiles.gemm_ms(gpu.table, tokens, n, k) for n, k in model.gemms())
            layer += _in_m(small, tokens)
            if model.tp > 1:
                layer += 2 * (0.009 + 1.5 * tokens * model.hidden * 2 / 360e9 * 1000.0)
            dense_cache[tokens] = model.layers * layer
        return dense_cache[tokens]

    def head_ms(sequences: int) -> float:
        return profiles.gemm_ms(gpu.table, sequences, model.vocab // model.tp, model.hidden)

    capacity = kv_capacity(gpu, model)
    decodes = [
        d for d in profiles.decode_rows(gpu.table, heads, kv_heads) if d[0] <= 256 and d[0] * d[1] <= capacity
    ]
    prefills = [
        p for p in profiles.prefill_rows(gpu.table, heads, kv_heads) if 16 <= p[0] * p[1] <= 8192 and p[0] <= 16
    ]
    steps = [
        Step(
            elapsed_ms=overhead_ms + dense_ms(n) + head_ms(n) + model.layers * ms,
            num_decodes=n,
            context_tokens=n * (kv - 1),
            prefill_tokens=0,
            prefill_pairs=0.0,
        )
        for n, kv, ms in decodes
        if kv >= 16
    ]
    batches = [(0, 0, 0.0)] + [
        d for d in decodes if d[0] in (8, 32, 128, 256) and d[1] in (256, 1024, 4096, 16384)
    ]
    for count, prompt, prefill_layer in prefills:
        for n, kv, decode_layer in batches:
            if n + count * prompt > 8192:
                continue
            tokens = n + count * prompt
            steps.append(
                Step(
                    elapsed_ms=overhead_ms
                    + dense_ms(tokens)
                    + head_ms(n + count)
                    + model.layers * (prefill_layer + decode_layer),
                    num_decodes=n,
                    context_tokens=n * max(0, kv - 1),
                    prefill_tokens=count * prompt,
                    prefill_pairs=count * prompt * prompt / 2.0,
                )
            )
    return steps


def kv_capacity(gpu: Gpu, model: Model) -> int:
    """Tokens that the KV cache of one instance holds, in whole blocks of 16."""
    per_gpu = 0.9 * gpu.memory_gib * GIB - 2 * model.weights / model.tp - 2 * GIB
    return int(per_gpu * model.tp / model.kv_bytes) // 16 * 16


def build(
    profiles: Profiles, gpu: Gpu, model: Model, *, date: str, overhead: tuple[float, int]
) -> dict[str, object]:
    """One coefficient file as plain values."""
    limits = limits_of_engine(
        kv_capacity_tokens=kv_capacity(gpu, model),
        max_batched_tokens=8192,
        max_num_seqs=256,
    )
    steps = compose(profiles, gpu, model, overhead_ms=overhead[0])
    fit = fit_step_cost(steps, limits=limits)
    ratio = profiles.skew_ratio()
    coefficients = fit.cost.to_dict()
    coefficients["sigma_ms"] = fit.cost.gamma_ms * ratio
    assumptions = dict(ASSUMPTIONS)
    if model.tp == 1:
        del assumptions["tensor_parallel"]
    assumptions["overhead"] = (
        f"{overhead[0]:.2f} ms a step for scheduling, sampling and launches: median of step time less kernels "
        f"over {overhead[1]} s of pure decoding in a vLLM 0.19 run of Llama-3.1-8B on an RTX 4090; "
        "same on every GPU"
    )
    assumptions["limits"] = "max_num_batched_tokens 8192, max_num_seqs 256: settings, not measurements"
    return {
        "gpu": gpu.name,
        "model": model.name,
        "engine": f"vLLM {gpu.vllm} kernels, bf16",
        "source": "NVIDIA aiconfigurator (commit 095f58a), microsoft/vidur (7d47513), LLMServingSim (5daddb2)",
        "date": date,
        "kv_bytes_per_token": model.kv_bytes,
        "coefficients": {k: rounded(v) for k, v in coefficients.items()},
        "skew_ratio": rounded(ratio),
        "errors": {name: {k: rounded(v) for k, v in asdict(error).items()} for name, error in fit.errors.items()},
        "assumptions": assumptions,
    }


def _around(grid: list[int], value: int) -> tuple[int, int]:
    at = bisect_left(grid, value)
    if at < len(grid) and grid[at] == value:
        return value, value
    at = min(max(at, 1), len(grid) - 1)
    return grid[at - 1], grid[at]


def _between(low: int, high: int, value: int, at_low: float, at_high: float) -> float:
    return at_low if low == high else at_low + (at_high - at_low) * (value - low) / (high - low)


def _in_m(table: dict[int, float], m: int) -> float:
    low, high = _around(sorted(table), m)
    return max(0.0, _between(low, high, m, table[low], table[high]))


def rounded(value: float | int | None) -> float | int | None:
    """Floats to six digits, as the files have them."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main() -> None:
    """Write all files and print a table of coefficients and errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("L4_SHARED_DIR", "../shared"))
    parser.add_argument("--profiles", type=Path, default=shared / "profiles")
    parser.add_argument("--out", type=Path, default=Path("l4queue/coefficients"))
    parser.add_argument("--date", default="2026-11-24")
    args = parser.parse_args()
    profiles = Profiles(args.profiles)
    overhead = profiles.overhead_ms()
    print(f"overhead {overhead[0]:.3f} ms from {overhead[1]} s, skew ratio {profiles.skew_ratio():.4f}")
    pairs = [(gpu, MODEL_8B) for gpu in GPUS] + [(GPUS[1], MODEL_70B)]
    for gpu, model in pairs:
        data = build(profiles, gpu, model, date=args.date, overhead=overhead)
        path = args.out / f"{model.name}.{gpu.name}.json"
        path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        print(path.name, json.dumps(data["coefficients"]))
        for name, error in data["errors"].items():  # type: ignore[attr-defined]  # plain dict of dicts
            fifth, middle, last = (error[f"residual_p{q}_ms"] for q in ("05", "50", "95"))
            print(f"  {name:13s} n={error['num_steps']:5d} R²={error['r2']} MAPE={error['mape']}", end="")
            print(f" residuals {fifth} / {middle} / {last} ms")


if __name__ == "__main__":
    main()
