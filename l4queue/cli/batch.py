"""`l4queue enqueue --jsonl`: a batch with its progress bar, its summary and its exit code."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from l4queue.cli.outcome import ExitCode

if TYPE_CHECKING:
    from types import FrameType

    from l4queue.client import BatchProgress, BatchSummary

__all__ = ("refuse_mixture", "run_file")

_FOR_ONE_REQUEST = (
    "prompt", "temperature", "top_p", "stop", "seed", "logprobs", "deadline_s", "idempotency_key", "chat", "file",
    "wait", "stream", "timeout",
)  # fmt: skip
_LOG_EVERY_S = 10.0  # where no terminal shows a bar


def refuse_mixture(context: typer.Context) -> None:
    """Wrong usage when options of a single request are given together with a batch."""
    for name in _FOR_ONE_REQUEST:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"{name} is for one request; in a batch each line has its own parameters")


def run_file(jsonl: Path | None, out: Path | None, errors: Path | None, *, as_json: bool, **options: Any) -> int:
    """Run a batch file, or go on with it; returns the exit code of the command."""
    from l4queue.client import Client

    if jsonl is None or out is None:
        raise typer.BadParameter("a batch needs both --jsonl and --out")
    with Client() as client, _stopping() as stop, _shown(quiet=as_json) as show:
        summary = client.run_batch(jsonl, out, path_errors=errors, progress=show, stop=stop, **options)
    if as_json:
        print(json.dumps(asdict(summary)))
    else:
        _print(summary, was_cancelled=bool(options.get("cancel_on_exit")))
    if not summary.is_complete:
        return ExitCode.INTERRUPTED
    return ExitCode.WITH_ERRORS if summary.num_failed else ExitCode.DONE


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set. A second one ends the process as it would without us."""
    stop = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def on_signal(number: int, frame: FrameType | None) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        stop.set()

    for number in numbers:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _shown(*, quiet: bool) -> Iterator[Callable[[BatchProgress], None]]:
    """Progress on standard error: a bar on a terminal, else a line now and then."""
    if quiet:
        yield lambda _: None
    elif sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield _Lines().show


@contextmanager
def _bar() -> Iterator[Callable[[BatchProgress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[more]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        checking = bars.add_task("checking", total=None, more="")
        running: Any = None

        def show(progress: BatchProgress) -> None:
            nonlocal running
            if progress.phase == "checking":
                bars.update(checking, completed=progress.num_finished)
                return
            if running is None:
                bars.remove_task(checking)
                running = bars.add_task("batch", completed=progress.num_finished, total=0, more="")
            more = (_pace(progress) + _more(progress)).strip()
            bars.update(running, completed=progress.num_finished, total=progress.num_lines, more=more)

        yield show


class _Lines:
    """Progress for a log file: a line every ten seconds."""

    def __init__(self) -> None:
        self._said_s = 0.0

    def show(self, progress: BatchProgress) -> None:
        """Say where it is, if it is time for that."""
        now_s = time.monotonic()
        if progress.phase == "checking" or now_s - self._said_s < _LOG_EVERY_S:
            return
        self._said_s = now_s
        counted = f"{progress.num_finished:,} of {progress.num_lines:,} lines"
        print(f"{counted}{_pace(progress)}{_more(progress)}", file=sys.stderr, flush=True)


def _pace(progress: BatchProgress) -> str:
    """Requests a second and time left; nothing while nothing moves."""
    if progress.left_s is None:
        return ""
    rate = progress.lines_per_s
    return f" {rate:,.{0 if rate >= 10 else 2}f} requests/s, {_span(progress.left_s)} left"


def _span(duration_s: float) -> str:
    """A duration by its two largest units."""
    seconds = round(duration_s)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600:,} h {seconds % 3600 // 60} min"


def _more(progress: BatchProgress) -> str:
    failed = f" {progress.num_failed:,} failed" if progress.num_failed else ""
    notice = f" ({progress.notice})" if progress.notice else ""
    return f"{failed} {progress.num_in_flight:,} in flight{notice}"


def _print(summary: BatchSummary, *, was_cancelled: bool) -> None:
    say = typer.echo
    say(
        f"{summary.num_succeeded:,} succeeded, {summary.num_failed:,} failed, of {summary.num_lines:,} lines; "
        f"this run: {summary.lines_per_s:,.1f} lines/s, {summary.prompt_tokens:,} tokens in, "
        f"{summary.output_tokens:,} out, {summary.wall_s:,.1f} s"
    )
    if summary.e2e_p50_s is not None and summary.e2e_p99_s is not None:
        first = "none"
        if summary.ttft_p50_s is not None and summary.ttft_p99_s is not None:
            first = f"{summary.ttft_p50_s:,.2f} s / {summary.ttft_p99_s:,.2f} s"
        whole = f"{summary.e2e_p50_s:,.2f} s / {summary.e2e_p99_s:,.2f} s"
        say(f"latency from acceptance on, p50 / p99: first token {first}, whole {whole}")
    if summary.num_earlier:
        say(f"{summary.num_earlier:,} answered before")
    if summary.num_found:
        say(f"{summary.num_found:,} were in flight from an earlier run and were collected")
    if summary.num_recomputed:
        say(
            f"{summary.num_recomputed:,} had been enqueued before, but their results are no longer known "
            "(expired or lost): they were enqueued again"
        )
    if summary.num_failed:
        say(f"errors: {summary.path_errors}")
    if not summary.is_complete:
        left = "was cancelled" if was_cancelled else f"goes on: {summary.num_in_flight:,} requests"
        say(f"stopped; what was in flight {left}. The same command continues.")
