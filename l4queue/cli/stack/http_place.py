"""Address of the HTTP gateway on this machine, whether it answers, and a line for people who try it."""

from __future__ import annotations

import asyncio
import http.client
import json
from dataclasses import dataclass

from l4queue.cli.stack.embedded import free_port, is_port_free
from l4queue.config import Settings
from l4queue.errors import ConfigError
from l4queue.model_config import served_names

__all__ = ("HttpPlace", "choose_http_place")

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "localhost": "127.0.0.1"}
_TRY_S = 2.0  # for the gateway to answer one request; chosen: it is on this machine
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
        asked = {"model": self.model, "prompt": "The capital of France is", "max_tokens": 12, "temperature": 0}
        body = json.dumps(asked)
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


def choose_http_place(settings: Settings, *, port: int | None) -> HttpPlace:
    """The place by these settings; another free port where theirs is in use.

    ConfigError where that is the `port` of an option.
    """
    chosen = settings.http_port
    if not is_port_free(chosen):
        if port is not None:
            raise ConfigError(f"port {port} is in use; choose another with --http-port, or use --no-http")
        chosen = free_port()
    needs_key = bool(settings.http_key.get_secret_value() or settings.http_keys_file)
    return HttpPlace(host=settings.http_host, port=chosen, model=served_names(settings)[0], needs_key=needs_key)
