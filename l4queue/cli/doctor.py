"""`l4queue doctor`: missing requirements of this machine, each with its remedy."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from l4queue.cli.check import Check, CheckResult

if TYPE_CHECKING:
    from l4queue.config import Settings
    from l4queue.hardware import EngineBuild

__all__ = ("Check", "CheckResult", "register", "run_checks")

_NAME_CHARS = 13  # of the longest name of a check
_MIN_DISK_BYTES = 2 << 30  # for Redis's log and a rewrite of it beside it
_MIN_ENGINE_BYTES = 3 << 30
"""Memory of one CPU engine with the tiny model and 1 GiB of KV cache, as observed, with a margin."""
_REDIS_TRY_S = 1.0  # a server on the same network answers in milliseconds


def doctor(
    *,
    data_dir: Annotated[Path, typer.Option(help="Data directory that `up` would use.")] = Path(".l4queue"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Check this machine for what is missing.

    Python, Redis, engine, GPUs, model, ports, disk and memory; exit code 1 when something fails.
    """
    checks = run_checks(data_dir)
    found = list(checks if as_json else _printed(checks))
    is_ok = all(check.verdict is not CheckResult.FAIL for check in found)
    if as_json:
        print(json.dumps({"ok": is_ok, "checks": [asdict(check) for check in found]}))
    if not is_ok:
        raise typer.Exit(1)


def run_checks(data_dir: Path) -> Iterator[Check]:
    """All checks for the settings of the environment, in the order of dependence, each as soon as it is known."""
    from l4queue.cli.engine_checks import engine_checks
    from l4queue.cli.stack.own_models import chosen_model
    from l4queue.config import load_settings
    from l4queue.hardware import engine_build, view_gpus

    settings = load_settings()
    settings = settings.model_copy(update={"model": chosen_model(settings)})
    build = engine_build()
    view = view_gpus()
    yield _check_python()
    yield _check_redis_server()
    yield from _check_redis(settings)
    yield from _check_broker(settings)
    yield from engine_checks(settings, build, view)
    yield _check_port("Flower's port", settings.flower_port, "set L4_FLOWER_PORT; `up` takes another by itself")
    yield _check_disk(data_dir)
    yield _check_memory(settings, build)


def _check_python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info < (3, 14):
        return Check(name="Python", verdict=CheckResult.OK, detail=version)
    return Check(
        name="Python",
        verdict=CheckResult.WARN,
        detail=f"{version}; the pinned lists are made for 3.11 to 3.13",
        advice="make PYTHON=/path/to/python3.11 install",
    )


def _check_redis_server() -> Check:
    from l4queue.cli.stack.embedded import find_redis_server
    from l4queue.errors import ConfigError

    try:
        server = find_redis_server()
    except ConfigError as error:
        return Check(
            name="redis-server",
            verdict=CheckResult.WARN,
            detail=str(error),
            advice="needed by `up` and `demo` without a Redis URL",
        )
    return Check(name="redis-server", verdict=CheckResult.OK, detail=f"{server.text} at {server.path}")


def _check_redis(settings: Settings) -> list[Check]:
    from l4queue.cli.server import read_server
    from l4queue.errors import ConfigError, ServiceUnavailable
    from l4queue.observe.health import clock_ahead_s, clock_note
    from l4queue.protocol.executor import Executor
    from l4queue.protocol.keys import Keys
    from l4queue.protocol.reads import Reads

    try:
        executor = Executor(settings.redis_url, retry_s=_REDIS_TRY_S)
    except ConfigError as error:
        return [Check(name="Redis", verdict=CheckResult.FAIL, detail=str(error), advice="correct L4_REDIS_URL")]
    try:
        executor.run(Reads(Keys(settings.namespace)).inbox_length())  # in a cluster: to the node that has our keys
        facts = read_server(executor)
        ahead_s = clock_ahead_s(executor)
    except ServiceUnavailable as error:
        is_set = "redis_url" in settings.model_fields_set
        return [
            Check(
                name="Redis",
                verdict=CheckResult.FAIL if is_set else CheckResult.WARN,
                detail=str(error).removesuffix("; try `l4queue doctor`"),
                advice="correct L4_REDIS_URL or start that Redis"
                if is_set
                else "`l4queue up` starts one by itself",
            )
        ]
    finally:
        executor.close()
    reached = Check(name="Redis", verdict=CheckResult.OK, detail=f"{facts.product} {facts.version_text}")
    if not facts.is_new_enough:
        reached = Check(
            name="Redis",
            verdict=CheckResult.FAIL,
            detail=f"{facts.product} {facts.version_text} is too old",
            advice="l4queue needs Redis 6.2 or newer, or Valkey",
        )
    is_durable = facts.keeps_promise(settings.durability)
    needs = f"{settings.durability} needs {facts.advice(settings.durability)}"
    durability = Check(
        name="durability",
        verdict=CheckResult.OK if is_durable else CheckResult.WARN,
        detail=facts.durability_text,
        advice=None if is_durable else f"{needs}; until then a crash of Redis loses requests",
    )
    note = clock_note(ahead_s)
    clock = Check(
        name="clock",
        verdict=CheckResult.OK if note is None else CheckResult.WARN,
        detail=f"{abs(ahead_s):.1f} s {'ahead of' if ahead_s > 0 else 'behind'} Redis's",
        advice=None if note is None else "synchronise the clocks (NTP): lines of logs and Flower's times are off",
    )
    return [reached, durability, clock]


