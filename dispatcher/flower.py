"""Starts Flower for this deployment: `python -m dispatcher.flower`. FLOWER_* variables win over our options."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from dispatcher.app import make_app
from dispatcher.flower_events import install
from l4queue.config import Settings, load_settings
from l4queue.errors import L4QueueError
from l4queue.logs import start_logging, take_log_format

__all__ = ("flower_options", "is_api_open", "main")

MAX_TASKS = 20_000
"""Requests that Flower remembers; it forgets the least recently seen."""
_PURGE_OFFLINE_S = 3600
_COLUMNS = "name,uuid,state,args,result,received,runtime,worker"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def flower_options(settings: Settings, environment: Mapping[str, str]) -> dict[str, str]:
    """Our options by name, without those that the environment sets."""
    ours = {
        "address": "127.0.0.1",
        "port": str(settings.flower_port),
        "max_tasks": str(MAX_TASKS),
        "purge_offline_workers": str(_PURGE_OFFLINE_S),
        "tasks_columns": _COLUMNS,
        "natural_time": "true",
        "inspect_timeout": "2000",
    }
    return {name: value for name, value in ours.items() if f"FLOWER_{name.upper()}" not in environment}


def is_api_open(settings: Settings, environment: Mapping[str, str], arguments: Sequence[str]) -> bool:
    """Whether Flower's API, which its buttons use, needs no login: on loopback, unless prompts are shown.

    Flower refuses changes from foreign web pages, but lets them read an open API.
    """
    has_login = any(name in environment for name in ("FLOWER_BASIC_AUTH", "FLOWER_AUTH"))
    is_local = environment.get("FLOWER_ADDRESS", "127.0.0.1") in _LOOPBACK
    is_changed = any(a.lstrip("-").startswith(("address", "basic_auth", "basic-auth", "auth")) for a in arguments)
    return is_local and not has_login and not is_changed and not settings.flower_show_prompts


def main(arguments: Sequence[str] = ()) -> None:
    """Run Flower until a signal; `arguments` are Flower's own and win over ours."""
    arguments = take_log_format(arguments)
    settings = load_settings()
    start_logging(settings.log_format)
    options = flower_options(settings, os.environ)
    if is_api_open(settings, os.environ, arguments):
        os.environ.setdefault("FLOWER_UNAUTHENTICATED_API", "true")
    install()
    given = [f"--{name}={value}" for name, value in options.items()]
    make_app(settings).start(["flower", *given, *arguments])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except L4QueueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
