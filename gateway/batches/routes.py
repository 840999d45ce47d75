"""Routes of /v1/files and /v1/batches. The door has let the caller in; its name is in the scope."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from http import HTTPStatus
from typing import Any, BinaryIO

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from gateway.batches.bodies import PURPOSE, BatchBody, BatchPage, ExpiresAfter, FilePage, parsed
from gateway.batches.catalogue import Catalogue
from gateway.door import BATCHES, CALLER, FILES
from gateway.refusals import HttpRefused, refusal_of
from l4queue.errors import InvalidRequest, L4QueueError

__all__ = ("build_routes",)

_REFERENCE = "#/paths/~1v1~1batches/post/requestBody/content/application~1json/schema/$defs/{model}"
_MAX_BODY_BYTES = 2**20  # of a JSON body; chosen: ids and metadata take some kB
_FORM_BYTES = 2**16  # of a form beside its file
_MAX_FIELDS = 16  # of such a form
_MAX_NAME_CHARS = 255  # of a file's name
_READ_BYTES = 2**20  # of one read of an upload

Handler = Callable[[Request], Awaitable[Response]]


def build_routes(catalogue: Catalogue, *, max_file_bytes: int) -> APIRouter:
    """The routes, for the application of vLLM's server."""
    on, router = _Handlers(catalogue, max_file_bytes=max_file_bytes), APIRouter(tags=["batches"])
    routes: tuple[tuple[str, str, Handler], ...] = (
        ("POST", FILES, on.create_file),
        ("GET", FILES, on.list_files),
        ("GET", FILES + "/{file_id}", on.show_file),
        ("GET", FILES + "/{file_id}/content", on.file_content),
        ("DELETE", FILES + "/{file_id}", on.delete_file),
        ("POST", BATCHES, on.create_batch),
        ("GET", BATCHES, on.list_batches),
        ("GET", BATCHES + "/{batch_id}", on.show_batch),
        ("POST", BATCHES + "/{batch_id}/cancel", on.cancel_batch),
    )
    for method, path, handler in routes:
        name = handler.__name__
        router.add_api_route(path, _refusing(handler), methods=[method], name=name, openapi_extra=_described(name))
    return router


class _Handlers:
    """What each route does."""

    def __init__(self, catalogue: Catalogue, *, max_file_bytes: int) -> None:
        self._catalogue = catalogue
        self._max_file_bytes = max_file_bytes

    async def create_file(self, request: Request) -> Response:
        most = self._max_file_bytes
        async with _bounded(request, most + _FORM_BYTES).form(max_files=1, max_fields=_MAX_FIELDS) as form:
            upload, fields = form.get("file"), {n: v for n, v in form.items() if isinstance(v, str)}
            if not isinstance(upload, UploadFile):
                raise InvalidRequest("must be a file of a multipart form", field="file")
            if fields.get("purpose") != PURPOSE:
                raise InvalidRequest(f"must be {PURPOSE}", field="purpose")
            if (upload.size or 0) > most:
                told = f"has {upload.size} bytes; at most {most} are taken (L4_HTTP_FILE_MAX_BYTES)"
                raise HttpRefused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, told, field="file")
            name = (upload.filename or "file")[-_MAX_NAME_CHARS:]
            made = self._catalogue.add_file(
                _caller(request), name, PURPOSE, _chunks(upload.file), _expires_after(fields)
            )
            return JSONResponse(await made)

    async def list_files(self, request: Request) -> Response:
        asked = parsed(FilePage, dict(request.query_params))
        return JSONResponse(await self._catalogue.files(_caller(request), asked))

    async def show_file(self, request: Request) -> Response:
        return JSONResponse(await self._catalogue.file(_caller(request), request.path_params["file_id"]))

    async def file_content(self, request: Request) -> Response:
        record, chunks = await self._catalogue.content(_caller(request), request.path_params["file_id"])
        headers = {"content-length": str(record.num_bytes)}
        return StreamingResponse(chunks, media_type="application/octet-stream", headers=headers)

    async def delete_file(self, request: Request) -> Response:
        return JSONResponse(await self._catalogue.delete_file(_caller(request), request.path_params["file_id"]))

    async def create_batch(self, request: Request) -> Response:
        try:
            given = json.loads(await _bounded(request, _MAX_BODY_BYTES).body())
        except ValueError:
            raise InvalidRequest("must be JSON", field="body") from None
        if not isinstance(given, dict):
            raise InvalidRequest("must be an object", field="body")
        return JSONResponse(await self._catalogue.begin_batch(_caller(request), parsed(BatchBody, given)))

    async def list_batches(self, request: Request) -> Response:
        asked = parsed(BatchPage, dict(request.query_params))
        return JSONResponse(await self._catalogue.batches(_caller(request), asked))

    async def show_batch(self, request: Request) -> Response:
        return JSONResponse(await self._catalogue.batch(_caller(request), request.path_params["batch_id"]))

    async def cancel_batch(self, request: Request) -> Response:
        found = await self._catalogue.cancel_batch(_caller(request), request.path_params["batch_id"])
        return JSONResponse(found)


def _described(name: str) -> dict[str, Any] | None:
    """The body of a request as /openapi.json tells it."""
    if name == "create_batch":
        schema: dict[str, Any] = BatchBody.model_json_schema(ref_template=_REFERENCE)
        content = {"application/json": {"schema": schema}}
    elif name == "create_file":
        properties = {
            "file": {"type": "string", "format": "binary"},
            "purpose": {"type": "string", "enum": [PURPOSE]},
        }
        form = {"type": "object", "required": list(properties), "properties": properties}
        content = {"multipart/form-data": {"schema": form}}
    else:
        return None
    return {"requestBody": {"required": True, "content": content}}


def _refusing(handler: Handler) -> Handler:
    """The handler whose errors are answers in OpenAI's form."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except L4QueueError as error:
            refusal = refusal_of(error)
            return JSONResponse(refusal.body, status_code=refusal.status, headers=refusal.headers)
        except HTTPException as error:  # of the parser of forms
            refusal = HttpRefused(HTTPStatus.BAD_REQUEST, str(error.detail)).refusal
            return JSONResponse(refusal.body, status_code=refusal.status)

    handle.__name__ = handler.__name__
    return handle


def _caller(request: Request) -> str:
    return str(request.scope.get(CALLER, ""))


def _bounded(request: Request, max_bytes: int) -> Request:
    """The same request, whose body is read up to a bound: 413 beyond it."""
    told = request.headers.get("content-length", "0")
    if told.isdecimal() and int(told) > max_bytes:
        raise _too_large(max_bytes)
    num_bytes = 0

    async def receive() -> MutableMapping[str, Any]:
        nonlocal num_bytes
        message = await request.receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
        return message

    return Request(request.scope, receive)


def _too_large(max_bytes: int) -> HttpRefused:
    return HttpRefused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body has more than {max_bytes} bytes")


def _expires_after(fields: dict[str, str]) -> ExpiresAfter | None:
    """As forms write it: expires_after[anchor], expires_after[seconds]."""
    given = {n[14:-1]: v for n, v in fields.items() if n.startswith("expires_after[") and n.endswith("]")}
    return parsed(ExpiresAfter, given) if given else None


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    file.seek(0)
    while chunk := file.read(_READ_BYTES):
        yield chunk
