"""Writes .env.example and the settings of docker-compose.yml; `--check` fails when one is out of date."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from l4queue.config import Settings

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / ".env.example"
COMPOSE = ROOT / "docker-compose.yml"
BEGIN, END = "  # BEGIN settings: written by tools/generate_env_example.py\n", "  # END settings\n"

FIXED = {
    "redis_url": "containers use the redis service; on the host it is redis://127.0.0.1:6379/0",
    "redis_password": "see REDIS_PASSWORD",
    "celery_broker_url": "the database after the queue's",
    "devices_dir": "a volume that all workers of the machine share",
    "cpu_cores": "each worker takes cores of its own; see L4_CPU_CORES_PER_WORKER",
    "flower_port": "see FLOWER_PORT",
    "flower_login": "see DASHBOARD_USER and DASHBOARD_PASSWORD",
    "http_host": "0.0.0.0: the network of the containers; see HTTP_BIND",
    "http_port": "8000 in its container; see HTTP_PORT",
    "http_files": "/var/lib/l4queue/files: the volume `files`, which all gateways share",
    "metrics_port": "9400 in every container; only Prometheus reaches it",
    "metrics_host": "0.0.0.0: the network of the containers",
    "kv_handover_bytes": "0: containers share no memory, so requests that move are prefilled again",
    "worker_id": "each replica is worker@<container>",
}
"""Settings that compose decides by itself, and how."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """One variable that the compose files read, beside the settings."""

    name: str
    default: str
    meaning: str


VARIABLES = (
    Variable(name="DASHBOARD_USER", default="admin", meaning="login of Flower and Grafana"),
    Variable(name="DASHBOARD_PASSWORD", default="", meaning="password of Flower and Grafana; must be set; ASCII"),
    Variable(
        name="WORKER_TARGET",
        default="worker-cpu",
        meaning="image of the workers: worker-cpu, worker-gpu, or services, which can only emulate an engine",
    ),
    Variable(
        name="COMPOSE_FILE",
        default="docker-compose.yml",
        meaning="for GPUs: docker-compose.yml:docker/gpu.yml",
    ),
    Variable(
        name="MODELS",
        default="models",
        meaning="directory of models on this machine, /models in the containers; or a volume's name",
    ),
    Variable(name="HF_TOKEN", default="", meaning="token for models that Hugging Face gives only with one"),
    Variable(name="HF_HUB_OFFLINE", default="", meaning="1: never look for a model on the network"),
    Variable(
        name="OTEL_EXPORTER_OTLP_ENDPOINT",
        default="",
        meaning="with L4_TRACES: the collector, such as http://collector:4318; OTLP over HTTP",
    ),
    Variable(name="OTEL_EXPORTER_OTLP_HEADERS", default="", meaning="with L4_TRACES: headers for it, a=b,c=d"),
    Variable(name="OTEL_RESOURCE_ATTRIBUTES", default="", meaning="with L4_TRACES: on every span, a=b,c=d"),
    Variable(name="WORKER_MEMORY", default="16g", meaning="memory limit of a worker"),
    Variable(name="WORKER_CPUS", default="0", meaning="CPU time limit of a worker, in CPUs; 0: none"),
    Variable(name="WORKER_SHM", default="2g", meaning="shared memory of a worker, for groups of GPUs"),
    Variable(
        name="WORKER_START", default="600s", meaning="a worker may take so long to load before it is unhealthy"
    ),
    Variable(
        name="WORKER_STOP_GRACE",
        default="60s",
        meaning="a stopping worker is killed after; L4_DRAIN_S and 15 s must fit in",
    ),
    Variable(name="SERVICE_MEMORY", default="2g", meaning="memory limit of each other container of ours"),
    Variable(name="HEALTH_INTERVAL", default="15s", meaning="time between two health checks of a container"),
    Variable(
        name="REDIS_PASSWORD",
        default="",
        meaning="password of Redis; must be set. Passwords with $, # or spaces stand in single quotes",
    ),
    Variable(name="REDIS_PORT", default="6379", meaning="port of Redis on 127.0.0.1, for clients on this machine"),
    Variable(
        name="REDIS_APPENDFSYNC",
        default="always",
        meaning="always keeps all that was accepted; everysec, with L4_DURABILITY=fast, may lose the last second",
    ),
    Variable(name="REDIS_MAXMEMORY", default="2gb", meaning="Redis refuses new requests beyond; in its own units"),
    Variable(name="REDIS_MEMORY", default="4g", meaning="memory limit of Redis: twice REDIS_MAXMEMORY"),
    Variable(name="FLOWER_BIND", default="127.0.0.1", meaning="address of this machine that Flower listens on"),
    Variable(name="FLOWER_PORT", default="5555", meaning="port of Flower on this machine"),
    Variable(name="HTTP_BIND", default="127.0.0.1", meaning="address of this machine that the gateway listens on"),
    Variable(name="HTTP_PORT", default="8000", meaning="with --profile http: port of the gateway on this machine"),
    Variable(name="PROMETHEUS_PORT", default="9090", meaning="port of Prometheus on 127.0.0.1"),
    Variable(name="PROMETHEUS_RETENTION", default="15d", meaning="how long Prometheus keeps figures"),
    Variable(name="PROMETHEUS_MEMORY", default="2g", meaning="memory limit of Prometheus"),
    Variable(name="GRAFANA_PORT", default="3000", meaning="port of Grafana on 127.0.0.1"),
    Variable(name="GRAFANA_MEMORY", default="1g", meaning="memory limit of Grafana"),
    Variable(
        name="BASE_IMAGE",
        default="python:3.11-slim-bookworm",
        meaning="what our images are made from: a Debian with Python 3.11 to 3.13",
    ),
    Variable(
        name="BUILD_IMAGE",
        default="python:3.11-slim-bookworm",
        meaning="where packages are installed: the same Python, with pip's configuration where a site needs one",
    ),
    Variable(name="REDIS_IMAGE", default="redis:7.4-bookworm", meaning="Redis from 6.2 on, or Valkey"),
    Variable(name="PROMETHEUS_IMAGE", default="prom/prometheus:v3.5.0", meaning="image of Prometheus"),
    Variable(name="GRAFANA_IMAGE", default="grafana/grafana:12.1.0", meaning="image of Grafana"),
    Variable(name="IMAGE_PREFIX", default="l4queue", meaning="first part of our images' names"),
    Variable(name="IMAGE_TAG", default="latest", meaning="tag of our images"),
    Variable(
        name="DEVICES_VOLUME",
        default="l4queue-devices",
        meaning="volume of the locks on GPUs and cores; one for all deployments of this machine",
    ),
)

NEEDED = ("DASHBOARD_PASSWORD", "REDIS_PASSWORD")
"""Without these Compose does not start."""

HEAD = """# Settings of docker-compose.yml: copy this file to .env and set DASHBOARD_PASSWORD and REDIS_PASSWORD.
# A line without # in front is needed; every other one shows the default.
# Written by tools/generate_env_example.py.

