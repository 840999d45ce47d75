"""`l4queue demo`: a whole deployment for a few minutes, a mixed workload of real text, and its measurements."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l4queue.cli.progress import progress_bars

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from l4queue.cli.demo_prompts import Prompt
    from l4queue.client import AsyncClient, Result
    from l4queue.models import Plan

__all__ = ("ClassReport", "register", "summarise")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Mean and quantiles, by the nearest-rank method."""

    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value; zeros for none."""
        ranked = sorted(values)
        if not ranked:
            return cls(mean=0.0, p50=0.0, p99=0.0)
        last = len(ranked) - 1
        return cls(
            mean=sum(ranked) / len(ranked),
            p50=ranked[min(last, int(0.50 * len(ranked)))],
            p99=ranked[min(last, int(0.99 * len(ranked)))],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassReport:
    """Measurements of one length class; times in seconds by the server's clock."""

    name: str
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    ttft_s: Spread
    tpot_s: Spread
    e2e_s: Spread


def summarise(results: Sequence[Result]) -> list[ClassReport]:
    """One report per length class that occurred, shortest first, and one for all."""
    from l4queue.cli.demo_prompts import LENGTH_CLASSES, length_class

    groups = {c.name: [r for r in results if length_class(r.prompt_tokens) is c] for c in LENGTH_CLASSES}
    groups["all"] = list(results)
    return [
        ClassReport(
            name=name,
            num_requests=len(group),
            prompt_tokens=sum(r.prompt_tokens for r in group),
            output_tokens=sum(r.output_tokens for r in group),
            ttft_s=Spread.of([r.ttft_s for r in group if r.ttft_s is not None]),
            tpot_s=Spread.of([r.tpot_s for r in group if r.tpot_s is not None]),
            e2e_s=Spread.of([r.e2e_s for r in group]),
        )
        for name, group in groups.items()
        if group
    ]


