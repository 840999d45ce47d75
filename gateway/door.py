"""The ASGI middleware in front of vLLM's server: keys, unknown fields, ids of events, right statuses.

An answer begins when its first bytes are there, and not before: only then is it known whether the queue took the
request, so a refusal has its own status also where the client asked for a stream.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from gateway.exchange import CURRENT, Exchange, begin
from gateway.fields import CHAT, COMPLETIONS, RESPONSES, BodyFields, check_fields
from gateway.keys import ApiKeys
from gateway.limits import Limiter
from gateway.metrics import DoorMetrics, MeasuredExchange
from gateway.refusals import HttpRefusal, OverLimit, refusal_of
from gateway.serving_check import ServingCheck
from l4queue.client import AsyncClient
from l4queue.client.arguments import RESPONSE_PREFIX
from l4queue.client.batch.halves import HALF_HEADER
from l4queue.errors import InvalidRequest, L4QueueError
from l4queue.models import RequestSpec

__all__ = ("BATCHES", "CALLER", "FILES", "Door", "DoorParts", "body_first", "is_served")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

FILES, BATCHES = "/v1/files", "/v1/batches"
CALLER = "l4queue.caller"
"""Key of a scope under which the door leaves the name of the caller's API key."""
_OPEN = frozenset({"/health", "/metrics"})
_COUNTED = frozenset({"/tokenize", "/detokenize"})
"""Paths that this process answers by itself, at the cost of its own CPU."""
_SERVED = frozenset({CHAT, COMPLETIONS, RESPONSES, "/v1/models", *_COUNTED, "/version", "/openapi.json", *_OPEN})
_POSTED = frozenset({CHAT, COMPLETIONS, RESPONSES, *_COUNTED})
_READS = ("GET", "HEAD", "OPTIONS")
_WRITES = ("POST", "DELETE")
_OF_TEXT = ": this server generates text, and nothing else"
_OF_FILES = ": `l4queue enqueue --jsonl` runs a file of requests"
_ELSEWHERE = {
    **dict.fromkeys(("/v1/embeddings", "/v1/images", "/v1/audio", "/v1/moderations"), _OF_TEXT),
    **dict.fromkeys(("/v1/files", "/v1/batches"), _OF_FILES),
}
"""What else there is about a path that is not served, by its first two parts."""
MAX_BODY_BYTES = 64 * 2**20  # of a request; chosen: four times the longest prompt
_SSE = b"text/event-stream"


@dataclass(frozen=True, kw_only=True)
class DoorParts:
    """The parts of a door, which it finds as `door` in the state of its application.

    `fields` has the known fields of each path that generates. With `has_files` files and batches are served.
    """

    keys: ApiKeys
    limiter: Limiter
    serving: ServingCheck
    client: AsyncClient
    fields: Mapping[str, BodyFields]
    metrics: DoorMetrics
    has_files: bool = False


