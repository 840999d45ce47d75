"""The command `l4queue`: its application, how errors end it, and which module brings which commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

__all__ = ("COMMAND_MODULES", "build_app", "main")

COMMAND_MODULES = (
    "up",
    "demo",
    "serve",
    "requests",
    "explain",
    "stats",
    "plan",
    "simulate",
    "bench.command",
    "doctor",
    "health",
)
"""Modules of this package with a `register(app)`; what they need beyond typer is imported inside commands."""

EXIT_ERROR = 1  # exit code
EXIT_INTERRUPTED = 130  # exit code; 128 + SIGINT, as shells report it


def build_app() -> typer.Typer:
    """The application with every command."""
    app = typer.Typer(
        name="l4queue",
        help="Length-aware serving of large language models as a Redis and Celery worker pipeline.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_common)
    for name in COMMAND_MODULES:
        import_module(f"{__name__}.{name}").register(app)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("l4queue"))
        raise typer.Exit


def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Length-aware serving of large language models as a Redis and Celery worker pipeline."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 1 on an error, 2 on wrong usage, 130 on Ctrl-C.

    Errors of l4queue are one line on standard error; anything else is a defect and keeps its traceback.
    """
    from l4queue.errors import L4QueueError

    try:
        build_app()(args=None if arguments is None else list(arguments), prog_name="l4queue")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    except L4QueueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe has gone; without this the interpreter would complain while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    return 0
