"""`l4queue bench serve`: routing policies compared on the same engines under the same arrivals."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l4queue.cli.bench.queue.command import queue
from l4queue.cli.progress import progress_bars

if TYPE_CHECKING:
    from rich.progress import Progress

    from l4queue.cli.bench.rounds import Round
    from l4queue.cli.stack.stack import Stack, StackOptions
    from l4queue.sim.traces.trace import Trace

__all__ = ("register",)

DEFAULT_POLICIES = "round-robin,least-loaded,two-pool,central,central-sjf,l4"
_TOLD_SETTINGS = (
    "durability",
    "max_model_len",
    "max_running",
    "max_batched_tokens",
    "emit_interval_ms",
    "emulated_gpu",
    "emulated_model",
    "emulated_speed",
    "emulated_kv_bytes_per_s",
    "hand_over",
    "escape",
    "steal_from",
    "replan_interval_s",
    "refine_interval_s",
    "demand_half_life_s",
    "plan_min_gain",
    "plan_min_life_s",
    "max_stages",
)
"""Settings of the deployment in the JSON: all that a simulation of the same run needs."""


def serve(
    trace: Annotated[
        Path | None, typer.Argument(help="CSV or CSV.gz with arrival_s,input_tokens,output_tokens.")
    ] = None,
    *,
    engine: Annotated[str, typer.Option(help="vllm or emulated.")] = "vllm",
    workers: Annotated[int, typer.Option(min=1, help="How many workers.")] = 2,
    workers_per_process: Annotated[
        int, typer.Option(min=1, help="Emulated workers that share a process: many of them on few cores.")
    ] = 1,
    model: Annotated[str, typer.Option(help="Model path; tiny builds a small random-weight Llama.")] = "tiny",
    policy: Annotated[
        str, typer.Option(help="Comma-separated; the first is what ratios refer to.")
    ] = DEFAULT_POLICIES,
    workload: Annotated[
        str,
        typer.Option(
            help="Without a trace: mixed (90 % of at most 256 prompt and 32 output tokens, 10 % of 3,000 to "
            "6,000 and 64), flip (its mix turns over twice), or a workload of `simulate`."
        ),
    ] = "mixed",
    rate: Annotated[
        float | None, typer.Option(min=0.01, help="Requests per second; a trace keeps its own.")
    ] = None,
    rate_scale: Annotated[
        float | None, typer.Option(min=1e-6, help="Play a trace this many times as fast as it was recorded.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How many times each policy is run.")] = 3,
    duration_s: Annotated[float, typer.Option(min=1.0, help="Counted part of each run.")] = 60.0,
    warmup_s: Annotated[float, typer.Option(min=0.0, help="Served before it, not counted.")] = 15.0,
    rehearse: Annotated[
        bool, typer.Option(help="Run l4 once uncounted before the rounds, for its planner to learn.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed of arrivals, lengths and prompts.")] = 0,
    data_dir: Annotated[Path, typer.Option(help="Where Redis keeps its data and logs go.")] = Path(
        ".l4queue-bench"
    ),
    plot: Annotated[Path | None, typer.Option(help="Write PNG plots into this directory.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Compare routings on the same engines.

    Policies run one after the other, in interleaved rounds on one deployment. round-robin, least-loaded and
    two-pool push each request to a worker's own queue when it arrives, as a router does (two-pool is tuned on
    these arrivals by simulation); central and central-sjf are one queue from which workers take; l4 is all of
    l4queue, and runs once uncounted before the rounds, as its planner learns from what it has seen (--no-
    rehearse: it begins with nothing). Arrivals are open loop; times are those of the server. Each round draws
    other arrivals (seed, seed + 1, ...), the same for every policy; a trace has only its own.
    """
    from l4queue.cli.bench.report import machine, plot_rounds, report
    from l4queue.cli.bench.traffic import bench_trace
    from l4queue.cli.stack.stack import StackOptions
    from l4queue.errors import ConfigError
    from l4queue.models import Routing
    from l4queue.sim.plots import require_matplotlib

    policies = [name.strip() for name in policy.split(",") if name.strip()]
    for name in policies:
        if name not in set(Routing):
            raise ConfigError(f"--policy: {name!r} is unknown; choose from {', '.join(Routing)}")
    if not policies:
        raise ConfigError("--policy names no policy")
    if plot is not None:
        require_matplotlib()
    draw = partial(
        bench_trace, trace, workload, rate=rate, rate_scale=rate_scale, duration_s=warmup_s + duration_s
    )
    seeds = range(seed, seed + rounds + 1)
    traces = [draw(seed=one) for one in seeds] if trace is None else [draw(seed=seed)] * len(seeds)
    study = _Study(
        traces=traces,
        policies=policies,
        warmup_s=warmup_s,
        seed=seed,
        rehearses=rehearse and Routing.L4 in policies,
    )
    options = StackOptions(
        workers=workers,
        workers_per_process=workers_per_process,
        engine=engine,
        model=model,
        data_dir=data_dir,
        flower=False,
        quiet=as_json,
    )
    done, described = asyncio.run(_run(study, options))
    results = report(done, policies)
    files = plot_rounds(plot, done) if plot is not None else []
    setting = {"engine": engine, "num_workers": workers, "workload": traces[0].name, "rounds": rounds}
    setting |= {"duration_s": duration_s, "warmup_s": warmup_s, "seed": seed, **described}
    rate_rps = sum(one.rate_rps for one in traces[:-1]) / rounds
    setting |= {"rate_rps": rate_rps, "rate_scale": rate_scale, "rehearsed": study.rehearses}
    if as_json:
        print(json.dumps({"setting": setting, "machine": machine(), "results": results}))
        return
    _show(results, {**setting, **machine()}, files)


