"""A deployment with HTTP gateways for tests: real processes, emulated engines, the tiny model's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from l4queue import Client, Settings
from l4queue.cli.stack.embedded import free_port
from tests.services.processes import Processes, until

__all__ = ("Event", "Gateways", "events", "joined")

MODEL = "tiny"


@dataclass(kw_only=True)
class Gateways:
    """Processes of a deployment, and where its gateways listen."""

    processes: Processes
    settings: Settings
    model: Path
    ports: dict[str, int] = field(default_factory=dict)

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
        options = {"api_key": "none", "max_retries": 0, "timeout": 300, **more}
        return OpenAI(base_url=f"{self.url(name)}/v1", **options)

    def queue(self) -> Client:
        """A client of the queue behind it; close it."""
        return Client(settings=self.settings)


@dataclass(frozen=True, kw_only=True)
class Event:
    """One event of a stream."""

    event_id: str
    data: Any  # None for the end


def events(lines: Iterator[str]) -> Iterator[Event]:
    """The events of a response's lines."""
    event_id = ""
    for line in lines:
        name, _, value = line.partition(": ")
        if name == "id":
            event_id = value
        elif name == "data":
            yield Event(event_id=event_id, data=None if value == "[DONE]" else json.loads(value))


def joined(found: list[Event]) -> tuple[str, list[str]]:
    """The text of a stream of one completion, and why it ended: once."""
    choices = [choice for event in found if event.data for choice in event.data["choices"]]
    ends = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    return "".join(choice["text"] for choice in choices), ends
