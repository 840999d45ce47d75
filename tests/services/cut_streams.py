"""Many clients that stream at once, each of which goes to another gateway when its own one is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.e2e.openai_bodies import CHAT, COMPLETIONS, put_together
from tests.services.gateways import KEY, MODEL, Event, EventReader, Gateways

__all__ = ("answer_of_events", "follow", "stream_bodies")


@dataclass(kw_only=True)
class _Stream:
    """One client's stream: what it asks for, its gateway, the events so far, and how often it came back."""

    path: str
    body: dict[str, Any]
    gateway: str
    events: list[Event] = field(default_factory=list)
    num_returns: int = 0

    @property
    def has_ended(self) -> bool:
        """Whether the last event is there."""
        return bool(self.events) and self.events[-1].data is None

    @property
    def request_id(self) -> str:
        """Of the first request behind it."""
        return self.events[0].event_id.partition("/")[0]


def answer_of_events(events: Sequence[Event]) -> tuple[Any, dict[int, int]]:
    """All events put together: text and end of each choice, the usage, and how often a choice's end was told."""
    ends: dict[int, int] = {}
    for event in events:
        for choice in event.data["choices"] if event.data else ():
            ends[choice["index"]] = ends.get(choice["index"], 0) + bool(choice["finish_reason"])
    return put_together([event.data for event in events if event.data]), ends


def stream_bodies(number: int, *, max_tokens: int) -> list[tuple[str, dict[str, Any]]]:
    """Completions and chats in turn, each with a prompt of its own; a third has two outputs, or two prompts."""
    sampled = {"n": 2, "seed": 7, "temperature": 0.8}
    found: list[tuple[str, dict[str, Any]]] = []
    for i in range(number):
        told = {"messages": [{"role": "user", "content": f"Say {i}."}]} if i % 4 > 1 else {"prompt": f"Number {i}"}
        if i % 16 in (8, 9):
            told = {"prompt": [f"Number {i}", f"Another prompt {i}"]}
        more = sampled if i % 16 in (1, 7, 10) else {"temperature": 0}
        body = {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
        found.append(
            (CHAT if "messages" in told else COMPLETIONS, {**body, "max_tokens": max_tokens, **told, **more})
        )
    return found


async def follow(
    gateways: Gateways,
    asked: Sequence[tuple[str, dict[str, Any]]],
    *,
    names: Sequence[str],
    midway: Callable[[], None] | None = None,
) -> list[_Stream]:
    """Streams of as many clients, read to their ends; `midway` is called once each has three events.

    The clients are spread over the named gateways. When a connection breaks, its client goes to the first one.
    """
    streams = [
        _Stream(path=path, body=body, gateway=names[i % len(names)]) for i, (path, body) in enumerate(asked)
    ]
    has_begun = [asyncio.Event() for _ in streams]

    async def one(stream: _Stream, begun: asyncio.Event) -> None:
        while not stream.has_ended:
            try:
                await _read(gateways, http, stream, begun)
            except httpx.TransportError:
                assert stream.gateway != names[0], "the gateway that was to stay has gone"
                stream.gateway, stream.num_returns = names[0], stream.num_returns + 1

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=300, limits=limits) as http, asyncio.TaskGroup() as group:
        for stream, begun in zip(streams, has_begun, strict=True):
            group.create_task(one(stream, begun))
        for begun in has_begun:
            await begun.wait()
        if midway is not None:
            midway()
    return streams


async def _read(gateways: Gateways, http: httpx.AsyncClient, stream: _Stream, begun: asyncio.Event) -> None:
    """Add events to a stream until it ends or its connection breaks; the first time from its beginning."""
    headers = {"x-l4-event-ids": "true", "authorization": f"Bearer {KEY}"}
    if stream.events:
        headers["last-event-id"] = stream.events[-1].event_id
    reader = EventReader()
    url = f"{gateways.url(stream.gateway)}{stream.path}"
    async with http.stream("POST", url, json=stream.body, headers=headers) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            event = reader.take(line)
            if event is not None:
                stream.events.append(event)
            if len(stream.events) == 3:
                begun.set()