def demo(
    *,
    requests: Annotated[int, typer.Option(min=1, help="How many requests.")] = 100,
    workers: Annotated[int, typer.Option(min=1, help="How many workers.")] = 2,
    engine: Annotated[str, typer.Option(help="vllm or emulated.")] = "vllm",
    model: Annotated[str, typer.Option(help="Model path; tiny builds a small random-weight Llama.")] = "tiny",
    rate: Annotated[float, typer.Option(min=0.0, help="Requests per second; 0 sends all at once.")] = 4.0,
    max_prompt_tokens: Annotated[int, typer.Option(min=64, help="Longest prompt, tokens.")] = 8000,
    seed: Annotated[int, typer.Option(help="Seed of the workload.")] = 0,
    flower_port: Annotated[int | None, typer.Option(help="Port of Flower; default 5555 if free.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where Redis keeps its data.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Start everything, run mixed-length real text through it, print what was measured, stop."""
    import numpy as np

    from l4queue.cli.demo_prompts import measured_chars_per_token, mixed_prompts
    from l4queue.cli.stack.stack import Stack, StackOptions

    options = StackOptions(
        workers=workers, engine=engine, model=model, flower_port=flower_port, data_dir=data_dir, quiet=as_json
    )

    async def run() -> dict[str, Any]:
        async with Stack(options) as stack:
            if stack.flower_url and not as_json:
                print(f"Flower: {stack.flower_url}/workers and {stack.flower_url}/tasks", flush=True)
            ratio = await asyncio.to_thread(
                measured_chars_per_token, stack.settings.tokenizer or stack.settings.model
            )
            prompts = mixed_prompts(
                requests,
                rng=np.random.default_rng(seed),
                max_prompt_tokens=min(max_prompt_tokens, stack.settings.max_model_len - 512),
                chars_per_token=ratio,
            )
            await stack.ready()
            return await _drive(stack, prompts, rate=rate, seed=seed, quiet=as_json)

    outcome = asyncio.run(run())
    if as_json:
        print(json.dumps(outcome))
    if outcome["num_done"] < requests:
        raise typer.Exit(1)


async def _drive(stack: Any, prompts: Sequence[Prompt], *, rate: float, seed: int, quiet: bool) -> dict[str, Any]:
    from l4queue.client import AsyncClient

    async with AsyncClient(stack.redis_url, settings=stack.settings) as client:
        started_s = time.monotonic()
        with progress_bars(quiet, width=6) as progress:
            results = await _replay(client, prompts, rate=rate, seed=seed, progress=progress)
        wall_s = time.monotonic() - started_s
        overview = await client.overview()
    reports = summarise(results)
    if not quiet:
        _print(reports, overview.plan, wall_s=wall_s, flower_url=stack.flower_url)
    return {
        "num_requests": len(prompts),
        "num_done": len(results),
        "wall_s": wall_s,
        "classes": [asdict(report) for report in reports],
        "plan": asdict(overview.plan),
        "flower_url": stack.flower_url,
        "seed": seed,
    }


async def _replay(
    client: AsyncClient, prompts: Sequence[Prompt], *, rate: float, seed: int, progress: Progress
) -> list[Result]:
    """Send with Poisson gaps and gather results; failures are shown and left out."""
    import numpy as np

    from l4queue.cli.demo_prompts import LENGTH_CLASSES, length_class

    rng = np.random.default_rng([seed, 1])
    planned = Counter(length_class(prompt.target_tokens).name for prompt in prompts)
    bars = {c.name: progress.add_task(c.name, total=planned[c.name]) for c in LENGTH_CLASSES if planned[c.name]}
    watcher = asyncio.create_task(_show_plans(client, progress))
    tasks = []
    for prompt in prompts:
        follow = _follow(client, prompt, progress, bars[length_class(prompt.target_tokens).name])
        tasks.append(asyncio.create_task(follow))
        if rate > 0:
            await asyncio.sleep(float(rng.exponential(1.0 / rate)))
    results = await asyncio.gather(*tasks)
    watcher.cancel()
    return [result for result in results if result is not None]


async def _follow(client: AsyncClient, prompt: Prompt, progress: Progress, bar: TaskID) -> Result | None:
    from l4queue.errors import L4QueueError

    try:
        handle = await client.enqueue(prompt.text, max_tokens=prompt.max_tokens, temperature=0.0, ignore_eos=True)
        return await handle.result()
    except L4QueueError as error:
        progress.console.print(f"[red]failed:[/] {error}")
        return None
    finally:
        progress.advance(bar)


async def _show_plans(client: AsyncClient, progress: Progress) -> None:
    """Print each new plan once."""
    shown = 0
    while True:
        plan = (await client.overview()).plan
        if plan.version != shown:
            shown = plan.version
            progress.console.print(f"plan {plan.version}: {_ranges(plan)}  ({plan.reason})", highlight=False)
        await asyncio.sleep(1.0)


def _print(reports: Sequence[ClassReport], plan: Plan, *, wall_s: float, flower_url: str | None) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    title = f"{reports[-1].num_requests} requests in {wall_s:.1f} s; times are mean/p50/p99"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    names = ("class", "n", "tokens\nin", "tokens\nout", "first token\ns", "per token\nms", "end to end\ns")
    for name in names:
        table.add_column(name, justify="left" if name == "class" else "right")
    for report in reports:
        table.add_row(
            report.name,
            str(report.num_requests),
            str(report.prompt_tokens),
            str(report.output_tokens),
            _spread(report.ttft_s, scale=1.0, digits=2),
            _spread(report.tpot_s, scale=1000.0, digits=0),
            _spread(report.e2e_s, scale=1.0, digits=2),
        )
    console = Console()
    console.print(table)
    console.print(f"plan reached: version {plan.version}, {_ranges(plan)}  ({plan.reason})", highlight=False)
    if flower_url:
        console.print(f"Flower was at {flower_url}")


def _ranges(plan: Plan) -> str:
    return ", ".join(
        f"[{s.low_tokens}, {'∞' if s.high_tokens is None else s.high_tokens}) × {s.num_workers}"
        for s in plan.stages
    )


def _spread(spread: Spread, *, scale: float, digits: int) -> str:
    return "/".join(f"{value * scale:.{digits}f}" for value in (spread.mean, spread.p50, spread.p99))


def register(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command()(demo)
