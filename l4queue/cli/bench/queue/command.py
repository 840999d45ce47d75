"""`l4queue bench queue`: requests/s, CPU time, latency and memory of the queue itself, beside others."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l4queue.cli.progress import progress_bars

if TYPE_CHECKING:
    from l4queue.cli.bench.queue.ceiling import Ceiling
    from l4queue.cli.bench.queue.measure import QueueRound
    from l4queue.cli.bench.queue.study import QueueStudy

__all__ = ("queue",)


def queue(
    *,
    requests: Annotated[
        int, typer.Option(min=1, help="Requests of a rush; fewer where they would take more than 8 s.")
    ] = 5000,
    rounds: Annotated[int, typer.Option(min=1, help="How often each queue is started and measured.")] = 2,
    durability: Annotated[
        str, typer.Option(help="Comma-separated: fast (fsync once a second), strict (before every reply).")
    ] = "fast,strict",
    prompt_bytes: Annotated[
        str, typer.Option(help="Sizes of prompts, comma-separated: 200,4000,40000,400000.")
    ] = "200",
    as_input: Annotated[
        str, typer.Option("--input", help="Prompts as text, or as ids: token ids, one for each 4 bytes.")
    ] = "text",
    clients: Annotated[int, typer.Option(min=1, help="Client processes that send at the same time.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 1,
    latencies: Annotated[
        int, typer.Option(min=0, help="Requests of a round for each latency; 0: leave latencies out.")
    ] = 100,
    data_dir: Annotated[
        Path, typer.Option(help="On its disk Redis keeps its data meanwhile; nothing stays there.")
    ] = Path(),
    peers: Annotated[
        str,
        typer.Option(
            help="Queues to measure beside it, comma-separated: bullmq, saq, dramatiq, arq, taskiq, streaq, "
            "celery, or all.",
            show_default=False,
        ),
    ] = "",
    plot: Annotated[Path | None, typer.Option(help="Write PNG plots into this directory.")] = None,
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE|-", help="Write JSON into a file; - is standard output, alone."),
    ] = None,
) -> None:
    """Measure what the queue itself costs.

    Every process is real: redis-server, dispatcher, planner, worker and client, each started anew for each round
    and alone on this machine but for what else you run. The engine is the emulated one with no model time, and
    each request ends after one token, so that what remains is the queue. A rush is all requests at once: it ends
    when the client holds every result. CPU time is that of all processes, Redis and client included. Latencies
    are taken one request at a time, and at half of the rate of the rush.

    With --peers other task queues do the same in the same rounds: a job that returns at once, its result stored
    and read, on a redis-server with the same settings (fast), in an environment that this command makes and
    keeps (node and npm for bullmq). docs/performance.md says how each is set up.
    """
    from l4queue.cli.bench.queue.plots import plot_queues
    from l4queue.cli.bench.queue.report import machine, quantiles, ratios, summaries
    from l4queue.sim.plots import require_matplotlib

    if plot is not None:
        require_matplotlib()
    study = _study(locals())
    done, ceilings, fsyncs_ms = asyncio.run(_run(study, quiet=json_file == "-"))
    setting = {
        "requests": requests,
        "rounds": rounds,
        "input": as_input,
        "clients": clients,
        "workers": workers,
        "latencies": latencies,
    }
    found = {
        "setting": setting,
        "machine": {**machine(), "fsync_ms": quantiles(fsyncs_ms)},
        "ceilings": [one.to_dict() for one in ceilings],
        "queues": summaries(done),
        "ratios": ratios(done, ours=study.names[0]),
    }
    files = plot_queues(plot, found) if plot is not None else []
    if json_file == "-":
        print(json.dumps(found))
        return
    if json_file is not None:
        files.append(Path(json_file))
        files[-1].write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    _show(found)
    for file in files:
        print(f"wrote {file}")


def _study(given: dict[str, Any]) -> QueueStudy:
    """Checked options; ConfigError names a wrong one."""
    from l4queue.cli.bench.queue.environments import require_tools
    from l4queue.cli.bench.queue.measure import QueueLoad
    from l4queue.cli.bench.queue.peers import PEERS
    from l4queue.cli.bench.queue.study import QueueStudy

    sizes = [_size(text) for text in _words(given["prompt_bytes"])]
    durabilities = _chosen(given["durability"], ("fast", "strict"), option="--durability")
    (how,) = _chosen(given["as_input"], ("text", "ids"), option="--input")[:1]
    named = ",".join(PEERS) if given["peers"] == "all" else given["peers"]
    chosen = [PEERS[name] for name in _chosen(named, tuple(PEERS), option="--peers")] if named else []
    require_tools(chosen)
    return QueueStudy(
        loads=[
            QueueLoad(
                num_requests=given["requests"], prompt_bytes=size, input=how, num_latencies=given["latencies"]
            )
            for size in sizes
        ],
        rounds=given["rounds"],
        durabilities=durabilities,  # type: ignore[arg-type]
        num_clients=given["clients"],
        num_workers=given["workers"],
        data_dir=given["data_dir"],
        peers=chosen,
    )


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _chosen(text: str, known: tuple[str, ...], *, option: str) -> list[str]:
    from l4queue.errors import ConfigError

    words = _words(text)
    unknown = [word for word in words if word not in known]
    if unknown or not words:
        raise ConfigError(
            f"{option}: {', '.join(unknown) or 'nothing'} is unknown; choose from {', '.join(known)}"
        )
    return words


def _size(text: str) -> int:
    from l4queue.errors import ConfigError

    if not text.isdecimal() or not 16 <= int(text) <= 400_000:
        raise ConfigError(f"--prompt-bytes: {text!r} is no number from 16 to 400,000")
    return int(text)


async def _run(study: QueueStudy, *, quiet: bool) -> tuple[list[QueueRound], list[Ceiling], list[float]]:
    from l4queue.cli.bench.queue.study import StudyWatcher
    from l4queue.cli.stack.ending import ending_well

    with progress_bars(quiet, width=28) as progress:
        bar = progress.add_task("start", total=study.num_steps)

        def on_round(one: QueueRound) -> None:
            progress.advance(bar)
            text = f"{one.entrant}, {one.prompt_bytes:,} B, round {one.round + 1}: {one.requests_per_s:,.0f} "
            text += f"requests/s, {one.cpu_s_per_1000['total']:.3f} CPU s per 1,000"
            say(text)

        def say(text: str) -> None:
            progress.console.print(text, highlight=False)

        watcher = StudyWatcher(
            on_phase=lambda name, phase: progress.update(bar, description=f"{name}: {phase}"),
            on_round=on_round,
            on_note=say,
        )
        note = "stopping; once more to stop at once"
        async with ending_well(note=lambda: say(note), kill=watcher.kill) as ending:
            return await study.run(watcher)
    raise typer.Exit(ending.exit_code)


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console

    from l4queue.cli.bench.queue.tables import (
        latency_table,
        packing_lines,
        rate_table,
        ratio_lines,
        redis_table,
        remark_lines,
    )

    console = Console()
    for size in dict.fromkeys(one["prompt_bytes"] for one in found["queues"]):
        queues = [one for one in found["queues"] if one["prompt_bytes"] == size]
        console.rule(f"prompts of {size:,} bytes", align="left")
        console.print(rate_table(queues))
        console.print(redis_table(queues))
        for line in packing_lines(queues):
            console.print(line, highlight=False)
        if any(one["alone_ms"] for one in queues):
            console.print(latency_table(queues))
    for one in found["ceilings"]:
        text = f"Redis alone, a stream and nothing else, {one['prompt_bytes']:,} B: {one['requests_per_s']:,.0f} "
        text += f"requests/s by one client, {one['redis_cpu_s_per_1000']:.3f} CPU s of Redis per 1,000"
        console.print(text, highlight=False)
    for line in (*ratio_lines(found["ratios"]), *remark_lines(found["queues"])):
        console.print(line, highlight=False)
    facts = found["machine"]
    where = f"{facts['cores']} cores of {facts['cpu']}, {facts['memory_bytes'] / 2**30:.0f} GiB, "
    where += f"{facts['versions']['redis-server']}, Python {facts['versions']['python']}; "
    where += f"an fsync takes {facts['fsync_ms']['p50']:.2f} ms (p99 {facts['fsync_ms']['p99']:.2f})"
    console.print(where, highlight=False)
