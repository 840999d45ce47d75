"""`l4queue stats` and `l4queue plan show`: waiting and running requests, and the range of each worker."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from l4queue.observe.overview import Overview

__all__ = ("register",)


def stats(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Until Ctrl-C, with latencies and rates.")] = False,
    interval_s: Annotated[
        float, typer.Option("--interval", "-i", min=0.1, metavar="S", help="Between two looks of --watch, s.")
    ] = 2.0,
) -> None:
    """Show stages, workers, queues and totals.

    Once, or with --watch as a live view; with --json --watch one line of JSON for each look.
    """
    if watch:
        from l4queue.cli.watch import command as watching

        watching.watch(interval_s=interval_s, as_json=as_json)
        return
    overview = _read()
    if as_json:
        print(json.dumps(asdict(overview)))
    else:
        from rich.console import Console

        for table in tables(overview):
            Console().print(table)
        if (note := _clock_note()) is not None:
            Console().print(note)


def tables(overview: Overview) -> list[Any]:
    """Tables for a terminal of 80 columns: stages, workers, totals, results, moves."""
    from rich.table import Table

    plan = overview.plan
    stages = Table(title=f"plan {plan.version}: {plan.reason or 'one stage'}", title_justify="left")
    for name in ("stage", "range", "workers", "waiting", "tokens"):
        stages.add_column(name, justify="right")
    for index, stage in enumerate(plan.stages):
        queue = overview.queues.get(str(index))
        high = "∞" if stage.high_tokens is None else str(stage.high_tokens)
        serving = sum(1 for worker in overview.workers if worker.stage == index)
        waiting = (str(queue.num_requests), str(queue.tokens)) if queue else ("0", "0")
        stages.add_row(str(index), f"{stage.low_tokens}–{high}", str(serving), *waiting)
    workers = Table(title="workers", title_justify="left")
    for name in ("worker", "stage", "running", "context", "KV", "cached", "step ms", "finished"):
        workers.add_column(name, justify="left" if name == "worker" else "right")
    for load in overview.workers:
        workers.add_row(
            load.worker_id,
            str(load.stage),
            f"{load.num_running}/{load.max_running}",
            str(load.context_tokens),
            f"{load.kv_share:.0%}",
            f"{load.num_cached_tokens / load.num_prompt_tokens:.0%}" if load.num_prompt_tokens else "–",
            f"{load.step_ms:.1f}",
            str(load.num_finished),
        )
    totals = Table(title="requests", title_justify="left")
    for name in ("live", "inbox", "done", "failed", "cancelled", "expired", "dead"):
        totals.add_column(name, justify="right")
    counts = {**overview.counts, "inbox": overview.inbox}
    totals.add_row(
        *(str(counts.get(name, 0)) for name in ("live", "inbox", "done", "failed")),
        *(str(counts.get(name, 0)) for name in ("cancelled", "expired", "dead")),
    )
    return [stages, workers, totals, _results(counts), _moves(counts), *_kv_moves(overview)]


def _results(counts: dict[str, int]) -> Any:
    """Ended requests that are kept, and results that went early because `L4_MAX_RESULT_BYTES` was reached."""
    from rich.table import Table

    table = Table(title="results", title_justify="left")
    for name in ("kept MB", "dropped early"):
        table.add_column(name, justify="right")
    table.add_row(f"{counts.get('result_bytes', 0) / 1e6:.1f}", str(counts.get("results_dropped", 0)))
    return table


def _moves(counts: dict[str, int]) -> Any:
    """Moves between workers since the beginning, and the mean time in which a moved request made no token."""
    from rich.table import Table

    from l4queue.protocol.ledger import MoveCounter, ResumeCounter

    table = Table(title="moves", title_justify="left")
    for name in ("hand-overs", "stolen waiting", "stolen running", "resumed", "mean gap ms"):
        table.add_column(name, justify="right")
    resumes = counts.get(ResumeCounter.RESUMES, 0)
    moved = (counts.get(name, 0) for name in MoveCounter)
    gap = f"{counts.get(ResumeCounter.GAP_MS, 0) / resumes:.0f}" if resumes else "–"
    table.add_row(*map(str, moved), str(resumes), gap)
    return table


def _kv_moves(overview: Overview) -> list[Any]:
    """Room and speed of KV caches on their way, where any worker moves them."""
    from rich.table import Table

    from l4queue.hardware import memory_text
    from l4queue.observe.overview import price_in_force

    price = price_in_force(overview)
    if price.bandwidth_bytes_per_s is None:
        return []
    table = Table(title="KV caches on their way", title_justify="left")
    for name in ("GB/s", "room", "in tokens"):
        table.add_column(name, justify="right")
    room = price.room_bytes
    tokens = "no bound" if room is None else str(room // max(1, price.kv_bytes_per_token))
    size = "no bound" if room is None else memory_text(room)
    table.add_row(f"{price.bandwidth_bytes_per_s / 1e9:.2f}", size, tokens)
    return [table]


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.command()(stats)


def _clock_note() -> str | None:
    from l4queue.config import load_settings
    from l4queue.observe.health import clock_ahead_s, clock_note
    from l4queue.protocol.executor import Executor

    executor = Executor(load_settings().redis_url)
    try:
        return clock_note(clock_ahead_s(executor))
    finally:
        executor.close()


def _read() -> Overview:
    from l4queue.client import Client

    with Client() as client:
        return client.overview()