def _show(results: list[dict[str, Any]], about: dict[str, Any], files: list[Path]) -> None:
    """Print the comparison for people."""
    from rich.console import Console

    from l4queue.cli.bench.report import remarks, table

    console = Console()
    console.print(table(results))
    console.print(
        "short and long: prompts below and from 1,024 tokens; moves: hand-overs and steals; busy: share of the "
        "time in which an engine had requests"
    )
    for remark in remarks(results):
        console.print(remark, highlight=False)
    for name in ("cost_of_a_worker", "settings"):
        about.pop(name)
    console.print(", ".join(f"{name} {value}" for name, value in about.items()), highlight=False)
    for file in files:
        console.print(f"wrote {file}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Study:
    """Runs to make on any deployment: a trace for each round and one for the rehearsal."""

    traces: list[Trace]
    policies: list[str]
    warmup_s: float
    seed: int
    rehearses: bool


async def _run(study: _Study, options: StackOptions) -> tuple[list[Round], dict[str, Any]]:
    from l4queue.cli.stack.ending import ending_well
    from l4queue.cli.stack.stack import Stack

    stack = Stack(options)
    async with ending_well(note=stack.note_end, kill=stack.kill) as ending, stack:
        await stack.ready()
        with progress_bars(options.quiet, width=8) as progress:
            return await _all_rounds(stack, study, progress)
    raise typer.Exit(ending.exit_code)


async def _all_rounds(stack: Stack, study: _Study, progress: Progress) -> tuple[list[Round], dict[str, Any]]:
    from l4queue.cli.bench.cpu_time import cpu_seconds
    from l4queue.cli.bench.rounds import Rounds
    from l4queue.client import AsyncClient

    done: list[Round] = []
    num_rounds = len(study.traces) - 1
    total = progress.add_task("runs", total=num_rounds * len(study.policies) + study.rehearses)
    bar = progress.add_task("requests", total=len(study.traces[0]))
    async with AsyncClient(stack.redis_url, settings=stack.settings) as client:
        driver = Rounds(
            client=client,
            settings=stack.settings,
            traces=study.traces,
            warmup_s=study.warmup_s,
            seed=study.seed,
            on_progress=lambda number, of: progress.update(bar, completed=number, total=of),
            cpu_s=lambda: cpu_seconds(
                {"bench": os.getpid(), **{name: child.pid for name, child in stack.supervisor.children.items()}}
            ),
        )
        if study.rehearses:
            await driver.rehearse()
            progress.advance(total)
        for number in range(num_rounds):
            async for one in driver.run(study.policies, number=number):
                done.append(one)
                progress.advance(total)
                text = f"{one.policy}, round {number + 1}: mean {one.result.mean_e2e_s:.3f} s, "
                text += f"p99 {one.result.p99_e2e_s:.2f} s; fixed work {one.fixed_work_ms:.2f} ms"
                progress.console.print(text, highlight=False)
        overview = await client.overview()
    costs = [cost for cost in overview.costs if cost]
    cost = costs[0] if costs else None
    settings = stack.settings.model_dump(mode="json", include=set(_TOLD_SETTINGS))
    return done, {"model": Path(stack.settings.model).name, "cost_of_a_worker": cost, "settings": settings}


def register(app: typer.Typer) -> None:
    """Add the group `bench` to the application."""
    group = typer.Typer(no_args_is_help=True, help="Benchmarks of a deployment on this machine.")
    group.command()(serve)
    group.command()(queue)
    group.callback()(_group)
    app.add_typer(group, name="bench")


def _group() -> None:
    """Benchmarks of a deployment on this machine."""
