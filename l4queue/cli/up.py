"""`l4queue up`: a whole deployment in one foreground process, until Ctrl-C."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from l4queue.cli.stack.stack import Stack, StackOptions

__all__ = ("register",)


def up(
    *,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many workers; by default one for each GPU or engine URL, or 2.", show_default=False
        ),
    ] = None,
    dispatchers: Annotated[
        int, typer.Option(min=0, help="How many dispatchers; 0 where the gateway is one (L4_HTTP_DISPATCHER).")
    ] = 1,
    engine: Annotated[
        str | None, typer.Option(help="vllm, http or emulated; default L4_ENGINE, else vllm.", show_default=False)
    ] = None,
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
    redis_url: Annotated[
        str | None,
        typer.Option(
            help="Use this Redis; default L4_REDIS_URL, in which others do not see a password, else start one.",
            show_default=False,
        ),
    ] = None,
    redis_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Port of the Redis started here; default 6379 if free.", show_default=False
        ),
    ] = None,
    durability: Annotated[
        str | None,
        typer.Option(help="strict (fsync before every reply) or fast; default strict.", show_default=False),
    ] = None,
    data_dir: Annotated[
        Path, typer.Option(help="Directory of logs, and of the data of the Redis started here.")
    ] = Path(".l4queue"),
    flower_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Port of Flower; default 5555, or any if that is taken.", show_default=False
        ),
    ] = None,
    flower: Annotated[bool, typer.Option(help="Run Flower.")] = True,
    http_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Port of the HTTP gateway; default 8000, or any if taken.", show_default=False
        ),
    ] = None,
    http: Annotated[bool, typer.Option(help="Run the HTTP gateway, OpenAI's API (with the vLLM engine).")] = True,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="First port of metrics, one for each process from there; 0: none; default L4_METRICS_PORT.",
            show_default=False,
        ),
    ] = None,
    log_format: Annotated[
        str | None,
        typer.Option(
            help="text, or json for one object a line; default L4_LOG_FORMAT, else text.", show_default=False
        ),
    ] = None,
    ready_file: Annotated[
        Path | None,
        typer.Option(
            help="JSON of URLs and process ids, there while all is ready; only you can read it.",
            show_default=False,
        ),
    ] = None,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Show every line of all processes; else decisions and trouble."),
    ] = False,
) -> None:
    """Run a whole deployment until Ctrl-C.

    It is Redis, dispatchers, planner, workers, Flower and the HTTP gateway, in the foreground. Ctrl-C or SIGTERM
    drains the workers and stops everything in order (exit code 0); a second one does not wait for the drain. A
    process that dies is started again, after a pause that grows. All lines of all processes go to files under
    the data directory; `l4queue status` repeats what is said when all is ready.
    """
    import asyncio

    from l4queue.cli.stack.ready import state_place
    from l4queue.cli.stack.stack import StackOptions

    options = StackOptions(
        workers=workers,
        dispatchers=dispatchers,
        engine=engine,
        engine_url=" ".join(engine_url) if engine_url else None,
        model=model,
        redis_url=redis_url,
        redis_port=redis_port,
        durability=durability,
        data_dir=data_dir,
        flower_port=flower_port,
        flower=flower,
        http_port=http_port,
        http=http,
        metrics_port=metrics_port,
        log_format=log_format,
        verbose=verbose,
    )
    with state_place(data_dir.absolute()) as place, _kept(ready_file) as tell:
        asyncio.run(_serve(options, place, tell))


@contextmanager
def _kept(ready_file: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes the ready file; the file is there from then on until the end, and not before."""
    from l4queue.cli.stack.embedded import write_private

    if ready_file is None:
        yield lambda _: None
        return
    ready_file.unlink(missing_ok=True)
    try:
        yield lambda facts: write_private(ready_file, json.dumps(facts) + "\n")
    finally:
        ready_file.unlink(missing_ok=True)


async def _serve(options: StackOptions, place: Path, tell: Callable[[dict[str, Any]], None]) -> None:
    import asyncio

    from l4queue.cli.stack.decisions import DecisionLog
    from l4queue.cli.stack.ending import ending_well
    from l4queue.cli.stack.logs import ConsoleLog, FileLog
    from l4queue.cli.stack.overrides import settings_with
    from l4queue.cli.stack.stack import Stack

    loop, serving = asyncio.get_running_loop(), asyncio.current_task()
    assert serving is not None
    is_read = True

    def on_broken() -> None:
        nonlocal is_read
        is_read = False
        loop.call_soon_threadsafe(serving.cancel)

    console = ConsoleLog(on_broken=on_broken, as_json=settings_with(options.overrides()).log_format == "json")
    log = DecisionLog(console, FileLog(place / "logs"), verbose=options.verbose)
    stack = Stack(options, log=log, state_dir=place)
    try:
        async with ending_well(note=stack.note_end, kill=stack.kill), stack:
            await stack.ready()
            _announce(stack, place, tell)
            await stack.supervisor.failed()
    except asyncio.CancelledError:
        if is_read:
            raise
        serving.uncancel()  # the reader of our output has gone: an orderly end


def _announce(stack: Stack, place: Path, tell: Callable[[dict[str, Any]], None]) -> None:
    from l4queue.cli.stack.ready import client_export, ready_lines, write_facts

    facts = {
        "redis_url": stack.redis_url.reveal(),
        "flower_url": stack.flower_url,
        "openai_url": stack.openai_url,
        "curl": stack.gateway.curl if stack.gateway is not None else None,
        "metrics_urls": stack.metrics_urls,
        "model": stack.settings.model,
        "pid": os.getpid(),
        "pids": {name: child.pid for name, child in stack.supervisor.children.items()},
        "data_dir": str(stack.data_dir),
        "logs": str(place / "logs"),
        "targets_file": str(stack.targets_file),
        "export": client_export(stack.redis_url, stack.url_file),
    }
    try:
        write_facts(place, facts)
        tell(facts)
    except OSError as error:
        stack.note(f"these facts cannot be kept in a file: {error.strerror}")
    for line in ready_lines(facts):
        stack.note(line)
    for name in stack.not_ready:
        lines = stack.supervisor.children[name].last_lines
        why = f": {lines[-1]}" if lines else ""
        stack.note(f"{name} is not ready, and all else serves{why}")


def register(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command()(up)
