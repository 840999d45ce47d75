"""Metrics ports of a local deployment, and the target list that Prometheus reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from l4queue.cli.stack.embedded import is_port_free
from l4queue.cli.stack.supervisor import ChildSpec
from l4queue.config import Settings
from l4queue.errors import ConfigError

__all__ = ("with_metrics", "write_targets")

_SERVE = ("exporter", "dispatcher", "worker", "workers")


def with_metrics(specs: Sequence[ChildSpec], settings: Settings) -> tuple[dict[str, str], list[ChildSpec]]:
    """Give each process that has metrics a port from `metrics_port` on, the exporter the first; with their URLs.

    All others are told to have none. ConfigError when a port is taken.
    """
    served = (
        [spec.name for spec in specs if spec.name.partition("-")[0] in _SERVE] if settings.metrics_port else []
    )
    served.sort(key=lambda name: name != "exporter")
    ports = {name: settings.metrics_port + index for index, name in enumerate(served)}
    for name, port in ports.items():
        if port > 65535 or not is_port_free(port):
            raise ConfigError(f"port {port}, for metrics of {name}, is in use; choose another --metrics-port")
    host = "127.0.0.1" if settings.metrics_host in ("0.0.0.0", "::") else settings.metrics_host
    urls = {name: f"http://{host}:{port}/metrics" for name, port in ports.items()}
    given = [replace(spec, env={**spec.env, "L4_METRICS_PORT": str(ports.get(spec.name, 0))}) for spec in specs]
    return urls, given


def write_targets(path: Path, urls: Mapping[str, str]) -> None:
    """Write them for `file_sd_configs`: each with the name of its process as label `process`."""
    groups = [
        {"targets": [url.partition("//")[2].partition("/")[0]], "labels": {"process": name}}
        for name, url in urls.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(groups, indent=1) + "\n", encoding="utf-8")
    aside.rename(path)
