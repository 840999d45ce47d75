"""The part of a gateway that serves files and batches, with its door, over real sockets and without vLLM."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from openai import AsyncOpenAI
from openai.types import Batch
from prometheus_client import CollectorRegistry

from gateway.batches.service import BatchService
from gateway.batches.store import FileStore
from gateway.door import Door, DoorParts
from gateway.keys import ApiKeys
from gateway.limits import Limiter
from gateway.metrics import DoorMetrics
from gateway.serving_check import ServingCheck
from l4queue import Settings
from l4queue.cli.stack.embedded import free_port
from tests.services.pipeline import Pipeline, until

__all__ = ("BatchGateway", "chat_lines", "lines_of", "open_gateway")

_METRICS = DoorMetrics()  # one in a process
_ENDED = ("failed", "completed", "expired", "cancelled")


@dataclass(kw_only=True)
class BatchGateway:
    """A gateway that serves, and clients of it."""

    client: AsyncOpenAI
    http: httpx.AsyncClient
    registry: CollectorRegistry

    def client_of(self, key: str) -> AsyncOpenAI:
        """A client with another key."""
        return self.client.copy(api_key=key)

    async def begin(self, lines: bytes, **more: Any) -> Batch:
        """Upload an input and begin its batch."""
        file = await self.client.files.create(file=("in.jsonl", lines), purpose="batch")
        options: dict[str, Any] = {"endpoint": "/v1/chat/completions", "completion_window": "24h", **more}
        return await self.client.batches.create(input_file_id=file.id, **options)

    async def ended(self, batch: Batch) -> Batch:
        """The batch, once it has ended."""
        found = batch

        async def has_ended() -> bool:
            nonlocal found
            found = await self.client.batches.retrieve(batch.id)
            return found.status in _ENDED

        await until(has_ended)
        return found

    async def answers(self, file_id: str | None) -> list[dict[str, Any]]:
        """Lines of an output or error file; none of no file."""
        return [] if file_id is None else lines_of((await self.client.files.content(file_id)).content)


def lines_of(content: bytes) -> list[dict[str, Any]]:
    """JSON lines."""
    return [json.loads(line) for line in content.splitlines()]


def chat_lines(number: int, **body: Any) -> bytes:
    """Requests for chats."""
    return b"".join(
        json.dumps(
            {
                "custom_id": f"c{i}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"messages": [{"role": "user", "content": f"line {i}"}], "max_tokens": 2, **body},
            }
        ).encode()
        + b"\n"
        for i in range(number)
    )


@asynccontextmanager
async def open_gateway(
    pipeline: Pipeline, store: str, *, key: str = "none", keys_file: str = "", **more: object
) -> AsyncIterator[BatchGateway]:
    """A gateway before this queue, and a client with this key."""
    settings: Settings = pipeline.settings.model_copy(update={"http_files": store, **more})
    app, registry = FastAPI(), CollectorRegistry()
    serving = ServingCheck(settings)
    keys = ApiKeys(key="", file=keys_file)
    limiter = Limiter(settings, keys)
    app.state.door = DoorParts(
        keys=keys,
        limiter=limiter,
        serving=serving,
        client=pipeline.client,
        fields={},
        metrics=_METRICS,
        has_files=True,
    )
    service = BatchService(settings, FileStore(store), app, keys=keys, registry=registry)
    app.add_middleware(Door)
    server = uvicorn.Server(uvicorn.Config(app, port=free_port(), log_level="warning", lifespan="off"))
    serving_task = asyncio.create_task(server._serve())  # `serve` would take the signals of the test run
    await until(lambda: _has_started(server))
    url = f"http://127.0.0.1:{server.config.port}"
    try:
        async with (
            AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=300) as client,
            httpx.AsyncClient(base_url=url, timeout=300) as http,
        ):
            yield BatchGateway(client=client, http=http, registry=registry)
    finally:
        server.should_exit = True
        await serving_task
        await service.close()
        await serving.close()
        await limiter.close()


async def _has_started(server: uvicorn.Server) -> bool:
    return server.started
