"""`l4queue simulate`: the effect of each policy on a trace, by number of instances."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l4queue.cli.cost_source import CoefficientsOption, CostSource, GpuOption, ModelOption, costs_from
from l4queue.cli.simulation_table import ROWS, cells_of, print_table
from l4queue.cost.move import DEFAULT_LINK_GB_PER_S

if TYPE_CHECKING:
    from rich.progress import Progress

    from l4queue.sim.capacity import Bound
    from l4queue.sim.cluster import Cluster
    from l4queue.sim.policies.l4 import L4Options
    from l4queue.sim.results import SimResult
    from l4queue.sim.runner import Run, RunConfig
    from l4queue.sim.traces.trace import Trace

__all__ = ("Study", "load_traffic", "register")

DEFAULT_POLICIES = "round-robin,least-requests,central,central-sjf,l4"
LOAD_POINTS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # shares of the capacity
PROGRESS_EVERY = 512  # finished requests between two updates of the bar

TraceArgument = Annotated[
    Path | None,
    typer.Argument(
        help="CSV with arrival_s,input_tokens,output_tokens; Azure's CSV; Mooncake's JSON lines.",
        show_default=False,
    ),
]
WorkloadOption = Annotated[
    str | None,
    typer.Option(
        help="Synthetic instead: chat, code, long-context, reasoning, mixed, sharegpt, multi-turn, agent."
    ),
]
RequestsOption = Annotated[int, typer.Option(min=1, help="Requests of the synthetic workload.")]
InstancesOption = Annotated[int, typer.Option(min=1, max=4096, help="Engine instances.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of every random draw.")]
LoadOption = Annotated[
    float | None,
    typer.Option(min=0.01, max=2.0, help="Scale arrivals to this share of the capacity of a length-blind fleet."),
]
RateScaleOption = Annotated[float | None, typer.Option(min=1e-6, help="Arrivals this many times as fast.")]
ObjectiveOption = Annotated[str, typer.Option(help="Objective of l4: balanced, mean, normalized, goodput.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """One invocation: the scaled traffic and the setting all policies share."""

    trace: Trace
    setting: RunConfig
    options: L4Options
    capacity_rps: float | None
    rate_scale: float
    costs_told: str

    def describe(self) -> dict[str, Any]:
        """The setting as plain values."""
        return {
            "trace": self.trace.name,
            "num_requests": len(self.trace),
            "rate_rps": self.trace.rate_rps,
            "rate_scale": self.rate_scale,
            "capacity_rps": self.capacity_rps,
            "num_instances": self.setting.num_instances,
            "has_prefix_caches": self.trace.chains is not None,
            "seed": self.setting.seed,
            "objective": self.options.objective,
            "without": sorted(self.options.without),
            "costs": self.costs_told,
            "cost": self.setting.cost.to_dict(),
        }


def load_traffic(
    path: Path | None,
    workload: str | None,
    *,
    num_requests: int,
    seed: int,
    hash_block_tokens: int | None = None,
) -> Trace:
    """The trace of the file, or the synthetic workload; ConfigError unless exactly one is named.

    Without `hash_block_tokens` nothing is known of the content.
    """
    import numpy as np

    from l4queue.errors import ConfigError
    from l4queue.sim.traces.sessions import SESSIONS, make_sessions
    from l4queue.sim.traces.trace import read_trace
    from l4queue.sim.traces.workload import WORKLOADS, make_workload

    if path is None and workload is None:
        known = "|".join((*WORKLOADS, *SESSIONS))
        raise ConfigError(f"name a trace file, or a synthetic workload: --workload {known}")
    if path is not None and workload is not None:
        raise ConfigError(f"a trace file ({path}) and --workload {workload} exclude each other; leave one out")
    if path is not None:
        return read_trace(path, hash_block_tokens=hash_block_tokens)
    assert workload is not None
    if workload in SESSIONS:
        made = make_sessions(workload, num_requests=num_requests, seed=seed)
        return made if hash_block_tokens is not None else made.without_content()
    return make_workload(workload, num_requests=num_requests, rng=np.random.default_rng(seed))


def simulate(
    trace: TraceArgument = None,
    *,
    workload: WorkloadOption = None,
    num_requests: RequestsOption = 2000,
    instances: InstancesOption = 16,
    gpu: GpuOption = None,
    model: ModelOption = None,
    coefficients: CoefficientsOption = None,
    load: LoadOption = None,
    rate_scale: RateScaleOption = None,
    policy: Annotated[str, typer.Option(help="Comma-separated policies, or all.")] = DEFAULT_POLICIES,
    objective: ObjectiveOption = "balanced",
    without: Annotated[
        list[str] | None,
        typer.Option(help="Switch an L4 ingredient off (repeatable): see docs/simulator.md."),
    ] = None,
    handover_gb_per_s: Annotated[
        float, typer.Option(min=0, help="Hand-over by KV transfer at this bandwidth; 0: by prefilling again.")
    ] = DEFAULT_LINK_GB_PER_S,
    handover_room_gib: Annotated[
        float, typer.Option(min=0, help="Room for KV caches on their way, in all, GiB; 0: without bound.")
    ] = 0.0,
    prefix_cache: Annotated[
        bool, typer.Option(help="Engines keep KV blocks of what they served, where the trace knows the content.")
    ] = True,
    hash_block_tokens: Annotated[
        int, typer.Option(min=16, help="Prompt tokens that each hash id of the trace stands for.")
    ] = 512,
    warmup_share: Annotated[
        float, typer.Option(min=0, max=0.9, help="First share of arrivals, not counted.")
    ] = 0.0,
    find_instances: Annotated[
        bool, typer.Option("--find-instances", help="Fewest instances that keep --slo.")
    ] = False,
    slo: Annotated[
        str | None,
        typer.Option(help='With --find-instances: what is to be kept, such as "p99_ttft_s<5,p99_tpot_s<0.1".'),
    ] = None,
    seed: SeedOption = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write PNG plots into this directory.")] = None,
) -> None:
    """Compare scheduling policies on a trace.

    Replays it, or a synthetic workload, under each of them. Needs no GPU and no Redis.
    """
    from l4queue.errors import ConfigError
    from l4queue.sim.capacity import parse_slo
    from l4queue.sim.registry import parse_policies

    if find_instances != (slo is not None):
        missing, given = ("--slo", "--find-instances") if find_instances else ("--find-instances", "--slo")
        raise ConfigError(f"{given} needs {missing}, such as: --find-instances --slo 'p99_ttft_s<5'")
    bounds = parse_slo(slo) if slo is not None else ()
    names = parse_policies(policy)
    if plot is not None:
        from l4queue.sim.plots import require_matplotlib

        require_matplotlib()
    study = _make_study(
        load_traffic(
            trace,
            workload,
            num_requests=num_requests,
            seed=seed,
            hash_block_tokens=hash_block_tokens if prefix_cache else None,
        ),
        instances=instances,
        costs=costs_from(coefficients, gpu=gpu, model=model),
        load=load,
        rate_scale=rate_scale,
        objective=objective,
        without=frozenset(without or ()),
        handover_gb_per_s=handover_gb_per_s,
        handover_room_gib=handover_room_gib,
        warmup_share=warmup_share,
        seed=seed,
    )
    with _progress(is_shown=not as_json) as progress:
        if find_instances:
            found = _find(study, names, bounds, progress)
            _print_found(study, found, as_json=as_json)
            return
        runs = [_run(study, name, progress) for name in names]
        if plot is not None:
            from l4queue.sim.plots import plot_runs

            plot_runs(plot, runs, curves=_curves(study, names, progress) if study.capacity_rps else None)
    _print_runs(study, runs, as_json=as_json)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("simulate")(simulate)


def _make_study(
    trace: Trace,
    *,
    instances: int,
    costs: CostSource,
    load: float | None,
    rate_scale: float | None,
    objective: str,
    without: frozenset[str],
    handover_gb_per_s: float,
    handover_room_gib: float,
    warmup_share: float,
    seed: int,
) -> Study:
    from l4queue.cost.move import MovePrice
    from l4queue.errors import ConfigError
    from l4queue.sim.capacity import capacity_rps
    from l4queue.sim.policies.l4 import L4Options
    from l4queue.sim.runner import RunConfig, check_fits

    if load is not None and rate_scale is not None:
        raise ConfigError("--load and --rate-scale exclude each other: both say how fast requests arrive")
    options = L4Options.checked(objective=objective, without=without)
    cost = costs.cost
    if "skew" in without:
        cost = replace(cost, sigma_ms=0.0)
    check_fits(trace, cost)
    capacity = None
    scale = rate_scale or 1.0
    if load is not None:
        if trace.rate_rps == 0:
            raise ConfigError(f"--load: all requests of {trace.name} arrive at once; there is no rate to scale")
        capacity = capacity_rps(trace, cost, num_instances=instances)
        scale = load * capacity / trace.rate_rps
    price = MovePrice(
        bandwidth_bytes_per_s=handover_gb_per_s * 1e9 or None,
        kv_bytes_per_token=costs.kv_bytes_per_token,
        room_bytes=round(handover_room_gib * 2**30) or None,
    )
    setting = RunConfig(
        cost=cost,
        num_instances=instances,
        seed=seed,
        warmup_share=warmup_share,
        price=price,
    )
    return Study(
        trace=trace.scaled(scale),
        setting=setting,
        options=options,
        capacity_rps=capacity,
        rate_scale=scale,
        costs_told=costs.told,
    )


def _progress(*, is_shown: bool) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not is_shown)


def _run(study: Study, name: str, progress: Progress, *, setting: RunConfig | None = None) -> Run:
    from l4queue.sim.registry import make_policy
    from l4queue.sim.runner import run_policy

    setting = setting or study.setting
    task = progress.add_task(f"{name} × {setting.num_instances}", total=len(study.trace))
    policy = make_policy(name, trace=study.trace, setting=setting, options=study.options)
    run = run_policy(policy, study.trace, setting, observe=_reporter(progress, task))
    progress.remove_task(task)
    return run


def _reporter(progress: Progress, task: Any) -> Callable[[Cluster], None] | None:
    if progress.disable:
        return None
    left = PROGRESS_EVERY

    def report(cluster: Cluster) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            left = PROGRESS_EVERY
            progress.update(task, completed=cluster.num_finished)

    return report


def _find(
    study: Study, names: tuple[str, ...], bounds: tuple[Bound, ...], progress: Progress
) -> dict[str, tuple[int, SimResult] | None]:
    from l4queue.sim.capacity import find_instances

    def runner(name: str) -> Callable[[int], SimResult]:
        def run(count: int) -> SimResult:
            return _run(study, name, progress, setting=replace(study.setting, num_instances=count)).result

        return run

    return {name: find_instances(runner(name), bounds) for name in names}


def _curves(study: Study, names: tuple[str, ...], progress: Progress) -> dict[str, list[tuple[float, float]]]:
    """Mean latency of each policy at several loads."""
    from l4queue.sim.registry import make_policy
    from l4queue.sim.runner import run_policy

    assert study.capacity_rps is not None
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    task = progress.add_task("loads", total=len(LOAD_POINTS) * len(names))
    for load in LOAD_POINTS:
        trace = study.trace.scaled(load * study.capacity_rps / study.trace.rate_rps)
        for name in names:
            policy = make_policy(name, trace=trace, setting=study.setting, options=study.options)
            curves[name].append((load, run_policy(policy, trace, study.setting).result.mean_e2e_s))
            progress.advance(task)
    return curves


def _traffic(study: Study) -> str:
    title = f"{study.trace.name}: {len(study.trace)} requests at {study.trace.rate_rps:.2f}/s"
    if study.capacity_rps:
        share = study.trace.rate_rps / study.capacity_rps
        title += f", {share:.0%} of the capacity of {study.setting.num_instances} instances"
    return title


def _print_runs(study: Study, runs: list[Run], *, as_json: bool) -> None:
    if as_json:
        results = [run.result.to_dict() for run in runs]
        typer.echo(json.dumps({"results": results, "setting": study.describe()}, indent=2))
        return
    caches = " with prefix caches" if study.trace.chains is not None else ""
    title = f"{_traffic(study)}, on {study.setting.num_instances} instances{caches} (simulated)"
    print_table(title, {run.result.policy: cells_of(run.result) for run in runs})


def _print_found(study: Study, found: dict[str, tuple[int, SimResult] | None], *, as_json: bool) -> None:
    if as_json:
        results = [
            {"num_instances": value[0], **value[1].to_dict()} if value else {"num_instances": None, "policy": name}
            for name, value in found.items()
        ]
        typer.echo(json.dumps({"results": results, "setting": study.describe()}, indent=2))
        return
    empty = ["-"] * (len(ROWS) + 6)
    columns = {n: [str(v[0]), *cells_of(v[1])] if v else ["none", *empty] for n, v in found.items()}
    print_table(
        f"fewest instances that keep the service level (simulated), for {_traffic(study)}",
        columns,
        first="instances",
    )
