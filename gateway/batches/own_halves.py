"""Halves of exchanges with the gateway's own server, for the batches that it runs in threads."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, MutableMapping
from http import HTTPStatus
from typing import Any

from gateway.door import CALLER, body_first
from l4queue.client.batch.halves import Halves

__all__ = ("OwnHalves",)


class OwnHalves(Halves):
    """The application `app` on the event loop that makes this. Callers are threads, which wait for it."""

    def __init__(self, app: Any, *, writes_all: bool) -> None:
        self.writes_all = writes_all
        self._app = app
        self._loop = asyncio.get_running_loop()

    def call(self, url: str, headers: Mapping[str, str], body: bytes) -> tuple[int, bytes]:
        """See `Halves.call`."""
        return asyncio.run_coroutine_threadsafe(self._call(url, headers, body), self._loop).result()

    async def _call(self, url: str, headers: Mapping[str, str], body: bytes) -> tuple[int, bytes]:
        told = {"content-type": "application/json", "content-length": str(len(body)), **headers}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": url,
            "raw_path": url.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in told.items()],
            "client": None,
            "server": None,
            CALLER: "",
        }
        status, parts = HTTPStatus.INTERNAL_SERVER_ERROR, []

        nothing_more: asyncio.Future[MutableMapping[str, Any]] = self._loop.create_future()  # its caller stays

        async def receive() -> MutableMapping[str, Any]:
            return await nothing_more

        async def send(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                parts.append(message.get("body", b""))

        await self._app(scope, body_first(body, receive), send)
        return int(status), b"".join(parts)
