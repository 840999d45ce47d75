"""The command `l4queue`: its application, how errors end it, and which module brings which commands."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, TextIO

import typer

UsageError: Any = typer.BadParameter.__mro__[1]  # typer has it in a private module, as its base
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
    "trace",
    "bench.command",
    "doctor",
    "health",
)
"""Modules of this package with a `register(app)`; what they need beyond typer is imported inside commands."""


def build_app() -> typer.Typer:
    """The application with every command."""
    app = typer.Typer(
        name="l4queue",
        help="Length-aware serving of large language models as a Redis and Celery worker pipeline.",
        no_args_is_help=True,
        epilog="First steps: `l4queue up` in one terminal, `l4queue enqueue 'Hello' --wait` in another. "
        "Exit codes and JSON: docs/cli.md.",
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
    """Run one command; returns its exit code, of `l4queue.cli.outcome`.

    Errors of l4queue are one line on standard error, or with `--json` one object on standard output; anything else
    is a defect and keeps its traceback.
    """
    from l4queue.cli.outcome import ExitCode, exit_code, show_error
    from l4queue.errors import L4QueueError

    given = sys.argv[1:] if arguments is None else list(arguments)
    as_json = "--json" in given
    warnings.showwarning = _show_warning
    try:
        code = build_app()(args=given, prog_name="l4queue", standalone_mode=False)
        return code if isinstance(code, int) else ExitCode.DONE
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    except L4QueueError as error:
        show_error(error, as_json=as_json, known=given)
        return exit_code(error)
    except (KeyboardInterrupt, typer.Abort):
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe has gone; without this the interpreter would complain while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.ERROR
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        full = f"the disk is full: {error.filename or 'a file'} cannot be written"
        show_error(error, as_json=as_json, kind="DiskFull", message=full)
        return ExitCode.ERROR
    except UsageError as error:
        if as_json:
            show_error(error, as_json=True, kind="UsageError", message=error.format_message())
        else:
            error.show()
        return ExitCode.USAGE


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line for people, who have no use for the place in the code."""
    print(f"warning: {message}", file=file or sys.stderr)
