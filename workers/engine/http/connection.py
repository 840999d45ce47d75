"""Connection of a worker to its server: streams of events, metrics, health.

Each request has a connection of its own. A kept one may be closed by the server just when the next request is
sent, and closing it is the only way to cancel.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from enum import StrEnum
from typing import Any

import aiohttp

from l4queue.errors import PortableError

__all__ = ("BrokenStream", "ServerBusy", "ServerConnection", "ServerRefusal", "ServerState")

_CONNECT_S = 10.0  # to open a connection; chosen: beyond a lost packet or two
_ANSWER_S = 10.0  # for metrics and health, which a server answers between two steps of its event loop
_END = b"[DONE]"
_MAX_EVENT_BYTES = 64 << 20  # the first event repeats the prompt: several million token ids


class ServerState(StrEnum):
    """Whether a server serves."""

    WELL = "well"
    CRASHED = "crashed"  # nobody listens there, or its engine is dead
    SILENT = "silent"  # no answer: the network, or it is too busy


class ServerRefusal(PortableError):
    """The server does not compute a request; `field` is the parameter at fault, if it is about one."""

    def __init__(self, why: str, *, status: int, field: str = "") -> None:
        super().__init__(why)
        self.status = status
        self.field = field


class ServerBusy(PortableError):
    """The server takes no more requests now."""


class BrokenStream(PortableError):
    """The stream of a request ended before the request did."""


class ServerConnection:
    """One server by its URL. Belongs to one event loop; `open` before use."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self.url = url
        self._headers = dict(headers)
        self._session: aiohttp.ClientSession | None = None

    def open(self) -> None:
        """Get ready; connects to nothing yet."""
        timeout = aiohttp.ClientTimeout(total=None, connect=_CONNECT_S, sock_connect=_CONNECT_S)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers)

    async def close(self) -> None:
        """Close everything; safe to call twice."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def events(self, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Send a request and give the events of its stream. To leave the iterator closes the connection.

        Raises ServerRefusal, ServerBusy, BrokenStream.
        """
        try:
            async with self._opened.post(f"{self.url}/v1/completions", json=body, allow_redirects=False) as answer:
                if answer.status != 200:
                    raise await _refusal(answer)
                async for data in _datas(answer.content):
                    event = _event(data)
                    if "error" in event:
                        raise _told(event["error"], status=500)
                    yield event
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise BrokenStream(_why(error)) from error
        raise BrokenStream("it ended before the request did")

    async def metrics(self) -> str | None:
        """The exposition of its metrics, empty where it has none; None where there is no answer.

        Raises ConnectionRefusedError.
        """
        answered = await self._get("/metrics")
        if answered is None:
            return None
        return answered[1] if answered[0] == 200 else ""

    async def state(self) -> ServerState:
        """Whether it serves now."""
        try:
            answered = await self._get("/health")
        except ConnectionRefusedError:
            return ServerState.CRASHED
        if answered is None:
            return ServerState.SILENT
        return ServerState.CRASHED if answered[0] >= 500 else ServerState.WELL

    async def _get(self, path: str) -> tuple[int, str] | None:
        """Status and text; None where there was no answer. Raises ConnectionRefusedError."""
        try:
            async with (
                asyncio.timeout(_ANSWER_S),
                self._opened.get(self.url + path, allow_redirects=False) as answer,
            ):
                return answer.status, await answer.text()
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, ConnectionRefusedError):
                raise error.os_error from None
            return None
        except (aiohttp.ClientError, OSError, TimeoutError, UnicodeDecodeError):
            return None

    @property
    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise BrokenStream("the connection was closed")
        return self._session


async def _datas(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The data of each event, up to the one that says that all is done."""
    rest = b""
    async for piece in content.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > _MAX_EVENT_BYTES:
            raise BrokenStream(f"an event has more than {_MAX_EVENT_BYTES} bytes")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[len(b"data:") :].strip()
            if data == _END:
                return
            yield data


def _event(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError as error:
        raise BrokenStream(f"an event is no JSON: {error}") from error
    if not isinstance(event, dict):
        raise BrokenStream("an event is no object")
    return event


async def _refusal(answer: aiohttp.ClientResponse) -> Exception:
    text = await answer.text(errors="replace")
    try:
        told = json.loads(text)
    except ValueError:
        told = None
    error = told.get("error", told) if isinstance(told, dict) else text.strip()[:200]
    return _told(error, status=answer.status)


def _told(error: object, *, status: int) -> Exception:
    """An error as OpenAI's servers tell it: its own code counts more than that of the answer."""
    facts = error if isinstance(error, dict) else {"message": str(error)}
    code = facts.get("code")
    status = code if isinstance(code, int) and code >= 400 else status
    message = str(facts.get("message") or f"HTTP {status}")
    if status in (429, 503):
        return ServerBusy(message)
    if status >= 500:
        return BrokenStream(message)
    return ServerRefusal(message, status=status, field=str(facts.get("param") or ""))


def _why(error: BaseException) -> str:
    return str(error) or type(error).__name__