class Door:
    """Lets requests in to vLLM's application, which makes it from its name among `--middleware`."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection of ASGI."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        parts: DoorParts = scope["app"].state.door
        path = str(scope.get("path", ""))
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope.get("headers", ())}
        caller = _caller(parts.keys, scope, path, headers)
        refusal = None
        if scope["type"] != "http" or not is_served(path, has_files=parts.has_files):
            refusal = HttpRefusal(status=HTTPStatus.NOT_FOUND, message=f"{path} is not served{_elsewhere(path)}")
        elif caller is None:
            told = "send a known key that has not expired: Authorization: Bearer KEY"
            refusal = HttpRefusal(status=HTTPStatus.UNAUTHORIZED, message=told)
            parts.metrics.refused(caller="", reason=refusal.reason)
        if refusal is not None:
            await (_refuse(send, refusal) if scope["type"] == "http" else send({"type": "websocket.close"}))
        elif scope["method"] not in (methods := _methods_of(path)):
            message = f"{path} takes {methods[0]}, not {scope['method']}"
            refusal = HttpRefusal(status=HTTPStatus.METHOD_NOT_ALLOWED, message=message, allow=methods[0])
            await _refuse(send, refusal)
        elif scope["method"] == "POST" and path in parts.fields:
            asked = _Told(headers=headers, path=path, caller=caller or "")
            await self._generate(parts, asked, scope, receive, send)
        elif scope["method"] == "POST" and path in _COUNTED:
            await self._count(parts, caller or "", scope, receive, send)
        else:
            await self._app({**scope, CALLER: caller}, receive, send)

    async def _count(self, parts: DoorParts, caller: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve what this process computes by itself: it counts as a request, and against no other limit."""
        try:
            headers = _encoded(await parts.limiter.count(caller))
        except OverLimit as error:
            parts.metrics.refused(caller=caller, reason=error.refusal.reason)
            await _refuse(send, error.refusal, headers=_encoded(error.headers))
            return

        async def send_headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        await self._app({**scope, CALLER: caller}, receive, send_headed)

    async def _generate(self, parts: DoorParts, told: _Told, scope: Scope, receive: Receive, send: Send) -> None:
        if HALF_HEADER in told.headers:  # computes nothing that would be measured
            await self._exchange(parts, told, scope, receive, send)
            return
        with parts.metrics.exchange(path=told.path, caller=told.caller) as measured:
            try:
                await self._exchange(parts, told, scope, receive, measured.watched(send), measured)
            finally:
                measured.ended()

    async def _exchange(
        self,
        parts: DoorParts,
        told: _Told,
        scope: Scope,
        receive: Receive,
        send: Send,
        measured: MeasuredExchange | None = None,
    ) -> None:
        try:
            data = await _read(receive)
            body = _object_of(data)
            check_fields(told.path, body, parts.fields[told.path])
            exchange = begin(told.headers, body, caller=told.caller)
            if measured is not None:
                measured.exchange = exchange
            if told.path == RESPONSES:
                data = _with_id(body, told.headers.get("x-request-id") or exchange.base)
            if exchange.half is None:
                await parts.serving.check()
            await _check_resumed(exchange, told.path, parts.client)
        except L4QueueError as error:
            await _refuse(send, refusal_of(error))
            return
        headed = [*scope["headers"]]
        if "x-request-id" not in told.headers and body.get("request_id") is None:
            headed.append((b"x-request-id", exchange.base.encode()))
        token = CURRENT.set(exchange)
        try:
            answer = _Answer(send, exchange)
            await self._app({**scope, "headers": headed}, body_first(data, receive), answer.send)
        finally:
            CURRENT.reset(token)


@dataclass(frozen=True, kw_only=True)
class _Told:
    """What a request says beside its body."""

    headers: dict[str, str]
    path: str
    caller: str


async def _check_resumed(exchange: Exchange, path: str, client: AsyncClient) -> None:
    """A stream goes on only where its request is still known: another one would say something else."""
    if exchange.after is None:
        return
    if path == RESPONSES:
        raise InvalidRequest("is not offered for responses", field="Last-Event-ID")
    await client.get(exchange.base)


class _Answer:
    """The answer to one request on its way out."""

    def __init__(self, send: Send, exchange: Exchange) -> None:
        self._send = send
        self._exchange = exchange
        self._start: Message | None = None
        self._is_replaced = False
        self._is_stream = False

    async def send(self, message: Message) -> None:
        """Hold back the beginning until the first bytes, then number the events."""
        if self._is_replaced:
            return
        if message["type"] == "http.response.start":
            self._start = message
            return
        if self._start is not None:
            start, self._start = self._start, None
            if self._exchange.asked is not None:
                self._is_replaced = True
                await _send_json(self._send, HTTPStatus.OK, _request_of(self._exchange.asked))
                return
            if self._exchange.refusal is not None:
                self._is_replaced = True
                await _refuse(self._send, self._exchange.refusal, headers=self._headers())
                return
            self._is_stream = any(name == b"content-type" and _SSE in value for name, value in start["headers"])
            await self._send({**start, "headers": [*start["headers"], *self._headers()]})
        body = message.get("body", b"")
        if self._is_stream and body and not body.startswith(b":"):
            message = {**message, "body": self._numbered(body)}
        await self._send(message)

    def _numbered(self, body: bytes) -> bytes:
        """The event, with its id for who may come back; nothing of what the client has already."""
        if not self._exchange.has_event_ids:
            return body
        event_id = self._exchange.next_event(_output_of(body) if self._exchange.has_several_prompts else None)
        if event_id is None:
            return b""
        return f"id: {event_id}\n".encode() + body

    def _headers(self) -> list[tuple[bytes, bytes]]:
        ids = ",".join(self._exchange.request_ids[number] for number in sorted(self._exchange.request_ids))
        told = [(b"x-l4-request-id", ids.encode())] if ids else []
        return told + _encoded(self._exchange.limit_headers)


