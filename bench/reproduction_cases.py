"""Traffic and runs of the reproduction: a run is a value; its figures are kept in a folder and used again."""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

import l4queue
from l4queue.cli.progress import progress_bars
from l4queue.cost.coefficients import read_coefficients
from l4queue.cost.move import DEFAULT_LINK_GB_PER_S, MovePrice
from l4queue.cost.step import StepCost
from l4queue.sim.capacity import capacity_rps
from l4queue.sim.policies.l4 import L4Options
from l4queue.sim.policies.split import PrefillSplit
from l4queue.sim.registry import make_policy
from l4queue.sim.results import Measured
from l4queue.sim.runner import RunConfig, run_policy
from l4queue.sim.traces.content import HASH_BLOCK_TOKENS
from l4queue.sim.traces.sessions import make_sessions
from l4queue.sim.traces.trace import Trace, read_trace
from l4queue.sim.traces.workload import make_workload

MODEL = "llama-3.1-8b"
PARTS = 20
"""Consecutive parts of a window whose means are kept: their spread tells how sure a ratio of means is."""
WITHIN = 5.0
"""A request is served well within this multiple of its latency alone on an engine: the paper's level."""
KNOWN = {"conversation": "mooncake_conversation.w0", "synthetic": "mooncake_synthetic"}
"""Recorded traces that tell their content, by the name that tables have."""
SESSIONS = {"agent": 5000, "multi-turn": 5000}
"""Workloads of many turns and their requests: enough for each engine to serve three hundred."""
UNKNOWN = {
    "servegen_r1": ("servegen_deepseek_r1.h01", 20_000),
    "azure_conversation": ("azure2023_conv.w0", 5000),
    "azure_code": ("azure2023_code.w0", 5000),
}
"""Recorded traces without content, and how many of their first requests are served."""
PAPER, MIXED = "sharegpt", "mixed"
LOAD_STEP, LEAST_STEP, MOST_STEP = 1.05, -12, 44
"""Loads that a search for the service level tries: 0.85 times powers of the step, 0.47 to 7.3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One run. `gb_per_s` 0: what moves is prefilled again. A seed draws ties, and the traffic of `SESSIONS`."""

    case: str
    seed: int = 0
    load: float = 0.85
    policy: str = "l4"
    without: tuple[str, ...] = ()
    gb_per_s: float = DEFAULT_LINK_GB_PER_S
    num_instances: int = 16
    gpu: str = "h100"
    #: the first requests, at most this many
    first: int | None = None
    #: the largest load at which this share of the requests is served well is sought instead
    share: float | None = None

    @property
    def told(self) -> dict[str, Any]:
        """What differs from the defaults."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    @property
    def key(self) -> str:
        """Name of the file that keeps the result: a hash of the settings and of the code that runs them."""
        told = json.dumps([code_version(self.policy), self.told], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:24]

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Spec:
        """The spec that `told` tells, from JSON."""
        return cls(**{**told, "without": tuple(told.get("without", ()))})


@cache
def code_version(policy: str) -> str:
    """Hash of this file, the coefficients, and all modules that a run of this policy imports."""
    rest = ["policies.central", "policies.length_blind", "policies.affinity", "policies.split", "tuning"]
    package = Path(l4queue.__file__).parent
    todo = [f"l4queue.sim.{name}" for name in ("traces.workload", *(["registry"] if policy == "l4" else rest))]
    seen: set[Path] = set()
    while todo:
        path = package.joinpath(*todo.pop().split(".")[1:]).with_suffix(".py")
        if path.is_file() and path not in seen:
            seen.add(path)
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("l4queue."):
                    todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    told = hashlib.sha256()
    for path in (*sorted(seen), *sorted((package / "coefficients").glob("*.json")), Path(__file__)):
        told.update(path.name.encode() + path.read_bytes())
    return told.hexdigest()[:12]


# ---------------------------------------------------------------- traffic


def shared() -> Path:
    """Folder of the traces."""
    return Path(os.environ.get("L4_SHARED_DIR", "../shared")) / "traces"


@cache
def traffic(case: str, seed: int, first: int | None) -> Trace:
    """A recorded trace, sessions or lengths drawn anew; the seed makes another trace of `SESSIONS` only."""
    if case in SESSIONS:
        return make_sessions(case, num_requests=first or SESSIONS[case], seed=seed)
    if case == PAPER:
        return make_workload(PAPER, num_requests=first or 5000, rng=np.random.default_rng(5))
    if case == MIXED:
        return mixed()
    if case in KNOWN:
        trace = read_trace(shared() / f"{KNOWN[case]}.csv.gz", hash_block_tokens=HASH_BLOCK_TOKENS)
        return trace.select(slice(0, first))
    name, size = UNKNOWN[case]
    return read_trace(shared() / f"{name}.csv.gz").select(slice(0, first or size))


def mixed() -> Trace:
    """Arrivals and lengths of azure_conversation; a tenth of the requests has lengths drawn from Mooncake's."""
    part = traffic("azure_conversation", 0, None)
    long = read_trace(shared() / f"{KNOWN['conversation']}.csv.gz")
    rng = np.random.default_rng([11, 0])
    inputs, outputs = part.input_tokens.copy(), part.output_tokens.copy()
    chosen = np.flatnonzero(rng.random(len(part)) < 0.1)
    picks = rng.integers(0, len(long), size=chosen.size)
    inputs[chosen], outputs[chosen] = long.input_tokens[picks], long.output_tokens[picks]
    return Trace(name=MIXED, arrival_s=part.arrival_s, input_tokens=inputs, output_tokens=outputs)


