"""`l4queue up`: a whole deployment in one foreground process, until Ctrl-C."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from l4queue.cli.stack.stack import Stack, StackOptions

__all__ = ("register",)


def up(
    *,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="How many workers; by default one for each GPU, or 2.", show_default=False),
    ] = None,
    dispatchers: Annotated[int, typer.Option(min=1, help="How many dispatchers.")] = 1,
    engine: Annotated[
        str | None, typer.Option(help="vllm or emulated; default L4_ENGINE, else vllm.", show_default=False)
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
            help="Use this Redis; default L4_REDIS_URL, which other users cannot read, else start one here.",
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
    data_dir: Annotated[Path, typer.Option(help="Where the Redis started here keeps its data.")] = Path(
        ".l4queue"
    ),
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
            help="Write URLs and process ids there once all is ready; only you can read it.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run Redis, dispatchers, planner, workers, Flower and the HTTP gateway in the foreground.

    Ctrl-C or SIGTERM drains the workers and stops everything in order (exit code 0); a second one does not wait
    for the drain. A process that dies is started again, after a pause that grows.
    """
    import asyncio

    from l4queue.cli.stack.stack import StackOptions

    options = StackOptions(
        workers=workers,
        dispatchers=dispatchers,
        engine=engine,
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
    )
    asyncio.run(_serve(options, ready_file=ready_file))


async def _serve(options: StackOptions, *, ready_file: Path | None) -> None:
    import asyncio
    import signal

    from l4queue.cli.stack.logs import ConsoleLog
    from l4queue.cli.stack.stack import Stack
    from l4queue.config import load_settings

    loop = asyncio.get_running_loop()
    serving = asyncio.current_task()
    assert serving is not None
    num_signals = 0

    def on_broken() -> None:
        loop.call_soon_threadsafe(serving.cancel)

    def on_signal() -> None:
        nonlocal num_signals
        num_signals += 1
        if num_signals == 1:
            stack.note("stopping: workers drain first; once more to stop at once")
            serving.cancel()
        else:
            stack.kill()

    log_format = load_settings(**options.overrides()).log_format
    stack = Stack(options, log=ConsoleLog(on_broken=on_broken, as_json=log_format == "json"))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)
    try:
        async with stack:
            await stack.ready()
            _announce(stack, ready_file)
            await stack.supervisor.failed()
    except asyncio.CancelledError:
        serving.uncancel()  # it was a signal, or the reader of our output has gone: an orderly end


def _announce(stack: Stack, ready_file: Path | None) -> None:
    from l4queue.cli.stack.embedded import write_private

    facts = {
        "redis_url": stack.redis_url,
        "flower_url": stack.flower_url,
        "openai_url": stack.openai_url,
        "metrics_urls": stack.metrics_urls,
        "model": stack.settings.model,
        "pids": {name: child.pid for name, child in stack.supervisor.children.items()},
    }
    if ready_file is not None:
        write_private(ready_file, json.dumps(facts) + "\n")
    late = " (does not answer yet)" if "flower" in stack.not_ready else ""
    flower = f", Flower at {stack.flower.text}{late}" if stack.flower is not None else ""
    stack.note(f"ready: Redis at {stack.redis_url}{flower}")
    if stack.gateway is not None:
        late = " (does not answer yet)" if "gateway" in stack.not_ready else ""
        stack.note(f"OpenAI's API at {stack.gateway.url}{late}; try: {stack.gateway.curl}")
    for name in stack.not_ready:
        lines = stack.supervisor.children[name].last_lines
        why = f": {lines[-1]}" if lines else ""
        stack.note(f"{name} is not ready, and all else serves{why}")
    if stack.metrics_urls:
        stack.note(f"metrics at {stack.metrics_urls['exporter']}, of all processes: {stack.targets_file}")
    _tell_clients(stack)


def _tell_clients(stack: Stack) -> None:
    """How other terminals find this Redis. No password is printed: terminals are recorded and shared."""
    from l4queue.config import URL_FILE
    from l4queue.redis_url import parse_url

    file = stack.url_file
    if file is not None:
        who = "clients in other directories" if file == URL_FILE.absolute() else "clients"
        stack.note(f"for {who}: export L4_REDIS_URL=$(cat {shlex.quote(str(file))})")
    elif parse_url(stack.redis_url).password is not None:
        stack.note("for clients: L4_REDIS_URL as it is set here")
    elif stack.redis_url != "redis://127.0.0.1:6379/0":
        stack.note(f"for clients: export L4_REDIS_URL={shlex.quote(stack.redis_url.reveal())}")


def register(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command()(up)