def _output_of(body: bytes) -> int | None:
    """The output of which an event tells; None where it tells of none."""
    data = body.removeprefix(b"data: ")
    choices = json.loads(data).get("choices") if data.startswith(b"{") else None
    return choices[0]["index"] if choices else None


def _caller(keys: ApiKeys, scope: Scope, path: str, headers: Mapping[str, str]) -> str | None:
    """Whose request it is; "" on open paths and of this gateway's own batches. None: without a known key."""
    if path in _OPEN:
        return ""
    return str(scope[CALLER]) if CALLER in scope else keys.caller(headers.get("authorization", ""))


def _elsewhere(path: str) -> str:
    if path in ("/", "/v1") or f"/v1{path}" in _SERVED:
        return ": clients take the base_url that ends with /v1, and add a path to it"
    return _ELSEWHERE.get("/".join(path.split("/")[:3]), "")


def _methods_of(path: str) -> tuple[str, ...]:
    """Methods that are let in, the usual one first; routes of files and batches refuse theirs by themselves."""
    if _is_of_files(path):
        return _READS + _WRITES
    return ("POST", "OPTIONS") if path in _POSTED else _READS


def _is_of_files(path: str) -> bool:
    return path in (FILES, BATCHES) or path.startswith((FILES + "/", BATCHES + "/"))


def is_served(path: str, *, has_files: bool) -> bool:
    """Whether requests for a path come in."""
    return path in _SERVED or path.startswith("/v1/models/") or (has_files and _is_of_files(path))


def _object_of(data: bytes) -> dict[str, Any]:
    """The body; an empty one for what vLLM's server is to refuse. InvalidRequest for what it does not word."""
    try:
        found = json.loads(data)
    except RecursionError:
        raise InvalidRequest("is nested too deeply", field="body") from None
    except UnicodeDecodeError:
        raise InvalidRequest("is not UTF-8", field="body") from None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _with_id(body: Mapping[str, Any], base: str) -> bytes:
    """The body of a response with the id of its answer, which vLLM's server would draw at random."""
    return json.dumps({"request_id": RESPONSE_PREFIX + base, **body}).encode()


async def _read(receive: Receive) -> bytes:
    parts, size_bytes = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise InvalidRequest("ended before its end", field="body")
        parts.append(message.get("body", b""))
        size_bytes += len(parts[-1])
        if size_bytes > MAX_BODY_BYTES:
            raise InvalidRequest(f"has more than {MAX_BODY_BYTES} bytes", field="body")
        if not message.get("more_body", False):
            return b"".join(parts)


def body_first(data: bytes, receive: Receive) -> Receive:
    """A body in one piece, then what else comes: the end of the connection."""
    is_given = False

    async def give() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": data, "more_body": False}

    return give


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]


async def _refuse(send: Send, refusal: HttpRefusal, *, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    await _send_json(send, refusal.status, refusal.body, headers=[*_encoded(refusal.headers), *(headers or ())])


async def _send_json(
    send: Send, status: HTTPStatus, value: Mapping[str, Any], *, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    body = json.dumps(value).encode()
    told = [*headers, (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": int(status), "headers": told})
    await send({"type": "http.response.body", "body": body})


def _request_of(spec: RequestSpec) -> dict[str, Any]:
    """A request as JSON, as `RequestSpec` reads it."""
    return spec.model_dump(mode="json", exclude_defaults=True)
