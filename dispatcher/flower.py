"""Entry point of Flower: `python -m dispatcher.flower`. FLOWER_* variables win over our options."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import flower.options
import flower.utils.broker
from flower.utils import strtobool

from dispatcher.app import make_app
from dispatcher.monitoring import flower_events, flower_guard
from l4queue.config import Settings, load_settings
from l4queue.errors import ConfigError, L4QueueError
from l4queue.failure import fail
from l4queue.logs import start_logging, take_log_format

__all__ = ("SocketBroker", "check_variables", "flower_options", "main")

MAX_TASKS = 20_000
"""Requests that Flower remembers; it forgets the least recently seen."""
_PURGE_OFFLINE_S = 3600
"""How long Flower shows a worker that is gone, s. Chosen: long enough to be seen, and names of replaced
workers do not pile up."""
_COLUMNS = "name,uuid,state,args,result,received,runtime,worker"


class SocketBroker(flower.utils.broker.RedisSocket):  # type: ignore[misc]  # flower has no types
    """How many messages wait in a Redis behind a Unix socket: Flower's own asks database 0, without a user."""

    def __init__(self, broker_url: str, *given: Any, **named: Any) -> None:
        super().__init__(broker_url, *given, **named)
        database = parse_qs(urlsplit(broker_url).query).get("virtual_host", ["0"])[0]
        own = {"path": unquote(f"/{self.vhost}"), "username": self.username or None, "db": int(database)}
        self.redis.connection_pool.connection_kwargs.update(own)


def flower_options(settings: Settings, environment: Mapping[str, str]) -> dict[str, str]:
    """Our options by name, except where the environment sets them."""
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


def check_variables(environment: Mapping[str, str]) -> None:
    """ConfigError names a FLOWER_* variable whose value Flower cannot read.

    Kubernetes sets FLOWER_PORT=tcp://... where a service is called flower.
    """
    for name, value in environment.items():
        option = flower.options.default_options._options.get(
            name.removeprefix("FLOWER_").lower().replace("_", "-")
        )
        if not name.startswith("FLOWER_") or option is None or option.type not in (int, float, bool):
            continue
        read = strtobool if option.type is bool else option.type
        try:
            for part in value.split(",") if option.multiple else [value]:
                read(part)
        except ValueError:
            raise ConfigError(
                f"{name}: {value} is no {option.type.__name__} as Flower wants it; unset it"
            ) from None


def main(arguments: Sequence[str] = ()) -> None:
    """Run Flower until a signal; `arguments` are Flower's own and win over ours. An empty variable is not set."""
    arguments = take_log_format(arguments)
    settings = load_settings()
    for name in [name for name, value in os.environ.items() if name.startswith("FLOWER_") and not value]:
        del os.environ[name]
    check_variables(os.environ)
    start_logging(settings.log_format)
    options = flower_options(settings, os.environ)
    flower_events.install(settings)
    flower_guard.install(settings)
    flower.utils.broker.RedisSocket = SocketBroker
    given = [f"--{name}={value}" for name, value in options.items()]
    make_app(settings).start(["flower", *given, *arguments])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except L4QueueError as error:
        sys.exit(fail(error))
