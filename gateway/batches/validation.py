"""Validation of a batch's input: mistakes that fail a whole batch, as in OpenAI's API. Others fail a line."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from l4queue.client.batch.files import InputFile
from l4queue.client.batch.index import LineIndex, LineState
from l4queue.client.batch.lines import object_of
from l4queue.errors import InvalidRequest

__all__ = ("InputError", "Validated", "validate")

_MAX_ERRORS = 100  # told; chosen: enough to see the pattern
_REQUIRED = ("method", "url", "body")


@dataclass(frozen=True, slots=True, kw_only=True)
class InputError:
    """A mistake in the input: OpenAI's code, message, field and line, from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """As the `errors` of a batch have it."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated:
    """Requests of an input, and the first mistakes in it."""

    num_lines: int
    errors: tuple[InputError, ...]


def validate(lines: InputFile, *, endpoint: str) -> Validated:
    """Read an input once. Each line must be a request to this endpoint under a custom_id of its own."""
    index = LineIndex()
    errors: list[InputError] = []
    for line in lines.lines():
        if not line.data.strip():
            index.add(None, is_empty=True)
            continue
        try:
            found = object_of(line.data)
        except InvalidRequest as error:
            index.add(None)
            is_json = error.field != "line"
            code = "missing_required_parameter" if is_json else "invalid_json_line"
            mistake: InputError | None = InputError(
                code=code, message=str(error), param=error.field if is_json else None, line=line.number
            )
        else:
            index.add(found.custom_id)
            mistake = _mistake(found.fields, endpoint, number=line.number)
        if mistake is not None and len(errors) < _MAX_ERRORS:
            errors.append(mistake)
    index.resolve()
    errors += _duplicates(index)
    num_lines = len(index) - index.count(LineState.EMPTY)
    if not num_lines:
        errors.append(InputError(code="empty_file", message="the input file has no request"))
    errors.sort(key=lambda error: error.line or 0)
    return Validated(num_lines=num_lines, errors=tuple(errors[:_MAX_ERRORS]))


def _mistake(fields: dict[str, Any], endpoint: str, *, number: int) -> InputError | None:
    for name in _REQUIRED:
        if fields.get(name) is None:
            return InputError(
                code="missing_required_parameter", message=f"{name} is missing", param=name, line=number
            )
    if fields["method"] != "POST":
        return InputError(code="invalid_method", message="method must be POST", param="method", line=number)
    if fields["url"] != endpoint:
        told = f"url must be {endpoint}, the endpoint of the batch"
        return InputError(code="invalid_url", message=told, param="url", line=number)
    if not isinstance(fields["body"], dict):
        return InputError(code="invalid_type", message="body must be an object", param="body", line=number)
    return None


def _duplicates(index: LineIndex) -> list[InputError]:
    found: list[InputError] = []
    for number in range(1, len(index) + 1):
        if len(found) == _MAX_ERRORS:
            break
        if index.state(number) is LineState.DUPLICATE:
            told = f"line {index.first_of(number)} has this custom_id already"
            found.append(InputError(code="duplicate_custom_id", message=told, param="custom_id", line=number))
    return found
