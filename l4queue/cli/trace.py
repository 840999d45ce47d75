"""`l4queue trace export`: one's own traffic as a trace for `simulate` and `plan solve`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from l4queue.observe.traffic import RecordedRequest

__all__ = ("register",)

_PAGE = 1000
"""Requests of one read. Chosen: some 200 kB."""
_LOOK_S = 1.0  # between two reads of --follow; Redis keeps 20,000 requests meanwhile
_SAVE_S = 30.0  # between two writes of the file with --follow


def export(
    out: Annotated[
        Path | None,
        typer.Argument(help="CSV or CSV.gz to write; standard output when left out.", show_default=False),
    ] = None,
    *,
    last_s: Annotated[
        float | None,
        typer.Option("--last", min=0.001, metavar="S", help="Only requests accepted in the last S seconds."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C; then the file is complete.")
    ] = False,
) -> None:
    """Write the requests that have ended as a trace.

    Arrivals and lengths, no text. Where prompts repeat also a column hash_ids: equal numbers for blocks of 128
    tokens with which prompts begin alike. Redis keeps about 20,000 ended requests; --follow records more. Requests
    that have not ended yet are missing, and so are requests that no engine ever ran.
    """
    from l4queue.errors import ConfigError

    if follow and out is None:
        raise ConfigError("--follow needs a file to write, such as: l4queue trace export --follow traffic.csv")
    found, num_left_out = _collect(out, last_s=last_s, follow=follow)
    if not found:
        raise ConfigError("no request has ended that an engine ran: there is nothing to export yet")
    if out is None:
        from l4queue.observe.traffic import trace_text

        sys.stdout.write(trace_text(found))
    else:
        _save(out, found)
    span_s = (max(found).submitted_ms - min(found).submitted_ms) / 1000
    left_out = f"; {num_left_out} that no engine ran are left out" if num_left_out else ""
    print(f"{len(found)} requests, accepted within {span_s:.0f} s{left_out}", file=sys.stderr)
    if out is not None:
        from l4queue.observe.traffic import tells_content
        from l4queue.policy.prefix_blocks import BLOCK_TOKENS

        content = f" --hash-block-tokens {BLOCK_TOKENS}" if tells_content(found) else ""
        print(f"try: l4queue simulate {out} --coefficients live{content}", file=sys.stderr)


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    group = typer.Typer(no_args_is_help=True)
    group.command()(export)
    app.add_typer(group, name="trace")
    group.callback()(_group)


def _group() -> None:
    """One's own traffic as a trace."""


def _collect(out: Path | None, *, last_s: float | None, follow: bool) -> tuple[list[RecordedRequest], int]:
    """The requests, and how many were left out; with `follow` the file is written now and then meanwhile."""
    from l4queue.cli.progress import progress_bars
    from l4queue.config import load_settings
    from l4queue.observe.traffic import recorded
    from l4queue.protocol.executor import Executor
    from l4queue.protocol.keys import Keys
    from l4queue.protocol.reads import Reads

    settings = load_settings()
    executor, reads = Executor(settings.redis_url), Reads(Keys(settings.namespace))
    found: list[RecordedRequest] = []
    num_left_out, last_id, saved_s = 0, "0-0", time.monotonic()
    try:
        first_ms = 0.0 if last_s is None else executor.run(reads.server_time_ms()) - 1000 * last_s
        with progress_bars(not (follow or sys.stderr.isatty()), width=8) as bars:
            task = bars.add_task("requests", total=None)
            while True:
                last_id, page = executor.run(reads.finished_after(last_id, count=_PAGE))
                rows = [recorded(one) for one in page if one.submitted_ms >= first_ms]
                found += [row for row in rows if row is not None]
                num_left_out += sum(row is None for row in rows)
                bars.update(task, completed=len(found))
                if len(page) == _PAGE:
                    continue
                if not follow:
                    break
                if out is not None and found and time.monotonic() - saved_s > _SAVE_S:
                    _save(out, found)
                    saved_s = time.monotonic()
                time.sleep(_LOOK_S)
    except KeyboardInterrupt:
        if not follow:
            raise
    finally:
        executor.close()
    return found, num_left_out


def _save(out: Path, found: list[RecordedRequest]) -> None:
    from l4queue.errors import ConfigError
    from l4queue.observe.traffic import write_trace

    try:
        write_trace(out, found)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror or error}") from None