@cache
def capacity(case: str, seed: int, first: int | None, gpu: str) -> float:
    """Request rate at which one engine saturates on this traffic, without a prefix cache."""
    return capacity_rps(traffic(case, seed, first), read_coefficients(gpu, MODEL).cost, num_instances=1)


# ---------------------------------------------------------------- runs


def run(spec: Spec) -> dict[str, Any]:
    """Figures of a run, or of the one with the largest load that keeps the service level."""
    if spec.share is None:
        return simulate(spec)
    low, high, found = LEAST_STEP - 1, MOST_STEP + 1, None
    while high - low > 1:
        middle = (low + high) // 2
        tried = simulate(replace(spec, load=0.85 * LOAD_STEP**middle, share=None))
        if tried["share_within"] >= spec.share:
            low, found = middle, tried
        else:
            high = middle
    return {"load": 0.0} if found is None else {**found, "load": 0.85 * LOAD_STEP**low}


def simulate(spec: Spec) -> dict[str, Any]:
    """One policy on one window at one load."""
    coefficients = read_coefficients(spec.gpu, MODEL)
    seed = spec.seed if spec.case in SESSIONS else 0
    trace = traffic(spec.case, seed, spec.first)
    rate = spec.load * capacity(spec.case, seed, spec.first, spec.gpu) * spec.num_instances
    trace = trace.scaled(rate / trace.rate_rps)
    price = MovePrice(
        bandwidth_bytes_per_s=spec.gb_per_s * 1e9 or None, kv_bytes_per_token=coefficients.kv_bytes_per_token
    )
    setting = RunConfig(cost=coefficients.cost, num_instances=spec.num_instances, price=price, seed=spec.seed)
    options = L4Options(without=frozenset(spec.without))
    policy = make_policy(spec.policy, trace=trace, setting=setting, options=options)
    done = run_policy(policy, trace, setting)
    figures = {name: value for name, value in done.result.to_dict().items() if isinstance(value, int | float)}
    told = {"num_prefill": policy.num_prefill} if isinstance(policy, PrefillSplit) else {}
    return {
        **{name: value if isinstance(value, int) else float(f"{value:.6g}") for name, value in figures.items()},
        "short_mean_e2e_s": done.result.short.mean_e2e_s,
        "long_mean_e2e_s": done.result.long.mean_e2e_s,
        "parts_e2e_s": [round(float(part.mean()), 4) for part in np.array_split(done.measured.e2e_s, PARTS)],
        "share_within": round(share_within(done.measured, coefficients.cost), 5),
        **told,
    }


def share_within(measured: Measured, cost: StepCost) -> float:
    """Share of requests that took at most `WITHIN` times as long as alone on an engine that has nothing cached."""
    prompt, output = measured.prompt_tokens, measured.output_tokens
    steps = np.ceil(prompt / cost.max_batched_tokens)
    alone_ms = cost.alpha_ms * steps + cost.pi_ms * prompt + cost.psi_ms * prompt * prompt / 2
    rest = output - 1
    alone_ms += rest * (cost.alpha_ms + cost.beta_ms + cost.gamma_ms * (prompt + 1 + (rest - 1) / 2))
    return float((measured.e2e_s * 1000.0 <= WITHIN * alone_ms).mean())


class Results:
    """Figures by run, from the folder where they are there; `fill` makes the rest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def fill(self, specs: Iterable[Spec], *, jobs: int) -> None:
        """Make what is missing, in the order given, with a progress bar."""
        missing = [s for s in dict.fromkeys(specs) if not self._path(s).is_file()]
        with progress_bars(False, width=40) as progress:
            task = progress.add_task("simulating", total=len(missing))
            for spec in self._made(missing, jobs=jobs):
                progress.update(task, advance=1, description=f"{spec.case} {spec.policy}")

    def _made(self, missing: list[Spec], *, jobs: int) -> Iterator[Spec]:
        store = partial(_store, self._folder)
        if jobs == 1:
            yield from map(store, missing)
            return
        with ProcessPoolExecutor(jobs) as pool:
            yield from pool.map(store, missing)

    def found(self, specs: Iterable[Spec]) -> dict[Spec, dict[str, Any]]:
        """Figures of the runs that are there."""
        there = [spec for spec in dict.fromkeys(specs) if self._path(spec).is_file()]
        return {spec: json.loads(self._path(spec).read_text("utf-8")) for spec in there}

    def _path(self, spec: Spec) -> Path:
        return self._folder / f"{spec.key}.json"


def _store(folder: Path, spec: Spec) -> Spec:
    """Run and keep the figures at once: a report that is cut off goes on where it was."""
    path = folder / f"{spec.key}.json"
    path.with_suffix(".part").write_text(json.dumps({"spec": asdict(spec), **run(spec)}), "utf-8")
    path.with_suffix(".part").rename(path)
    return spec
