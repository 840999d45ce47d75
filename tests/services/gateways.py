"""A deployment with HTTP gateways for tests: real processes, emulated engines, the tiny model's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from l4queue import Client, Settings
from l4queue.cli.stack.embedded import free_port
from tests.protocol.server import DURABLE, RedisServer
from tests.services.processes import Processes, until

__all__ = (
    "ANN",
    "BOB",
    "KEY",
    "MODEL",
    "Event",
    "EventReader",
    "Gateways",
    "await_workers",
    "events",
    "post",
    "refusals",
    "two_gateways",
    "write_keys",
)

MODEL = "tiny"
KEY, ANN, BOB = "a-key-of-sixteen-chars", "ann-has-a-long-key", "bob-has-another-key"


@dataclass(kw_only=True)
class Gateways:
    """Processes of a deployment, and where its gateways listen."""

    processes: Processes
    settings: Settings
    model: Path
    ports: dict[str, int] = field(default_factory=dict)
    api_key: str = "none"

    def start(self, name: str, *options: str, **settings: object) -> None:
        """Start a gateway; `answers` waits for it."""
        self.ports[name] = free_port()
        self.processes.start(
            name, "-m", "gateway", "--served-model-name", MODEL, *options, http_port=self.ports[name], **settings
        )

    def answers(self, name: str) -> None:
        """Wait until it does."""

        def is_there() -> bool:
            try:
                return httpx.get(f"{self.url(name)}/health", timeout=60).status_code in (200, 503)
            except httpx.TransportError:
                return False

        until(is_there, f"{name} answers", timeout_s=900)

    def url(self, name: str = "gateway-0") -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.ports[name]}"

    def openai(self, name: str = "gateway-0", **more: Any) -> OpenAI:
        """OpenAI's own client of it."""
        options = {"api_key": self.api_key, "max_retries": 0, "timeout": 300, **more}
        return OpenAI(base_url=f"{self.url(name)}/v1", **options)

    def queue(self) -> Client:
        """A client of the queue behind it; close it."""
        return Client(settings=self.settings)


@dataclass(frozen=True, kw_only=True)
class Event:
    """One event of a stream."""

    event_id: str
    data: Any  # None for the end


class EventReader:
    """Makes events of the lines of one response."""

    def __init__(self) -> None:
        self._event_id = ""

    def take(self, line: str) -> Event | None:
        """The event that this line completes."""
        name, _, value = line.partition(": ")
        if name == "id":
            self._event_id = value
        if name != "data":
            return None
        return Event(event_id=self._event_id, data=None if value == "[DONE]" else json.loads(value))


def events(lines: Iterator[str]) -> Iterator[Event]:
    """The events of a response's lines."""
    reader = EventReader()
    for line in lines:
        event = reader.take(line)
        if event is not None:
            yield event


def write_keys(folder: Path, *more: str) -> str:
    """A file of keys: ann's has limits, bob's has expired."""
    limits = "requests_per_minute=4 tokens_per_minute=1000 backlog_tokens=600"
    file = folder / "keys"
    lines = [f"ann {ANN} {limits}", f"bob {BOB} expires=2020-01-01", *more]
    (folder / "new").write_text("\n".join(lines))
    return str((folder / "new").replace(file))


def await_workers(gateways: Gateways, number: int) -> None:
    """Wait until that number of workers serves."""
    with gateways.queue() as client:
        until(lambda: len(client.overview().workers) == number, f"{number} workers", timeout_s=900)


def post(gateways: Gateways, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    """The answer to a body; names of headers have underscores."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(f"{gateways.url()}{path}", json=body, headers=named, timeout=300)


def refusals(gateways: Gateways) -> set[tuple[str, str]]:
    """Of whom, and why, as the gateway with keys counts them."""
    text = httpx.get(f"{gateways.url('gateway-1')}/metrics", timeout=60).text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {(s.labels["caller"], s.labels["reason"]) for s in samples if s.name == "l4queue_http_refusals_total"}


@contextmanager
def two_gateways(redis_executable: str, folder: Path, *, have_both_keys: bool = False) -> Iterator[Gateways]:
    """Redis, a dispatcher, two workers with the emulated engine, two gateways, one of them with keys or both."""
    from l4queue.model_cache import cache_directory
    from workers.tiny import build_tiny_model

    model = build_tiny_model(cache_directory())
    server = RedisServer(redis_executable, folder, DURABLE).start()
    values: dict[str, object] = {
        "redis_url": server.url,
        "model": str(model),
        "tokenizer": str(model),
        "max_model_len": 2048,
        "engine": "emulated",
        "lease_s": 2.0,
    }
    processes = Processes(folder, **values)
    settings = Settings(**values)  # type: ignore[arg-type] # the same values, typed by pydantic
    started = Gateways(processes=processes, settings=settings, model=model)
    try:
        keyed: dict[str, object] = {"http_key": KEY, "http_keys_file": write_keys(folder)}
        started.start("gateway-0", max_backlog_tokens=20_000, **(keyed if have_both_keys else {}))
        started.start("gateway-1", **keyed)
        processes.start("dispatcher", "-m", "dispatcher")
        for number in range(2):
            processes.worker(f"worker-{number}")
        for name in started.ports:
            started.answers(name)
        await_workers(started, 2)
        yield started
    finally:
        processes.close()
        server.kill()
