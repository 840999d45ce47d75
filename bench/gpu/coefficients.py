"""Fits the cost model to steps that `bench.gpu.steps` timed, and writes a coefficient file and a plot.

    python -m bench.gpu.coefficients bench/gpu/results/h100-llama-3.1-8b.json.gz --gpu h100-vllm \\
        [--out l4queue/coefficients] [--img docs/img]

With asynchronous scheduling the step in flight while requests are added, and the one after it, are timed wrongly:
the first is seen late, the second seems short. They are left out: first by their place, then whatever step with
prefill is off by more than a quarter from the fit to the others.
"""

from __future__ import annotations

import argparse
import gzip
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.coefficients import rounded
from bench.gpu.engine import Step
from bench.gpu.model import kv_bytes_per_token
from l4queue.cost.fit import Fit, error_by_regime, fit_step_cost, limits_of_engine
from l4queue.cost.step import StepCost
from l4queue.sim.plots import require_matplotlib, save_figure

MOST_OFF = 0.25
LABELS = {"equal": "all of one length", "one-long": "one of 8k to 98k among short ones", "mixture": "log-normal"}


def usable(steps: list[Step]) -> list[Step]:
    """Steps without the ones beside which requests were added."""
    wrong = set()
    for number in range(1, len(steps)):
        before, step = steps[number - 1], steps[number]
        if step.prefill_tokens and step.num_decodes and not before.prefill_tokens:
            wrong |= {number - 1, number}
    return [step for number, step in enumerate(steps) if number not in wrong]


def fit(steps: list[Step], limits: StepCost) -> tuple[Fit, list[Step]]:
    """The fit and the steps that it is of. It starts from decode steps and prompts that ran alone."""
    kept = [step for step in steps if not step.prefill_tokens or step.phase == "prefill"]
    for _ in range(20):
        cost = fit_step_cost(kept, limits=limits).cost
        now = [step for step in steps if not step.prefill_tokens or _is_near(step, cost)]
        if now == kept:
            break
        kept = now
    return fit_step_cost(kept, limits=limits), kept


def _is_near(step: Step, cost: StepCost) -> bool:
    return abs(step.elapsed_ms / cost.step_ms(step) - 1) <= MOST_OFF  # type: ignore[arg-type]  # has its fields


def coefficient_file(measured: dict[str, Any], result: Fit, *, gpu: str, num_left_out: int) -> dict[str, Any]:
    """As `l4queue.cost.coefficients` reads it."""
    machine, cost = measured["machine"], result.cost
    ratio = cost.sigma_ms / cost.gamma_ms if cost.gamma_ms else 0.0
    return {
        "gpu": gpu,
        "model": measured["model"],
        "engine": f"vLLM {machine['vllm']}, bf16, whole steps",
        "source": f"bench/gpu/steps.py on {machine['gpu']}, driver {machine['driver']}, torch {machine['torch']}",
        "date": machine["date"],
        "kv_bytes_per_token": kv_bytes_per_token(measured["model"]),
        "coefficients": {name: rounded(value) for name, value in cost.to_dict().items()},
        "skew_ratio": rounded(ratio),
        "errors": {
            regime: {name: rounded(value) for name, value in asdict(error).items()}
            for regime, error in result.errors.items()
        },
        "assumptions": {
            "weights": "random, of the model's shape; greedy sampling, FlashInfer's sampler off",
            "engine": "asynchronous scheduling, CUDA graphs and torch.compile as vLLM sets them; the core in the "
            "process that times it, without a front end beside it",
            "left_out": f"{num_left_out} steps that requests were added beside, or that were off by more than "
            f"{MOST_OFF:.0%} of the fit",
            "limits": f"max_num_batched_tokens {measured['max_batched_tokens']}, max_num_seqs "
            f"{measured['max_num_seqs']}: settings; kv_capacity_tokens: what vLLM reported at 0.9 of the memory",
        },
    }


def plot(steps: list[Step], cost: StepCost, directory: Path, *, title: str) -> Path:
    """Decode steps over their context tokens, with the model's share of the number of requests taken off."""
    pyplot = require_matplotlib()
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for phase, label in LABELS.items():
        mine = [step for step in steps if step.phase == phase and not step.prefill_tokens]
        rest = [step.elapsed_ms - cost.beta_ms * step.num_decodes for step in mine]
        axes.plot([s.context_tokens / 1000 for s in mine], rest, ".", markersize=4, alpha=0.5, label=label)
    most = max(step.context_tokens for step in steps)
    ends = np.array([0, most])
    axes.plot(ends / 1000, cost.alpha_ms + cost.gamma_ms * ends, "k-", linewidth=1, label="α + γ·S")
    axes.set_xlabel("context tokens in the batch, thousands")
    axes.set_ylabel("step time less β·n, ms")
    axes.set_title(title)
    axes.set_ylim(0, None)
    axes.grid(alpha=0.3)
    axes.legend()
    return save_figure(pyplot, figure, directory / "gpu-decode-steps.png")


def main() -> None:
    """Fit, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", type=Path)
    parser.add_argument("--gpu", required=True, help="name in the file's name, as `simulate --gpu` takes it")
    parser.add_argument("--out", type=Path, default=Path("l4queue/coefficients"))
    parser.add_argument("--img", type=Path)
    args = parser.parse_args()
    with gzip.open(args.steps, "rt", encoding="utf-8") as file:
        measured = json.load(file)
    steps = [Step(**step) for step in measured["steps"]]
    limits = limits_of_engine(
        kv_capacity_tokens=measured["kv_capacity_tokens"],
        max_batched_tokens=measured["max_batched_tokens"],
        max_num_seqs=measured["max_num_seqs"],
    )
    result, kept = fit(usable(steps), limits)
    data = coefficient_file(measured, result, gpu=args.gpu, num_left_out=len(steps) - len(kept))
    path = args.out / f"{measured['model']}.{args.gpu}.json"
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(path, json.dumps(data["coefficients"]), f"{len(kept)} of {len(steps)} steps")
    for regime, error in result.errors.items():
        print(f"  {regime:14s} {error}")
    for phase in LABELS:
        mine = [step for step in kept if step.phase == phase and not step.prefill_tokens]
        print(f"  {phase:14s} {error_by_regime(result.cost, mine)['all']}")
    for move in measured.get("kv_moves", ()):
        print("  KV", move)
    if args.img is not None:
        print(plot(kept, result.cost, args.img, title=f"{measured['model']} on {measured['machine']['gpu']}"))


if __name__ == "__main__":
    main()
