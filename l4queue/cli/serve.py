"""`l4queue serve`: the HTTP gateway, vLLM's OpenAI server over the queue."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ("register",)


def serve(
    options: Annotated[
        list[str] | None,
        typer.Argument(
            help="After --: options of `vllm serve` about the server, such as --tool-call-parser hermes.",
            show_default=False,
        ),
    ] = None,
    *,
    model: Annotated[
        str | None,
        typer.Option(help="As the workers have it: path, name or `tiny`; default L4_MODEL.", show_default=False),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address; another than loopback needs a key; default L4_HTTP_HOST.", show_default=False),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port; default L4_HTTP_PORT, else 8000.", show_default=False),
    ] = None,
    redis_url: Annotated[
        str | None,
        typer.Option(
            help="The queue's Redis; default L4_REDIS_URL, else that of `l4queue up` in this directory.",
            show_default=False,
        ),
    ] = None,
    keys_file: Annotated[
        str | None,
        typer.Option(
            help="API keys, a name and a key a line; default L4_HTTP_KEYS_FILE. Without keys: loopback only.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve OpenAI's HTTP API from the queue, until Ctrl-C.

    Any number of these may run. They run no engine: workers do, of `l4queue up` or elsewhere. Clients set base_url
    to http://HOST:PORT/v1.
    """
    import os
    import sys

    from l4queue.config import load_settings

    given = {
        "model": model,
        "http_host": host,
        "http_port": port,
        "redis_url": redis_url,
        "http_keys_file": keys_file,
    }
    chosen = {name: str(value) for name, value in given.items() if value is not None}
    settings = load_settings(**chosen)  # what is wrong is said here
    environment = {f"L4_{name.upper()}": value for name, value in chosen.items()}
    if "redis_url" not in settings.model_fields_set:
        environment["L4_REDIS_URL"] = settings.redis_url.reveal()
    os.execve(sys.executable, [sys.executable, "-m", "gateway", *(options or ())], {**os.environ, **environment})


def register(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command()(serve)
