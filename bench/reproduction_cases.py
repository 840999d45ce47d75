"""Traffic and runs of the reproduction report: a run is a value; its result is kept in a folder and used again."""

from __future__ import annotations

import ast
import csv
import gzip
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

import l4queue
from l4queue.cli.progress import progress_bars
from l4queue.cost.coefficients import read_coefficients
from l4queue.cost.move import MovePrice
from l4queue.models import Plan, StagePlan
from l4queue.sim.capacity import capacity_rps, meets, parse_slo
from l4queue.sim.policies.l4 import L4, L4Options
from l4queue.sim.registry import make_policy
from l4queue.sim.results import ClassResult, SimResult
from l4queue.sim.runner import RunConfig, run_policy
from l4queue.sim.traces.trace import Trace, read_trace
from l4queue.sim.traces.workload import make_workload

NUM_INSTANCES = 16
GPU, MODEL = os.environ.get("L4_REPRODUCTION_GPU", "h100"), "llama-3.1-8b"
WINDOW = 5000
FILES = {
    "mooncake_conversation": "mooncake_conversation.w0",
    "mooncake_synthetic": "mooncake_synthetic",
    "servegen_r1": "servegen_deepseek_r1.h01",
    "azure_conversation": "azure2023_conv.w0",
    "azure_code": "azure2023_code.w0",
}
LENGTH_SETS = {
    "apex creation (lengths)": "lengths_apex_creation_llama",
    "apex lmsys (lengths)": "lengths_apex_lmsys_llama",
    "arxiv summaries (lengths)": "lengths_arxiv_summarization.p0",
}
PAPER = "sharegpt (synthetic)"
MIXED_SYNTHETIC = "mixed (synthetic)"
SYNTHETIC = {
    PAPER: ("sharegpt", 5),
    MIXED_SYNTHETIC: ("mixed", 5),
    "mixed (synthetic, new seed)": ("mixed", 2026),
    "chat (synthetic, new seed)": ("chat", 2026),
    "long-context (synthetic, new seed)": ("long-context", 2026),
    "reasoning (synthetic, new seed)": ("reasoning", 2026),
}
#: name → (arrivals and most lengths, offset, where the lengths of the rest come from, their share, seed)
MIXES = {
    "mixed": ("azure_conversation", None, "mooncake_conversation", 0.1, 11),
    "code + 10 % mooncake_synthetic": ("azure_code", 0.0, "mooncake_synthetic", 0.1, 31),
    "servegen_r1 + 5 % mooncake_conversation": ("servegen_r1", 0.85, "mooncake_conversation", 0.05, 32),
    "mixed, next half hour": ("azure_conversation, next half hour", 0.0, "mooncake_conversation", 0.1, 33),
}
#: name → trace whose pairs of lengths are drawn anew, at Poisson arrivals
DRAWN = {
    "mooncake_conversation (drawn anew)": "mooncake_conversation",
    "mooncake_synthetic (drawn anew)": "mooncake_synthetic",
}
#: Later windows of the same sources; they are read where the files are there.
LATER = {
    "azure_conversation, next half hour": "azure2023_conv.w1",
    "azure_code, next half hour": "azure2023_code.w1",
}
SLO = "p99_ttft_s<5,p99_tpot_s<0.1"
SLO_STEP = 0.02
SLO_MOST = 1.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One run. `sigma` multiplies the engine's skew term; `gb_per_s` None: hand-over by prefilling again."""

    case: str
    offset: float = 0.0
    load: float = 0.85
    policy: str = "l4"
    objective: str = "balanced"
    without: tuple[str, ...] = ()
    gb_per_s: float | None = 50.0
    sigma: float = 1.0
    #: the largest load that keeps this service level is sought instead, up to `SLO_MOST`
    slo: str | None = None
    #: a plan of two stages that stays: boundary in tokens, workers below it
    fixed: tuple[int, int] | None = None
    #: the first share of the arrivals, served and not counted
    warmup_share: float = 0.0

    @property
    def key(self) -> str:
        """Name of the file that keeps the result: a hash of the settings and of the code that runs them."""
        told = json.dumps([code_version(self.policy), WINDOW, asdict(self)], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:24]


