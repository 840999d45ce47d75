"""Address of the HTTP gateway on this machine, whether it answers, and a line for people who try it."""

from __future__ import annotations

import asyncio
import http.client
import json
from dataclasses import dataclass

__all__ = ("HttpPlace",)

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "localhost": "127.0.0.1"}
_TRY_S = 2.0
_ALIVE = (200, 503)  # 503: it works, and no worker serves yet


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpPlace:
    """Where the gateway listens, and the name under which it serves the model; `needs_key` of its clients."""

    host: str
    port: int
    model: str
    needs_key: bool = False

    @property
    def url(self) -> str:
        """The base URL for clients of OpenAI's API on this machine."""
        host = _EVERYWHERE.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/v1"

    @property
    def curl(self) -> str:
        """A command that gets a completion."""
        body = json.dumps({"model": self.model, "prompt": "The return statement", "max_tokens": 12})
        key = " -H 'Authorization: Bearer '$L4_HTTP_KEY" if self.needs_key else ""
        return f"curl {self.url}/completions{key} -H 'Content-Type: application/json' -d '{body}'"

    async def answers(self) -> bool:
        """Whether it does."""
        return await asyncio.to_thread(self._answers)

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(_EVERYWHERE.get(self.host, self.host), self.port, timeout=_TRY_S)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status in _ALIVE
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
