"""Whether a request can run at all: its parameters, and the tokens that it may generate. Pure."""

from __future__ import annotations

from functools import lru_cache

from pydantic import ValidationError

from dispatcher.routing.tokenizer import Refusal
from l4queue.models import RequestBody
from l4queue.protocol.reads import InboxBody
from l4queue.sampling import DEFAULT_MAX_TOKENS, StructuredOutputs
from l4queue.validation import first_fault
from l4queue.value_class import value_class

__all__ = ("Fitted", "field_of", "fit", "read_body")

_SHORT_BYTES = 256  # of a body that is kept when it was read. Chosen: parameters fit, 1,024 of them are no memory


@value_class(kw_only=True)
class Fitted:
    """A request that the model can hold: most tokens to generate, and what admission counts for it.

    `body` is the one to store for the workers; empty: as submitted.
    """

    max_tokens: int
    charge_tokens: int
    body: str = ""


def read_body(data: bytes) -> RequestBody | Refusal:
    """Parameters, priority and metadata of a request, or the first field that is wrong."""
    return _read_short(data) if len(data) <= _SHORT_BYTES else _read(data)


@lru_cache(maxsize=1024)
def _read_short(data: bytes) -> RequestBody | Refusal:
    """Many requests have the same parameters: a short body is read once."""
    return _read(data)


def _read(data: bytes) -> RequestBody | Refusal:
    try:
        return RequestBody.model_validate_json(data)
    except ValidationError as invalid:
        place, told = first_fault(invalid)
        return Refusal(field=".".join(str(part) for part in place) or "body", error=told)


def field_of(given: StructuredOutputs) -> str:
    """The name of a constraint as its user wrote it."""
    return f"structured_outputs.{given.kind}"


def fit(
    wire: RequestBody, body: InboxBody, prompt_tokens: int, *, limit_tokens: int, vocabulary_size: int
) -> Fitted | Refusal:
    """How many tokens a request may generate, or why it cannot run.

    A left-out `max_tokens` is what the model still holds. It is written into the body, since every worker reads it
    there, those of the earlier release too. Admission counts the default for it: nearly all outputs end by
    themselves, and a backlog of rests would be full at once.
    """
    room_tokens, params = limit_tokens - prompt_tokens, wire.params
    if max(params.stop_token_ids, default=0) >= vocabulary_size:
        error = f"token id {max(params.stop_token_ids)} is outside the vocabulary of {vocabulary_size}"
        return Refusal(field="stop_token_ids", error=error)
    if room_tokens < 1:
        error = f"{prompt_tokens} prompt tokens leave no room in the model's {limit_tokens} tokens"
        return Refusal(field="prompt", error=error, reason="too_long")
    if params.max_tokens is None and body.has_open_end:
        wanted = params.tokens_that_fit(room_tokens)
        if params.min_tokens > wanted:
            error = f"min_tokens {params.min_tokens} exceeds the {wanted} tokens that still fit"
            return Refusal(field="min_tokens", error=error, reason="too_long")
        decided = wire.model_copy(update={"params": params.model_copy(update={"max_tokens": wanted})})
        charge_tokens = prompt_tokens + min(wanted, DEFAULT_MAX_TOKENS)
        stored = decided.model_dump_json(exclude_defaults=True)
        return Fitted(max_tokens=wanted, charge_tokens=charge_tokens, body=stored)
    wanted = params.max_tokens or DEFAULT_MAX_TOKENS
    if wanted > room_tokens:
        error = f"{prompt_tokens} prompt tokens and max_tokens {wanted} exceed the model's {limit_tokens} tokens"
        return Refusal(field="max_tokens", error=error, reason="too_long")
    return Fitted(max_tokens=wanted, charge_tokens=prompt_tokens + wanted)