@cache
def code_version(policy: str) -> str:
    """Hash of the coefficients, of this file and of all modules that a run of this policy imports."""
    names = ["registry"] if policy == "l4" else ["policies.central", "policies.length_blind", "tuning"]
    package = Path(l4queue.__file__).parent
    todo, seen = [f"l4queue.sim.{name}" for name in (*names, "traces.workload")], set()
    while todo:
        path = package.joinpath(*todo.pop().split(".")[1:]).with_suffix(".py")
        if path.is_file() and path not in seen:
            seen.add(path)
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("l4queue."):
                    todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    told = hashlib.sha256()
    for path in sorted((*seen, package / "coefficients" / f"{MODEL}.{GPU}.json", Path(__file__))):
        told.update(path.name.encode() + path.read_bytes())
    return told.hexdigest()[:12]


def shared() -> Path:
    """Folder of the traces."""
    return Path(os.environ.get("L4_SHARED_DIR", "../shared")) / "traces"


@cache
def whole(name: str) -> Trace:
    """A trace file."""
    return read_trace(shared() / f"{(FILES | LATER)[name]}.csv.gz")


def is_there(case: str) -> bool:
    """Whether the files of a case are at hand."""
    names = MIXES[case][0:3:2] if case in MIXES else (DRAWN.get(case, case),)
    return all((shared() / f"{(FILES | LATER)[name]}.csv.gz").is_file() for name in names)


@cache
def traffic(case: str, offset: float) -> Trace:
    """A window of a trace, a mix of two, Poisson arrivals of measured lengths, or a synthetic workload."""
    if case in SYNTHETIC:
        name, seed = SYNTHETIC[case]
        return make_workload(name, num_requests=WINDOW, rng=np.random.default_rng(seed))
    if case in LENGTH_SETS:
        with gzip.open(shared() / f"{LENGTH_SETS[case]}.csv.gz", "rt", encoding="utf-8") as file:
            rows = [(int(r["input_tokens"]), int(r["output_tokens"])) for r in csv.DictReader(file)]
        return poisson(case, np.maximum(1, np.array(rows, dtype=np.int64)), seed=7)
    if case in DRAWN:
        source = whole(DRAWN[case])
        return poisson(case, np.stack((source.input_tokens, source.output_tokens), axis=1), seed=2026)
    if case in MIXES:
        return mixed(case, offset)
    return window(case, offset)


def window(case: str, offset: float) -> Trace:
    """`WINDOW` rows of a trace from a share of it on; four times as many of `servegen_r1`, whose requests last."""
    trace = whole(case)
    start = int(offset * len(trace))
    size = WINDOW * 4 if case == "servegen_r1" else WINDOW
    return trace.select(slice(start, min(len(trace), start + size)))


def mixed(case: str, offset: float) -> Trace:
    """Arrivals and lengths of one trace; a share of the requests has lengths drawn from another."""
    base, at, other, share, seed = MIXES[case]
    part, long = window(base, offset if at is None else at), whole(other)
    rng = np.random.default_rng([seed, int(offset * 100)])
    inputs, outputs = part.input_tokens.copy(), part.output_tokens.copy()
    chosen = np.flatnonzero(rng.random(len(part)) < share)
    picks = rng.integers(0, len(long), size=chosen.size)
    inputs[chosen], outputs[chosen] = long.input_tokens[picks], long.output_tokens[picks]
    return Trace(name=case, arrival_s=part.arrival_s, input_tokens=inputs, output_tokens=outputs)


def poisson(case: str, lengths: np.ndarray, *, seed: int) -> Trace:
    """Pairs of lengths drawn with replacement, at Poisson arrivals."""
    rng = np.random.default_rng(seed)
    drawn = lengths[rng.integers(0, len(lengths), WINDOW)]
    arrival = np.cumsum(rng.exponential(1.0, WINDOW))
    return Trace(name=case, arrival_s=arrival, input_tokens=drawn[:, 0], output_tokens=drawn[:, 1])


@cache
def capacity(case: str, offset: float) -> float:
    """Request rate at which 16 engines saturate on this traffic, with the skew term as it was measured."""
    return capacity_rps(traffic(case, offset), read_coefficients(GPU, MODEL).cost, num_instances=NUM_INSTANCES)