def _check_broker(settings: Settings) -> list[Check]:
    """A broker that has its own setting; else it is the next database of the same Redis."""
    from l4queue.errors import ConfigError, ServiceUnavailable
    from l4queue.protocol.calls import Call
    from l4queue.protocol.executor import Executor

    advice = "correct L4_CELERY_BROKER_URL"
    try:
        own = settings.celery_broker_url
        if not own or (own == settings.broker_url and not own.startswith(("redis://", "rediss://"))):
            return []
        executor = Executor(own, retry_s=_REDIS_TRY_S)
    except ConfigError as error:
        if not str(error).startswith("L4_CELERY_BROKER_URL"):
            return []  # told of the queue
        return [Check(name="broker", verdict=CheckResult.FAIL, detail=str(error), advice=advice)]
    try:
        executor.run(Call(None, (), ("PING",), lambda reply: reply))
    except ServiceUnavailable as error:
        detail = str(error).removesuffix("; try `l4queue doctor`")
        return [Check(name="broker", verdict=CheckResult.FAIL, detail=detail, advice=advice)]
    finally:
        executor.close()
    return [Check(name="broker", verdict=CheckResult.OK, detail=f"{own}")]


def _check_port(name: str, port: int, advice: str) -> Check:
    from l4queue.cli.stack.embedded import is_port_free

    if is_port_free(port):
        return Check(name=name, verdict=CheckResult.OK, detail=f"{port} is free")
    return Check(name=name, verdict=CheckResult.WARN, detail=f"{port} is in use", advice=advice)


def _check_disk(data_dir: Path) -> Check:
    place = data_dir.absolute()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        return Check(
            name="disk",
            verdict=CheckResult.FAIL,
            detail=f"{place} cannot be written",
            advice="choose another --data-dir",
        )
    free = shutil.disk_usage(place).free
    is_enough = free >= _MIN_DISK_BYTES
    return Check(
        name="disk",
        verdict=CheckResult.OK if is_enough else CheckResult.WARN,
        detail=f"{free / 2**30:.1f} GiB free for {data_dir}",
        advice=None if is_enough else "free some, or choose another --data-dir: a full disk stops all writes",
    )


def _check_memory(settings: Settings, build: EngineBuild | None) -> Check:
    from l4queue.hardware import available_memory_bytes

    available = available_memory_bytes()
    is_cpu_engine = settings.engine == "vllm" and build is not None and build.kind == "cpu"
    is_enough = not is_cpu_engine or available >= 2 * _MIN_ENGINE_BYTES
    return Check(
        name="memory",
        verdict=CheckResult.OK if is_enough else CheckResult.WARN,
        detail=f"{available / 2**30:.1f} GiB available",
        advice=None if is_enough else "two CPU engines with KV cache need about 6 GiB: lower --workers",
    )


def _printed(checks: Iterable[Check]) -> Iterator[Check]:
    """The same, each shown as it comes: the engine's takes a while."""
    from rich.console import Console
    from rich.text import Text

    colours = {CheckResult.OK: "green", CheckResult.WARN: "yellow", CheckResult.FAIL: "red"}
    console = Console(soft_wrap=True)
    for check in checks:
        line = Text(f"{check.verdict:<5}", style=colours[check.verdict])
        line.append(f"{check.name:<{_NAME_CHARS}}  {check.detail}", style="default")
        console.print(line)
        if check.advice is not None:
            console.print(Text(f"{'':<{_NAME_CHARS + 7}}→ {check.advice}"))
        yield check


def register(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command()(doctor)
