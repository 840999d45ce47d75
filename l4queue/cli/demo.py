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
    from l4queue.cli.stack.stack import Stack
    from l4queue.client import AsyncClient, Result
    from l4queue.models import Plan

__all__ = ("ClassReport", "examples", "register", "summarise")

NUM_EXAMPLES = 3  # of each length class; chosen: all fit on a page
_MIN_OUTPUT_TOKENS, _MAX_OUTPUT_TOKENS = 32, 160
"""Bounds of max_tokens. Chosen: answers end before them more often than not."""
_PROMPT_CHARS, _ANSWER_CHARS = 100, 240
"""Of a prompt and an answer, so much is shown."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is sent, and how; chats need a model with a chat template."""

    prompts: Sequence[Prompt]
    rate: float
    seed: int
    is_chat: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownAnswer:
    """A prompt and the text that came back."""

    length_class: str
    prompt: str
    text: str
    is_cut: bool


def examples(answered: Sequence[tuple[Prompt, Result]], *, per_class: int = NUM_EXAMPLES) -> list[ShownAnswer]:
    """The first of each length class with different prompts, shortest class first."""
    from l4queue.cli.demo_prompts import LENGTH_CLASSES, length_class

    found: dict[str, dict[str, ShownAnswer]] = {c.name: {} for c in LENGTH_CLASSES}
    for prompt, result in answered:
        name = length_class(result.prompt_tokens).name
        if len(found[name]) < per_class and (result.text or "").strip():
            answer = ShownAnswer(
                length_class=name, prompt=prompt.text, text=result.text, is_cut=result.finish_reason == "length"
            )
            found[name].setdefault(prompt.text, answer)
    return [answer for answers in found.values() for answer in answers.values()]


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
    workers: Annotated[
        int | None, typer.Option(min=1, help="How many workers; default one for each engine URL, else 2.")
    ] = None,
    engine: Annotated[str, typer.Option(help="vllm, http or emulated.")] = "vllm",
    engine_url: Annotated[
        list[str] | None,
        typer.Option(
            help="A vllm serve that runs, with --engine http; again for each worker; default L4_ENGINE_URL.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Path, name, smollm2 or tiny (random weights); default L4_MODEL, else smollm2 if installed.",
            show_default=False,
        ),
    ] = None,
    rate: Annotated[float, typer.Option(min=0.0, help="Requests per second; 0 sends all at once.")] = 4.0,
    max_prompt_tokens: Annotated[int, typer.Option(min=64, help="Longest prompt, tokens.")] = 8000,
    seed: Annotated[int, typer.Option(help="Seed of the workload.")] = 0,
    flower_port: Annotated[int | None, typer.Option(help="Port of Flower; default 5555 if free.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where Redis keeps its data.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Serve a mixed workload and print its measurements.

    Everything is started before and stopped after. Prompts are real text of mixed lengths.
    """
    import numpy as np

    from l4queue.cli.demo_prompts import measured_chars_per_token, mixed_prompts
    from l4queue.cli.stack.ending import ending_well
    from l4queue.cli.stack.stack import DEFAULT_WORKERS, Stack, StackOptions
    from l4queue.model_config import trusts_remote_code
    from l4queue.pretrained import load_tokenizer

    options = StackOptions(
        workers=workers or (None if engine == "http" else DEFAULT_WORKERS),
        engine=engine,
        engine_url=" ".join(engine_url) if engine_url else None,
        model=model,
        flower_port=flower_port,
        http=True,
        data_dir=data_dir,
        quiet=as_json,
    )

    async def run() -> dict[str, Any]:
        stack = Stack(options)
        async with ending_well(note=stack.note_end, kill=stack.kill) as ending, stack:
            if stack.flower_url and not as_json:
                print(f"Flower: {stack.flower_url}/workers and {stack.flower_url}/tasks", flush=True)
            tokenizer = await asyncio.to_thread(
                load_tokenizer,
                stack.settings.tokenizer or stack.settings.model,
                trust_remote_code=trusts_remote_code(stack.settings),
            )
            prompts = mixed_prompts(
                requests,
                rng=np.random.default_rng(seed),
                max_prompt_tokens=min(max_prompt_tokens, stack.settings.max_model_len - 512),
                min_output=_MIN_OUTPUT_TOKENS,
                max_output=_MAX_OUTPUT_TOKENS,
                chars_per_token=await asyncio.to_thread(measured_chars_per_token, tokenizer),
            )
            await stack.ready()
            if stack.gateway is not None and not as_json:
                late = " (does not answer yet)" if "gateway" in stack.not_ready else ""
                print(f"OpenAI's API, while this runs{late}: {stack.gateway.curl}", flush=True)
            load = Load(prompts=prompts, rate=rate, seed=seed, is_chat=bool(tokenizer.chat_template))
            return await _drive(stack, load, quiet=as_json)
        raise typer.Exit(ending.exit_code)

    outcome = asyncio.run(run())
    if as_json:
        print(json.dumps(outcome))
    if outcome["num_done"] < requests:
        raise typer.Exit(1)


async def _drive(stack: Stack, load: Load, *, quiet: bool) -> dict[str, Any]:
    from l4queue.client import AsyncClient

    async with AsyncClient(stack.redis_url, settings=stack.settings) as client:
        started_s = time.monotonic()
        with progress_bars(quiet, width=6) as progress:
            answered = await _replay(client, load, progress=progress)
        wall_s = time.monotonic() - started_s
        overview = await client.overview()
    reports, shown = summarise([result for _, result in answered]), examples(answered)
    if not quiet:
        _print_answers(shown)
        _print(reports, overview.plan, wall_s=wall_s, flower_url=stack.flower_url)
    return {
        "num_requests": len(load.prompts),
        "num_done": len(answered),
        "wall_s": wall_s,
        "classes": [asdict(report) for report in reports],
        "examples": [asdict(answer) for answer in shown],
        "plan": asdict(overview.plan),
        "flower_url": stack.flower_url,
        "openai_url": stack.openai_url,
        "seed": load.seed,
    }


async def _replay(client: AsyncClient, load: Load, *, progress: Progress) -> list[tuple[Prompt, Result]]:
    """Send with Poisson gaps and gather results; failures are shown and left out."""
    import numpy as np

    from l4queue.cli.demo_prompts import LENGTH_CLASSES, length_class

    rng = np.random.default_rng([load.seed, 1])
    planned = Counter(length_class(prompt.target_tokens).name for prompt in load.prompts)
    bars = {c.name: progress.add_task(c.name, total=planned[c.name]) for c in LENGTH_CLASSES if planned[c.name]}
    watcher = asyncio.create_task(_show_plans(client, progress))
    tasks = []
    for prompt in load.prompts:
        bar = bars[length_class(prompt.target_tokens).name]
        tasks.append(asyncio.create_task(_follow(client, prompt, progress, bar, is_chat=load.is_chat)))
        if load.rate > 0:
            await asyncio.sleep(float(rng.exponential(1.0 / load.rate)))
    results = await asyncio.gather(*tasks)
    watcher.cancel()
    pairs = zip(load.prompts, results, strict=True)
    return [(prompt, result) for prompt, result in pairs if result is not None]


async def _follow(
    client: AsyncClient, prompt: Prompt, progress: Progress, bar: TaskID, *, is_chat: bool
) -> Result | None:
    from l4queue.errors import L4QueueError

    given: dict[str, Any] = (
        {"messages": [{"role": "user", "content": prompt.text}]} if is_chat else {"prompt": prompt.text}
    )
    try:
        handle = await client.enqueue(**given, max_tokens=prompt.max_tokens, temperature=0.0)
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


def _print_answers(answers: Sequence[ShownAnswer]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", style="dim")
    table.add_column()
    for answer in answers:
        text = _shortened(answer.text, _ANSWER_CHARS, is_cut=answer.is_cut)
        table.add_row(answer.length_class, Text(_shortened(answer.prompt, _PROMPT_CHARS), style="bold"))
        table.add_row("", Text(text))
    console = Console()
    console.print(table)
    console.print()


def _shortened(text: str, limit_chars: int, *, is_cut: bool = False) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit_chars and not is_cut else f"{line[:limit_chars].rstrip()} …"


def _ranges(plan: Plan) -> str:
    return ", ".join(
        f"[{s.low_tokens}, {'∞' if s.high_tokens is None else s.high_tokens}) × {s.num_workers}"
        for s in plan.stages
    )


def _spread(spread: Spread, *, scale: float, digits: int) -> str:
    values = [value * scale for value in (spread.mean, spread.p50, spread.p99)]
    return "/".join(f"{value:.{digits if value < 10 else min(digits, int(value < 100))}f}" for value in values)


def register(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command()(demo)