def run(spec: Spec) -> dict[str, Any]:
    """The result of a run, or {"load": …} with the largest load of a service level."""
    if spec.slo is not None:
        return {"load": largest_load(spec, spec.slo)}
    return simulate(spec).to_dict()


def simulate(spec: Spec) -> SimResult:
    """One policy on one window at one load."""
    coefficients = read_coefficients(GPU, MODEL)
    cost = replace(coefficients.cost, sigma_ms=coefficients.cost.sigma_ms * spec.sigma)
    if "skew" in spec.without:
        cost = replace(cost, sigma_ms=0.0)
    trace = traffic(spec.case, spec.offset)
    trace = trace.scaled(spec.load * capacity(spec.case, spec.offset) / trace.rate_rps)
    price = MovePrice(
        bandwidth_bytes_per_s=None if spec.gb_per_s is None else spec.gb_per_s * 1e9,
        kv_bytes_per_token=coefficients.kv_bytes_per_token,
    )
    setting = RunConfig(cost=cost, num_instances=NUM_INSTANCES, price=price, warmup_share=spec.warmup_share)
    options = L4Options(objective=spec.objective, without=frozenset(spec.without))
    if spec.fixed is not None:
        return run_policy(L4(options, fixed=two_stages(*spec.fixed)), trace, setting).result
    return run_policy(
        make_policy(spec.policy, trace=trace, setting=setting, options=options), trace, setting
    ).result


def two_stages(boundary_tokens: int, num_short: int) -> Plan:
    """A plan that stays as it is."""
    short = StagePlan(low_tokens=0, high_tokens=boundary_tokens, num_workers=num_short)
    long = StagePlan(low_tokens=boundary_tokens, high_tokens=None, num_workers=NUM_INSTANCES - num_short)
    return Plan(version=1, stages=(short, long))


def largest_load(spec: Spec, slo: str) -> float:
    """Bisection in steps of `SLO_STEP`; 0 where not even the least load keeps the level."""
    bounds = parse_slo(slo)
    low, high = 0, round(SLO_MOST / SLO_STEP)
    while high - low > 1:
        middle = (low + high) // 2
        if meets(simulate(replace(spec, load=middle * SLO_STEP, slo=None)), bounds):
            low = middle
        else:
            high = middle
    return low * SLO_STEP


class Results:
    """Results by run, from the folder where they are there; `fill` makes the rest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def fill(self, specs: Iterable[Spec], *, jobs: int) -> None:
        """Make what is missing, in the order given, with a progress bar."""
        missing = [s for s in dict.fromkeys(specs) if not self._path(s).is_file()]
        with progress_bars(False, width=40) as progress:
            task = progress.add_task("simulating", total=len(missing))
            for spec in self._made(missing, jobs=jobs):
                progress.update(task, advance=1, description=f"{spec.case} {spec.load:.0%}")

    def _made(self, missing: list[Spec], *, jobs: int) -> Iterator[Spec]:
        store = partial(_store, self._folder)
        if jobs == 1:
            yield from map(store, missing)
            return
        with ProcessPoolExecutor(jobs) as pool:
            yield from pool.map(store, missing)

    def has(self, specs: Iterable[Spec]) -> bool:
        """Whether all of these runs are there."""
        return all(self._path(spec).is_file() for spec in specs)

    def load(self, spec: Spec) -> float:
        """The largest load of a service level."""
        return float(self._read(spec)["load"])

    def __getitem__(self, spec: Spec) -> SimResult:
        data = self._read(spec)
        classes = {name: ClassResult(**data[name]) for name in ("short", "long")}
        return SimResult(**{f.name: data[f.name] for f in fields(SimResult)} | classes)

    def of(self, spec: Spec, policies: Sequence[str]) -> dict[str, SimResult]:
        """One run for each policy."""
        return {name: self[replace(spec, policy=name)] for name in policies}

    def _read(self, spec: Spec) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(self._path(spec).read_text("utf-8"))
        return data

    def _path(self, spec: Spec) -> Path:
        return self._folder / f"{spec.key}.json"


def _store(folder: Path, spec: Spec) -> Spec:
    """Run and keep the result at once: a report that is cut off goes on where it was."""
    path = folder / f"{spec.key}.json"
    path.with_suffix(".part").write_text(json.dumps(run(spec)), "utf-8")
    path.with_suffix(".part").rename(path)
    return spec