# --- Containers ---
"""
SETTINGS_HEAD = """
# --- l4queue: docs/settings.md says which values are allowed ---
"""


def settings_block() -> str:
    """The pass-through of settings in docker-compose.yml."""
    names = [name for name in Settings.model_fields if name not in FIXED]
    return BEGIN + "".join(f"  L4_{name.upper()}:\n" for name in names) + END


def compose_with_settings(text: str) -> str:
    """docker-compose.yml with the block of today's settings."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{COMPOSE.name} lacks the lines {BEGIN.strip()!r} and {END.strip()!r}")
    return before + settings_block() + after


def example() -> str:
    """The whole of .env.example."""
    lines = [HEAD]
    for variable in VARIABLES:
        comment = "" if variable.name in NEEDED else "# "
        lines.append(f"# {variable.meaning}\n{comment}{variable.name}={variable.default}\n")
    lines.append(SETTINGS_HEAD)
    for name, info in Settings.model_fields.items():
        if name in FIXED:
            lines.append(f"# L4_{name.upper()} is set by docker-compose.yml: {FIXED[name]}\n")
        else:
            lines.append(f"# {info.description}\n# L4_{name.upper()}={_written(info.default)}\n")
    return "".join(lines)


def _written(default: object) -> str:
    if default is None:
        return ""
    return str(default).lower() if isinstance(default, bool) else str(default)


def undocumented() -> set[str]:
    """Variables that a compose file reads and nobody explains, or that are explained and never read."""
    texts = [COMPOSE.read_text("utf-8"), *(f.read_text("utf-8") for f in sorted((ROOT / "docker").glob("*.yml")))]
    read = {name for text in texts for name in re.findall(r"\$\{([A-Z0-9_]+)", text)}
    read |= set(re.findall(r"^  ((?:HF|OTEL)_[A-Z0-9_]+):$", texts[0], re.MULTILINE))  # passed on as they are
    read.add("COMPOSE_FILE")  # read by compose itself
    return read ^ {variable.name for variable in VARIABLES}


def main(arguments: list[str]) -> int:
    """Write both files, or compare them."""
    wanted = {EXAMPLE: example(), COMPOSE: compose_with_settings(COMPOSE.read_text("utf-8"))}
    problems = sorted(undocumented())
    if problems:
        print(
            f"variables in one of docker-compose.yml and {Path(__file__).name} only: {problems}", file=sys.stderr
        )
        return 1
    for path, text in wanted.items():
        if "--check" not in arguments:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text("utf-8") != text:
            print(f"{path.name} is out of date; run: python tools/generate_env_example.py", file=sys.stderr)
            return 1
        else:
            print(f"{path.name} is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
