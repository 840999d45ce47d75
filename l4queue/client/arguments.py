"""Arguments of callers: checked, or refused with the field that is wrong. Does no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from l4queue.errors import InvalidRequest, UnknownRequest
from l4queue.models import RequestSpec, SamplingParams
from l4queue.sampling import NOT_OFFERED
from l4queue.strict_json import JsonError, check_text

__all__ = ("build_spec", "checked_count", "checked_id", "checked_text", "printable", "spec_of")

_SPEC_FIELDS = frozenset(RequestSpec.model_fields) - {"params"}
_MAX_ID_CHARS, _MAX_NAME_CHARS = 512, 200  # of an id; of a name shown in an error
_MAX_COUNT = 1_000_000  # entries that a caller may ask for; more would not fit one reply


def build_spec(prompt: str | None = None, **options: Any) -> RequestSpec:
    """One validated request from keyword arguments; InvalidRequest names the first bad one.

    Sampling parameters (`SamplingParams`) and request fields (`RequestSpec`) share one flat namespace.
    """
    fields: dict[str, Any] = {"prompt": prompt} if prompt is not None else {}
    sampling: dict[str, Any] = {}
    for name, value in options.items():
        if name in _SPEC_FIELDS:
            if value is not None:
                fields[name] = value
        elif name in SamplingParams.model_fields:
            if value is not None:
                sampling[name] = value
        else:
            raise InvalidRequest(NOT_OFFERED.get(name, "unknown parameter"), field=printable(name))
    try:
        params = SamplingParams.model_validate(sampling)
        return RequestSpec.model_validate({**fields, "params": params})
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> InvalidRequest:
    """The first of the errors, by the names of the caller."""
    first = error.errors(include_url=False, include_input=False)[0]
    location = ".".join(str(part) for part in first["loc"]) or "request"
    return InvalidRequest(first["msg"].removeprefix("Value error, "), field=printable(location))


def spec_of(request: str | dict[str, Any] | RequestSpec, common: Mapping[str, Any]) -> RequestSpec:
    """The request that an element of `enqueue_many` stands for.

    A RequestSpec is checked again: `model_construct`, `model_copy` and its own dictionaries change it unchecked.
    """
    if isinstance(request, RequestSpec):
        given = {name: value for name, value in vars(request).items() if name in RequestSpec.model_fields}
        try:
            return RequestSpec.model_validate(given)
        except ValidationError as error:
            raise _refusal(error) from None
    if isinstance(request, str):
        return build_spec(**{**common, "prompt": request})
    if not isinstance(request, dict) or not all(isinstance(name, str) for name in request):
        raise InvalidRequest("must be a prompt, a dictionary of arguments or a RequestSpec", field="request")
    return build_spec(**{**common, **request})


def checked_text(value: object, *, field: str, most_chars: int) -> str:
    """A text from a caller that can be stored; InvalidRequest names what is wrong with it."""
    if not isinstance(value, str):
        raise InvalidRequest("must be a text", field=field)
    if len(value) > most_chars:
        raise InvalidRequest(f"has {len(value)} characters; at most {most_chars} are accepted", field=field)
    try:
        check_text(value)
    except JsonError as error:
        raise InvalidRequest(str(error), field=field) from None
    return value


def checked_count(count: object) -> int:
    """How many entries to read at most; InvalidRequest for what is no such number."""
    if type(count) is not int or not 0 <= count <= _MAX_COUNT:
        raise InvalidRequest(f"must be a whole number in [0, {_MAX_COUNT}]", field="count")
    return count


def checked_id(request_id: object) -> str:
    """An id as there may be one; UnknownRequest for what never was one."""
    try:
        return checked_text(request_id, field="request_id", most_chars=_MAX_ID_CHARS)
    except InvalidRequest as error:
        raise UnknownRequest(f"no such request: {error}") from None


def printable(name: str) -> str:
    """A name that a caller wrote, as an error can tell it: in one line, of bounded length, in valid Unicode."""
    return name.encode("utf-8", "backslashreplace").decode()[:_MAX_NAME_CHARS] or "''"
