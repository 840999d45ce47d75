"""`l4queue explain`: every decision about one request, in order."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from l4queue.cli.outcome import about
from l4queue.cli.requests import Id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from l4queue.observe.explain import Event

__all__ = ("register",)

_WAITING = ("submitted", "queued")


def explain(
    request_id: Id,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Tell the events of a request, in order.

    How it was counted and routed, which workers took it, steals, hand-overs, its end. Times are seconds since
    it was accepted.
    """
    from l4queue.client import Client

    with Client() as client, about(request_id):
        handle = client.get(request_id)
        events = handle.explain()
        is_stuck = handle.status().state in _WAITING and not client.overview().workers
    if as_json:
        print(json.dumps([asdict(event) for event in events]))
        return
    for line in lines(events):
        print(line)
    if is_stuck:
        print("            no worker serves: see `l4queue stats`")


def lines(events: Sequence[Event]) -> list[str]:
    """One line an event, with the time since the first."""
    start_ms = events[0].at_ms
    return [f"{(event.at_ms - start_ms) / 1000:9.3f} s  {event.text}" for event in events]


def register(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command()(explain)
