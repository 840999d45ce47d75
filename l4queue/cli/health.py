"""`l4queue health`: whether the process of this container, or of this host, is doing its work."""

from __future__ import annotations

import json
import socket
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from l4queue.cli.outcome import ExitCode, show_error

if TYPE_CHECKING:
    from l4queue.config import Settings
    from l4queue.protocol.executor import Executor

__all__ = ("Role", "register", "sign_of_life")

_PLANNER_ROUNDS = 6  # rounds that may be missed, by restarts or long searches
_PLANNER_SILENT_S = 30.0  # at least, where rounds follow fast
_REDIS_TRY_S = 2.0  # within the time that Compose gives a health check
_HTTP_TRY_S = 5.0  # within the time that Compose gives a health check


class Role(StrEnum):
    """Which process is asked after."""

    WORKER = "worker"
    DISPATCHER = "dispatcher"
    PLANNER = "planner"
    BEAT = "beat"
    FLOWER = "flower"
    EXPORTER = "exporter"
    GATEWAY = "gateway"


def health(
    role: Annotated[Role, typer.Argument(help="Which process to ask after.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Tell whether a process of this host works.

    Exit code 0 if it does, 1 if not: for health checks of containers. A worker is judged by its lease, which
    it keeps only while its engine makes progress; a dispatcher by its last round of routing; planner and beat
    by the age of the last round of planning; Flower, the exporter and the gateway by their answer.
    """
    from l4queue.config import load_settings
    from l4queue.errors import ServiceUnavailable

    try:
        told = sign_of_life(role, load_settings())
    except ServiceUnavailable as error:
        show_error(error, as_json=as_json)
        raise typer.Exit(ExitCode.ERROR) from None  # the only code beside 0 that Docker knows
    print(json.dumps({"role": role, "sign_of_life": told}) if as_json else told)


def sign_of_life(role: Role, settings: Settings) -> str:
    """Proof that it works, in words; ServiceUnavailable with the reason where it does not."""
    from l4queue.errors import ServiceUnavailable
    from l4queue.observe.health import clock_ahead_s, clock_note
    from l4queue.protocol.executor import Executor

    if role is Role.FLOWER:
        return _flower(settings)
    if role is Role.EXPORTER:
        return _answers("the exporter", f"http://127.0.0.1:{settings.metrics_port}/metrics")
    if role is Role.GATEWAY:
        return _gateway(settings)
    executor = Executor(settings.redis_url, retry_s=_REDIS_TRY_S)
    try:
        note = clock_note(clock_ahead_s(executor))
        more = "" if note is None else f"; {note}"
        look = {Role.WORKER: _worker, Role.DISPATCHER: _dispatcher}.get(role, _planner)
        try:
            return look(executor, settings) + more
        except ServiceUnavailable as error:
            raise ServiceUnavailable(f"{error}{more}") from error
    finally:
        executor.close()


def _worker(executor: Executor, settings: Settings) -> str:
    from l4queue.errors import ServiceUnavailable
    from l4queue.observe.health import worker_life

    life = worker_life(executor, settings.namespace, settings.worker_name)
    if life is None:
        raise ServiceUnavailable(
            f"worker {settings.worker_name} has no lease: it loads, waits for a device, or its engine stands; "
            "see its log. L4_WORKER_ID names another worker"
        )
    return f"worker {settings.worker_name} serves stage {life.stage}, lease for {life.left_s:.1f} s more"


def _dispatcher(executor: Executor, settings: Settings) -> str:
    from l4queue.errors import ServiceUnavailable
    from l4queue.observe.health import DISPATCHER_SILENT_S, dispatcher_heard_s

    host = socket.gethostname()
    heard_s = dispatcher_heard_s(executor, settings.namespace, host)
    if heard_s is None:
        raise ServiceUnavailable(
            f"no dispatcher of {host} finished a round in the last {DISPATCHER_SILENT_S:.0f} s; see its log"
        )
    return f"a dispatcher of {host} finished a round {heard_s:.1f} s ago"


def _planner(executor: Executor, settings: Settings) -> str:
    from l4queue.errors import ServiceUnavailable
    from l4queue.observe.health import planner_idle_s

    limit_s = max(_PLANNER_SILENT_S, _PLANNER_ROUNDS * settings.replan_interval_s)
    idle_s = planner_idle_s(executor, settings.namespace)
    if idle_s is None or idle_s > limit_s:
        since = (
            "no round of planning yet"
            if idle_s is None
            else f"the last round of planning ended {idle_s:.0f} s ago"
        )
        raise ServiceUnavailable(f"{since}; see the logs of beat and planner")
    return f"the last round of planning ended {idle_s:.1f} s ago"


def _flower(settings: Settings) -> str:
    from http.client import HTTPException

    from l4queue.cli.stack.flower_place import flower_answers, flower_place
    from l4queue.errors import ServiceUnavailable

    place = flower_place(settings)
    where = f"{place.text}/healthcheck"
    try:
        flower_answers(place)
    except (OSError, HTTPException) as error:
        raise ServiceUnavailable(f"Flower does not answer at {where}: {error}; see its log") from error
    return f"Flower answers at {where}"


def _gateway(settings: Settings) -> str:
    """It works also where no worker serves: that is told to its clients."""
    import asyncio

    from l4queue.cli.stack.http_place import HttpPlace
    from l4queue.errors import ServiceUnavailable

    place = HttpPlace(host=settings.http_host, port=settings.http_port, model=settings.model)
    if not asyncio.run(place.answers()):
        raise ServiceUnavailable(f"the gateway does not answer at {place.url}; see its log")
    return f"the gateway answers at {place.url}"


def _answers(name: str, url: str) -> str:
    from http.client import HTTPException
    from urllib.request import urlopen

    from l4queue.errors import ServiceUnavailable

    try:
        with urlopen(url, timeout=_HTTP_TRY_S):
            return f"{name} answers at {url}"
    except (OSError, HTTPException) as error:
        raise ServiceUnavailable(f"{name} does not answer at {url}: {error}; see its log") from error


def register(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command()(health)
