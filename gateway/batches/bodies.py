"""Bodies and queries of requests for files and batches, checked; InvalidRequest names the field at fault."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from l4queue.client.batch.lines import CHAT_URL, COMPLETIONS_URL, RESPONSES_URL
from l4queue.errors import InvalidRequest
from l4queue.validation import first_fault

__all__ = ("ENDPOINTS", "PURPOSE", "BatchBody", "BatchPage", "ExpiresAfter", "FilePage", "parsed", "window_s")

ENDPOINTS = (CHAT_URL, COMPLETIONS_URL, RESPONSES_URL)
PURPOSE = "batch"
_WINDOW = re.compile(r"(?P<number>[1-9]\d{0,5})(?P<unit>[smhd])")
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_MAX_WINDOW_S = 7 * 86_400  # as long as an answer waits to be collected
B = TypeVar("B", bound=BaseModel)


class ExpiresAfter(BaseModel):
    """When a file expires, s after it was made."""

    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"] = "created_at"
    seconds: int = Field(ge=3600, le=2_592_000)


_Key = Annotated[str, StringConstraints(max_length=64)]
_Value = Annotated[str, StringConstraints(max_length=512)]


class BatchBody(BaseModel):
    """The body that begins a batch."""

    model_config = ConfigDict(extra="forbid")

    input_file_id: str = Field(max_length=128)
    endpoint: str
    completion_window: str
    metadata: Annotated[dict[_Key, _Value], Field(max_length=16)] | None = None
    output_expires_after: ExpiresAfter | None = None


class BatchPage(BaseModel):
    """The query of a list of batches."""

    model_config = ConfigDict(extra="forbid")

    after: str | None = Field(None, max_length=128)
    limit: int = Field(20, ge=1, le=100)


class FilePage(BaseModel):
    """The query of a list of files."""

    model_config = ConfigDict(extra="forbid")

    after: str | None = Field(None, max_length=128)
    limit: int = Field(10_000, ge=1, le=10_000)
    order: Literal["asc", "desc"] = "desc"
    purpose: str | None = None


def parsed(kind: type[B], given: Mapping[str, Any]) -> B:
    """A body or query. InvalidRequest names its first field at fault."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        place, told = first_fault(error)
        raise InvalidRequest(told, field=".".join(map(str, place)) or "body") from None


def window_s(text: str) -> int:
    """The length of a completion window such as 24h, s."""
    found = _WINDOW.fullmatch(text)
    length_s = int(found["number"]) * _UNITS_S[found["unit"]] if found else 0
    if not 1 <= length_s <= _MAX_WINDOW_S:
        raise InvalidRequest("must be a time such as 24h, of s, m, h or d, at most 7d", field="completion_window")
    return length_s
