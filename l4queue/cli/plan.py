"""`l4queue plan`: the plan in force and its history, or the best plan for a trace."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l4queue.cli.cost_source import CoefficientsOption, GpuOption, ModelOption, costs_from

if TYPE_CHECKING:
    from collections.abc import Sequence

    from l4queue.models import Plan, StagePlan
    from l4queue.planning.partition import StagePrediction

__all__ = ("register",)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def solve(
    trace: Annotated[
        Path | None,
        typer.Argument(help="A trace, as for `l4queue simulate`.", show_default=False),
    ] = None,
    *,
    workload: Annotated[str | None, typer.Option(help="A synthetic workload instead of a trace.")] = None,
    num_requests: Annotated[int, typer.Option(min=1, help="Requests of the synthetic workload.")] = 2000,
    instances: Annotated[int, typer.Option(min=1, max=4096, help="Engine instances.")] = 16,
    gpu: GpuOption = None,
    model: ModelOption = None,
    coefficients: CoefficientsOption = None,
    load: Annotated[
        float | None, typer.Option(min=0.01, max=2.0, help="Scale arrivals to this share of capacity.")
    ] = None,
    objective: Annotated[str, typer.Option(help="balanced, mean, normalized or goodput.")] = "balanced",
    max_stages: Annotated[int, typer.Option(min=1, max=16, help="Most stages.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the synthetic workload.")] = 0,
    as_json: Json = False,
) -> None:
    """Choose ranges and workers for a trace.

    By the dynamic program of the planner. Needs no GPU and no Redis.
    """
    from l4queue.cli.simulate import load_traffic
    from l4queue.planning.histogram import Buckets, Demand
    from l4queue.planning.partition import partition
    from l4queue.planning.steady_state import Objective, PartitionSettings
    from l4queue.sim.capacity import capacity_rps
    from l4queue.sim.policies.l4 import L4Options

    L4Options.checked(objective=objective, without=frozenset())
    traffic = load_traffic(trace, workload, num_requests=num_requests, seed=seed)
    cost = costs_from(coefficients, gpu=gpu, model=model).cost
    if load is not None:
        traffic = traffic.scaled(load * capacity_rps(traffic, cost, num_instances=instances) / traffic.rate_rps)
    started_s = time.perf_counter()
    buckets = Buckets.log_spaced(int((traffic.input_tokens + traffic.output_tokens).max()) + 1)
    duration_s = max(1e-3, float(traffic.arrival_s[-1] - traffic.arrival_s[0]))
    demand = Demand.of_requests(buckets, traffic.input_tokens, traffic.output_tokens, duration_s=duration_s)
    settings = PartitionSettings(objective=Objective(objective), max_stages=max_stages)
    found = partition(demand, instances, buckets=buckets, cost=cost, settings=settings)
    solve_ms = (time.perf_counter() - started_s) * 1000
    answer = {
        "stages": [_stage(s) for s in found.stages],
        "objective": _finite(found.objective),
        "objective_one_stage": _finite(found.objective_one_stage),
        "solve_ms": round(solve_ms, 3),
    }
    if as_json:
        print(json.dumps(answer))
        return
    _print_stages(f"{traffic.name}: {instances} instances, solved in {solve_ms:.1f} ms", found.stages)
    if found.objective_one_stage > 0 and found.objective < float("inf"):
        print(_gain(1 - found.objective / found.objective_one_stage, objective))


def show(
    history: Annotated[int, typer.Option(min=0, help="Number of earlier plans to list, too.")] = 0,
    as_json: Json = False,
) -> None:
    """The plan in force, as published in Redis."""
    from l4queue.client import Client

    with Client() as client:
        plan = client.overview().plan
        earlier = client.plan_history(count=history) if history else []
    if as_json:
        print(json.dumps({**_plan(plan), "history": [_plan(old) for old in earlier]}))
        return
    _print_stages(f"plan {plan.version}: {plan.reason or 'one stage'}", plan.stages)
    for old in earlier:
        ranges = ", ".join(f"[{s.low_tokens}, {s.high_tokens or '∞'}) × {s.num_workers}" for s in old.stages)
        print(f"{old.version:>5}  {ranges}  ({old.reason})")


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    group = typer.Typer(no_args_is_help=True, help="The plan in force, or the best plan for a trace.")
    group.command()(solve)
    group.command()(show)
    app.add_typer(group, name="plan")


def _plan(plan: Plan) -> dict[str, Any]:
    return {
        "version": plan.version,
        "reason": plan.reason,
        "stages": [_stage(s) for s in plan.stages],
        "prefix_affinity": plan.prefix_affinity,
    }


def _stage(stage: StagePlan | StagePrediction) -> dict[str, Any]:
    return {
        "low_tokens": stage.low_tokens,
        "high_tokens": stage.high_tokens,
        "num_workers": stage.num_workers,
    }


def _gain(share: float, objective: str) -> str:
    """What the plan is predicted to gain; objectives are costs, so less is better."""
    if share <= 0.0:
        return f"no plan is predicted to be better than one stage for all (objective: {objective})"
    return f"predicted to be {share:.1%} better than one stage for all (objective: {objective})"


def _finite(value: float) -> float | None:
    return value if value < float("inf") else None


def _print_stages(title: str, stages: Sequence[StagePlan | StagePrediction]) -> None:
    from rich.console import Console
    from rich.table import Table

    print(title)  # above the table, whose width would break it
    table = Table()
    for name in ("stage", "from, tokens", "below, tokens", "workers"):
        table.add_column(name, justify="right")
    for index, stage in enumerate(stages):
        high = "∞" if stage.high_tokens is None else str(stage.high_tokens)
        table.add_row(str(index), str(stage.low_tokens), high, str(stage.num_workers))
    Console().print(table)
