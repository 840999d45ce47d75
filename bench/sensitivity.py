"""What each constant of the policy decides: the simulated change with half of it and with twice as much.

    python bench/sensitivity.py [--only NAME,...] [--requests 1500] [--gb-per-s 50] [--write]

`l4` on 16 × h100 at 85 % load, with prefix caches, on the two shared traces that know their content (the folder in
L4_SHARED_DIR, default ../shared, below `traces`). Constants of stages are tried with `--without affinity`, where
there are stages. `--write` puts the table into docs/constants.md.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from l4queue.cli.progress import progress_bars
from l4queue.cost.coefficients import read_coefficients
from l4queue.cost.move import MovePrice
from l4queue.sim.capacity import capacity_rps
from l4queue.sim.policies.l4 import L4Options
from l4queue.sim.registry import make_policy
from l4queue.sim.runner import RunConfig, run_policy
from l4queue.sim.traces.content import HASH_BLOCK_TOKENS
from l4queue.sim.traces.trace import Trace, read_trace

TRACES = {"conversation": "mooncake_conversation.w0", "synthetic": "mooncake_synthetic"}
NUM_INSTANCES = 16
LOAD = 0.85
SEEDS = (0, 1, 2)
PAGE = Path(__file__).parents[1] / "docs" / "constants.md"
BEGIN, END = "<!-- begin of the table: bench/sensitivity.py -->\n", "<!-- end of the table -->\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """A number that decides, where it stands, and where it comes from. `owner`: a class whose default it is."""

    module: str
    name: str
    unit: str
    source: str
    owner: str = ""
    is_of_stages: bool = False
    copies: tuple[str, ...] = ()  # other modules that have imported it by name

    @property
    def title(self) -> str:
        """As it is found by a search."""
        return f"`{self.module.rpartition('.')[2]}.{self.owner + '.' if self.owner else ''}{self.name}`"

    @property
    def value(self) -> float:
        """As it is."""
        module = importlib.import_module(self.module)
        found: float = _defaults(module, self.owner)[self.name] if self.owner else getattr(module, self.name)
        return found

    @contextmanager
    def times(self, factor: float) -> Iterator[None]:
        """For the duration, so many times as much; whole numbers stay whole."""
        before = self.value
        after = before * factor if isinstance(before, float) else max(1, round(before * factor))
        self._set(after)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, value: float) -> None:
        for name in (self.module, *self.copies):
            module = importlib.import_module(name)
            if self.owner:
                _defaults(module, self.owner)[self.name] = value
            else:
                setattr(module, self.name, value)


def _defaults(module: Any, owner: str) -> dict[str, Any]:
    found: dict[str, Any] = getattr(module, owner).__init__.__kwdefaults__
    return found


_of = partial(Constant, module="l4queue.policy.escape")
_steal = partial(Constant, module="l4queue.policy.steal", owner="StealLimits")
CONSTANTS = (
    Constant(
        module="l4queue.policy.queue_order",
        name="_AGEING_SHARE",
        unit="share of the prefill rate",
        source="simulated: 200 to 5,000 of 56,000 tokens/s are alike, 20,000 is not",
    ),
    Constant(
        module="l4queue.policy.prefix_affinity",
        name="_SAVED_PER_REQUEST",
        unit="delays a ms",
        source="simulated: 0, 2, 3, 15",
    ),
    Constant(
        module="l4queue.policy.prefix_affinity",
        name="_OTHERS_WEIGHT",
        unit="weight",
        source="simulated: 1, 1/3, 1/5, 1/6",
    ),
    Constant(
        module="l4queue.policy.prefix_affinity",
        name="_MAX_WAIT_MS",
        unit="ms",
        source="a prefill of 100k tokens: 13 s on an H100",
    ),
    Constant(
        module="l4queue.policy.prefix_affinity",
        name="_MAX_PASSED",
        unit="requests",
        source="bounds the work of a look",
    ),
    _of(name="MIN_PREFILL_MS", unit="ms", source="simulated: 10, 30, 100"),
    _of(
        name="REST_MS",
        unit="ms",
        source="simulated: 300 to 3,000",
        copies=("l4queue.sim.policies.l4_escapes",),
    ),
    _of(name="_NUM_TARGETS", unit="siblings", source="simulated: 2, 4, 8"),
    _of(name="_MIN_GAIN_MS", unit="ms", source="error of a prediction"),
    _of(name="_PREFILL_SHARE", unit="share of time", source="simulated: 0, 0.1, 0.4"),
    _of(name="_DISPLACED_WEIGHT", unit="delays a ms", source="simulated: 0, 2, 5, 20"),
    _of(name="_STEPS", unit="steps", source="orders targets only"),
    _steal(name="max_moves", unit="moves", source="bounds the KV on its way"),
    _steal(name="cool_down_ms", unit="ms", source="four rounds of news"),
    _steal(name="overload_ratio", unit="factor", source="above the spread of equal engines"),
    Constant(
        module="l4queue.policy.steal",
        name="_IDLE_PREFILL_SHARE",
        unit="share of a step",
        source="more would hold up decodes",
    ),
    Constant(
        module="l4queue.cost.move",
        owner="MovePrice",
        name="fixed_ms",
        unit="ms",
        source="release, queue, claim: two round trips and a wake-up",
    ),
    Constant(
        module="l4queue.policy.admission",
        name="_PATIENCE",
        unit="times",
        source="simulated: 1, 3, 4, 5, 6",
        is_of_stages=True,
    ),
    Constant(
        module="l4queue.policy.handover",
        name="_EQUAL",
        unit="share",
        source="loads are half a second old",
        is_of_stages=True,
    ),
    Constant(
        module="l4queue.policy.handover",
        name="_LOOK_AGAIN",
        unit="factor",
        source="a request grows",
        is_of_stages=True,
    ),
    _steal(name="max_requests", unit="requests", source="bounds one steal", is_of_stages=True),
    Constant(
        module="l4queue.planning.steady_state",
        owner="PartitionSettings",
        name="kv_margin",
        unit="share",
        source="growth of running requests",
        is_of_stages=True,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """One run: a constant with a factor, or none, on a trace."""

    trace: str
    name: str = ""
    factor: float = 1.0
    is_of_stages: bool = False
    seed: int = 0


@cache
def traffic(name: str, num_requests: int) -> Trace:
    """The first requests of a shared trace, at 85 % load."""
    folder = Path(os.environ.get("L4_SHARED_DIR", "../shared")) / "traces"
    trace = read_trace(folder / f"{TRACES[name]}.csv.gz", hash_block_tokens=HASH_BLOCK_TOKENS).select(
        slice(0, num_requests)
    )
    cost = read_coefficients("h100", "llama-3.1-8b").cost
    return trace.scaled(LOAD * capacity_rps(trace, cost, num_instances=NUM_INSTANCES) / trace.rate_rps)


def run(tried: Tried, *, num_requests: int, gb_per_s: float) -> tuple[float, float]:
    """Mean and 99th percentile of the end-to-end latency, s."""
    constant = next((c for c in CONSTANTS if c.title == tried.name), None)
    if constant is None:
        return _simulate(tried, num_requests, gb_per_s)
    with constant.times(tried.factor):
        return _simulate(tried, num_requests, gb_per_s)


def _simulate(tried: Tried, num_requests: int, gb_per_s: float) -> tuple[float, float]:
    coefficients = read_coefficients("h100", "llama-3.1-8b")
    price = MovePrice(
        bandwidth_bytes_per_s=gb_per_s * 1e9 or None, kv_bytes_per_token=coefficients.kv_bytes_per_token
    )
    setting = RunConfig(cost=coefficients.cost, num_instances=NUM_INSTANCES, price=price, seed=tried.seed)
    trace = traffic(tried.trace, num_requests)
    options = L4Options(without=frozenset({"affinity"} if tried.is_of_stages else ()))
    result = run_policy(make_policy("l4", trace=trace, setting=setting, options=options), trace, setting).result
    return result.mean_e2e_s, result.p99_e2e_s


def all_runs(constants: Sequence[Constant]) -> list[Tried]:
    """The runs as they are, and each constant halved and doubled, with three seeds each."""
    plain = [
        Tried(trace=trace, is_of_stages=is_of_stages, seed=seed)
        for trace in TRACES
        for is_of_stages in {constant.is_of_stages for constant in constants}
        for seed in SEEDS
    ]
    return plain + [
        Tried(trace=trace, name=constant.title, factor=factor, is_of_stages=constant.is_of_stages, seed=seed)
        for constant in constants
        for trace in TRACES
        for factor in (0.5, 2.0)
        for seed in SEEDS
    ]


Found = dict[Tried, tuple[float, float]]


def table(constants: Sequence[Constant], found: Found) -> str:
    """Changes against the runs as they are, half / twice; the last rows tell how far seeds differ."""
    heads = [f"{trace}: {what}" for trace in TRACES for what in ("mean", "p99")]
    lines = [
        "| constant | value | unit | source | " + " | ".join(heads) + " |",
        "|---|---|---|---|" + "---|" * len(heads),
    ]
    for constant in constants:
        cells = [constant.title, f"{constant.value:.4g}", constant.unit, constant.source]
        for trace in TRACES:
            at = partial(Tried, trace=trace, is_of_stages=constant.is_of_stages)
            for index in range(2):
                base = sum(_by_seed(found, at, index))
                tried = [partial(at, name=constant.title, factor=factor) for factor in (0.5, 2.0)]
                cells.append(" / ".join(f"{sum(_by_seed(found, one, index)) / base - 1:+.1%}" for one in tried))
        lines.append("| " + " | ".join(cells) + " |")
    for is_of_stages in sorted({constant.is_of_stages for constant in constants}):
        cells = [f"chance, {'stages' if is_of_stages else 'affinity'}", "", "", "standard error over the seeds"]
        for trace in TRACES:
            at = partial(Tried, trace=trace, is_of_stages=is_of_stages)
            for index in range(2):
                values = _by_seed(found, at, index)
                cells.append(f"± {stdev(values) / len(values) ** 0.5 / fmean(values):.1%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _by_seed(found: Found, at: Callable[..., Tried], index: int) -> list[float]:
    return [found[at(seed=seed)][index] for seed in SEEDS]


def main() -> None:
    """Run, print, and write the page if that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="Names of constants, by commas.")
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--gb-per-s", type=float, default=50.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    names = {name for name in arguments.only.split(",") if name}
    constants = [constant for constant in CONSTANTS if not names or constant.name in names]
    runs = all_runs(constants)
    work = partial(run, num_requests=arguments.requests, gb_per_s=arguments.gb_per_s)
    with ProcessPoolExecutor(arguments.processes) as pool, progress_bars(False, width=4) as bars:
        found = dict(zip(runs, bars.track(pool.map(work, runs), total=len(runs), description="runs"), strict=True))
    text = table(constants, found)
    print(text, end="")
    if arguments.write:
        before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
        PAGE.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
