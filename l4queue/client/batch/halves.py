"""Halves of an exchange with a gateway: the request that a body asks for, and the answer that its output makes.

Templates and parsers of chats are vLLM's, which a client does not have. A gateway writes such a request,
the batch enqueues it like any other, and the gateway makes the body of its answer.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import StrEnum
from http import HTTPStatus
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from pydantic import ValidationError

from l4queue.errors import ConfigError, InvalidRequest, ServiceUnavailable
from l4queue.json_lines import json_line
from l4queue.models import RequestSpec

__all__ = ("HALF_HEADER", "ID_HEADER", "Half", "Halves", "HttpHalves", "checked_gateway")

HALF_HEADER, ID_HEADER = "x-l4-half", "x-l4-request-id"
_TIMEOUT_S = 60.0  # of one half; chosen: the longest prompt takes a second
_LATER = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE)


class Half(StrEnum):
    """The half that is wanted: the request is not enqueued, or the output of one that was is made an answer."""

    REQUEST = "request"
    ANSWER = "answer"


class Halves(ABC):
    """A gateway that writes requests and makes answers of their outputs."""

    writes_all = False
    """Whether every request goes through the gateway, and not only one that a batch cannot write."""

    @abstractmethod
    def call(self, url: str, headers: Mapping[str, str], body: bytes) -> tuple[int, bytes]:
        """Post a body to this path; status and body of the answer. ServiceUnavailable where there is none."""

    def write(self, url: str, body: Mapping[str, Any]) -> RequestSpec:
        """The request that a body asks for.

        InvalidRequest names the field at fault; ServiceUnavailable where trying again may help, ConfigError where
        it will not.
        """
        told = self._post(url, {HALF_HEADER: Half.REQUEST}, body)
        try:
            return RequestSpec.model_validate(told)
        except ValidationError as error:
            raise ConfigError(f"the gateway's answer is no request: {error}") from None

    def answer(self, url: str, body: Mapping[str, Any], *, request_id: str) -> dict[str, Any]:
        """The body of the answer to a request that is done; errors as for `write`."""
        return self._post(url, {HALF_HEADER: Half.ANSWER, ID_HEADER: request_id}, body)

    def _post(self, url: str, headers: Mapping[str, str], body: Mapping[str, Any]) -> dict[str, Any]:
        status, data = self.call(url, headers, json_line(dict(body)).encode())
        try:
            told = json.loads(data)
        except ValueError:
            told = None
        if status == HTTPStatus.OK and isinstance(told, dict):
            return told
        error = told.get("error") if isinstance(told, dict) else None
        message = str(error.get("message")) if isinstance(error, dict) else ""
        if isinstance(error, dict) and status in (HTTPStatus.BAD_REQUEST, HTTPStatus.INTERNAL_SERVER_ERROR):
            field = str(error.get("param") or "body")
            raise InvalidRequest(message.removeprefix(f"{field}: "), field=field)
        has_expired = status == HTTPStatus.NOT_FOUND and ID_HEADER in headers
        if status in _LATER or has_expired:
            raise ServiceUnavailable(f"the gateway refuses for now: {message or status}")
        raise ConfigError(f"the gateway answers {status}: {message or 'is it an `l4queue serve`?'}")


class HttpHalves(Halves):
    """The same of a gateway elsewhere: its address, as `checked_gateway` has it, and the API key for it."""

    writes_all = True

    def __init__(self, url: str, *, key: str) -> None:
        self._url = url
        self._key = key

    def call(self, url: str, headers: Mapping[str, str], body: bytes) -> tuple[int, bytes]:
        """See `Halves.call`."""
        told = {"content-type": "application/json", **headers}
        if self._key:
            told["authorization"] = f"Bearer {self._key}"
        request = Request(self._url + url, data=body, headers=told, method="POST")
        try:
            with urlopen(request, timeout=_TIMEOUT_S) as answer:
                return answer.status, answer.read()
        except HTTPError as error:
            return error.code, error.read()
        except (URLError, HTTPException, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise ServiceUnavailable(f"the gateway at {self._url} does not answer: {reason}") from None


def checked_gateway(url: object) -> str:
    """The address of a gateway without its path; InvalidRequest where it is none."""
    found = urlsplit(url) if isinstance(url, str) else None
    if found is None or found.scheme not in ("http", "https") or not found.hostname:
        raise InvalidRequest("must be the address of a gateway, as http://127.0.0.1:8000", field="gateway")
    return f"{found.scheme}://{found.netloc}{found.path.rstrip('/').removesuffix('/v1')}"
