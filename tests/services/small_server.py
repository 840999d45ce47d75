"""A small HTTP server with vLLM's protocol, for answers that a well vLLM never gives. Its tokens are emulated."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from l4queue.config import Settings
from l4queue.engine_server import read_engine_server
from workers.engine.emulated.scheduler import next_token
from workers.engine.http.engine import HttpEngine

__all__ = ("Fate", "SmallServer", "small_server")

CAPACITY_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """What becomes of one request: a status instead of a stream, or a line in place of its token `at`."""

    status: int = 200
    body: str = ""
    at: int = 0
    line: str = ""


BREAK = ""
"""A line that stands for the end of the connection."""


@dataclass(kw_only=True)
class SmallServer:
    """Answers requests in the order of `fates`; well once there are none left."""

    models: list[dict[str, Any]] = field(
        default_factory=lambda: [{"id": "m", "root": "/models/m", "parent": None, "max_model_len": 2048}]
    )
    keeps_constraints: bool = True
    token_ids: bool = True
    changes_prompts: bool = False
    tells_metrics: bool = True
    cached_tokens: int | None = None
    key: str = ""
    health: int = 200
    fates: deque[Fate] = field(default_factory=deque)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    num_closed: int = 0  # streams that their clients left
    url: str = ""

    def engine(self, **options: Any) -> HttpEngine:
        """A worker's engine at this server."""
        settings = Settings(engine="http", engine_url=self.url, model="m")
        named = {
            "model_names": ("m",), "headers": {}, "max_running": 16, "max_batched_tokens": 512, **options
        }  # fmt: skip
        return HttpEngine(self.url, describe=lambda: read_engine_server(self.url, settings), **named)

    def app(self) -> web.Application:
        """Its routes."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/version", self._version)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/completions", self._completions)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return web.json_response({"object": "list", "data": self.models})

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"})

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=self.health)

    async def _metrics(self, _: web.Request) -> web.Response:
        told = f'vllm:cache_config_info{{engine="0",kv_cache_size_tokens="{CAPACITY_TOKENS}"}} 1.0\n'
        return web.Response(text=told if self.tells_metrics else "python_info 1.0\n")

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.text())
        is_probe = body["request_id"] == "probe"
        if not is_probe:
            self.bodies.append(body)
        fate = self.fates.popleft() if self.fates and not is_probe else Fate(at=-1)
        if fate.status != 200:
            return web.Response(status=fate.status, text=fate.body, content_type="application/json")
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        try:
            await self._stream(request, answer, body, fate)
        except (ConnectionError, asyncio.CancelledError):
            self.num_closed += 1
            raise
        return answer

    async def _stream(
        self, request: web.Request, answer: web.StreamResponse, body: dict[str, Any], fate: Fate
    ) -> None:
        ids, word = (
            list(body["prompt"]),
            "yes" if "structured_outputs" in body and self.keeps_constraints else "no",
        )
        for number in range(body["max_tokens"]):
            if number == fate.at and fate.line == BREAK:
                assert request.transport is not None
                request.transport.abort()
                return
            if number == fate.at:
                await answer.write(f"data: {fate.line}\n\n".encode())
                return
            token = next_token(ids)
            choice: dict[str, Any] = {"index": 0, "text": word if number == 0 else "", "finish_reason": None}
            if self.token_ids:
                choice["token_ids"] = [token]
                choice["prompt_token_ids"] = [0, *body["prompt"]] if self.changes_prompts else body["prompt"]
            if "logprobs" in body:
                name = f"token_id:{token}"
                choice["logprobs"] = {"tokens": [name], "token_logprobs": [-1.0], "top_logprobs": [{name: -1.0}]}
            if number == body["max_tokens"] - 1:
                choice["finish_reason"] = "length"
            ids.append(token)
            await answer.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
            await asyncio.sleep(0)
        if self.cached_tokens is not None:
            usage = {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": self.cached_tokens}}
            await answer.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode())
        await answer.write(b"data: [DONE]\n\n")


@asynccontextmanager
async def small_server(**options: Any) -> AsyncIterator[SmallServer]:
    """One on a free port of this machine."""
    server = SmallServer(**options)
    runner = web.AppRunner(server.app(), handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()
