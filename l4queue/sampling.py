"""Sampling parameters under vLLM's names, strictly checked. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    field_validator,
    model_validator,
)

from l4queue.plain_values import plain_value, plain_values
from l4queue.strict_json import MAX_NESTING, JsonError, check_json, check_text, read_json, values_of

__all__ = (
    "DEFAULT_MAX_TOKENS",
    "LIST_AS_TUPLE",
    "NOT_OFFERED",
    "SamplingParams",
    "Strict",
    "StructuredOutputs",
)

NOT_OFFERED: Mapping[str, str] = MappingProxyType(
    {
        "n": "a request has one output: enqueue it n times, with a seed each if it has one",
        "best_of": "a request has one output: enqueue several with logprobs and keep the best",
        "use_beam_search": "beam search is not offered",
        "prompt_logprobs": "is not offered; logprobs of the generated tokens are",
        "echo": "is not offered: the client has the prompt",
        "guided_json": "is called structured_outputs={'json': ...}",
        "guided_regex": "is called structured_outputs={'regex': ...}",
        "guided_choice": "is called structured_outputs={'choice': [...]}",
        "response_format": "is called structured_outputs={'json': schema}",
        "max_new_tokens": "is called max_tokens",
        "min_new_tokens": "is called min_tokens",
        "do_sample": "is called temperature: 0 is greedy",
    }
)
"""Well-known parameters of other interfaces that are refused, with what to do instead."""
MAX_SCHEMA_CHARS = 65_536
"""Longest JSON schema, grammar or structural tag, characters. The dispatcher bounds the time to compile it."""
DEFAULT_MAX_TOKENS = 256
"""Meaning of a stored body without `max_tokens`: the earlier release leaves its default out. Admission, too,
counts it as the output of a request without `max_tokens`."""
MAX_TOKENS = 1_000_000
"""Most tokens that one request may generate: no model holds more."""
MAX_LOGPROBS = 2**20
"""Most logprobs of one request, (logprobs + 1) · max_tokens: 8 MiB in Redis."""
MAX_LISTED_IDS = 65_536
"""Most token ids in one `logit_bias` or `allowed_token_ids`: half a vocabulary, half a megabyte of JSON."""
LIST_AS_TUPLE = BeforeValidator(plain_value)
"""For fields that JSON, or a user, gives as a list or an array: strict checking would refuse it."""


def _bounded(least_chars: int, most_chars: int) -> Any:
    """Bounds of a text in a list, for the schema; a validator of the list says the error in our words."""
    return Field(json_schema_extra={"minLength": least_chars, "maxLength": most_chars})


def _texts(value: object) -> object:
    return (value,) if isinstance(value, str) else _ids(value)


def _ids(value: object) -> object:
    return () if value is None else plain_value(value)


def _biases(value: object) -> object:
    """By ascending id: JSON gives ids as texts, OpenAI's interface too, and equal requests are to look alike."""
    if not value:
        return None
    if not isinstance(value, dict):
        return value
    found: dict[object, object] = {}
    for token, bias in value.items():
        is_text = isinstance(token, str) and token.isascii() and token.isdigit() and len(token) <= 10
        is_whole = isinstance(bias, int) and not isinstance(bias, bool)
        found[int(token) if is_text else token] = float(bias) if is_whole else bias
    return dict(sorted(found.items())) if all(isinstance(token, int) for token in found) else found


class Strict(BaseModel):
    """Strict input: no coercion, no unknown fields, no NaN or infinity. Models in others are checked, too."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, revalidate_instances="always"
    )


class StructuredOutputs(Strict):
    """Form that the output must have: exactly one constraint.

    The kinds are those of vLLM's `StructuredOutputsParams`, under its names. Which schemas, expressions and
    grammars work is for the engine to say, before it computes anything.
    """

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    json_schema: dict[str, JsonValue] | str | None = Field(
        default=None,
        alias="json",
        description=f"JSON schema, object or text: at most {MAX_SCHEMA_CHARS} characters, {MAX_NESTING} levels",
    )
    regex: str | None = Field(default=None, min_length=1, max_length=4096, description="the whole output matches")
    choice: Annotated[tuple[Annotated[str, _bounded(1, 1000)], ...] | None, LIST_AS_TUPLE] = Field(
        default=None, min_length=1, max_length=1000, description="one of these"
    )
    grammar: str | None = Field(
        default=None, min_length=1, max_length=MAX_SCHEMA_CHARS, description="the whole output is derived from it"
    )
    structural_tag: str | None = Field(
        default=None,
        description=f"free text with constrained parts, object or text: at most {MAX_SCHEMA_CHARS} characters",
    )

    @field_validator("choice")
    @classmethod
    def _choices_are_texts(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and any(not 1 <= len(text) <= 1000 for text in value):
            raise ValueError("each choice must have 1 to 1000 characters")
        for text in value or ():
            _check_has_no_nul(text)
            check_text(text)
        return value

    @field_validator("regex", "grammar")
    @classmethod
    def _is_text(cls, value: str | None) -> str | None:
        if value is not None:
            _check_has_no_nul(value)
            check_text(value)
        return value

    @field_validator("json_schema", mode="before")
    @classmethod
    def _schema_is_an_object_of_bounded_size(cls, value: object) -> object:
        if value is None:
            return None
        if not isinstance(value, dict | str):
            raise ValueError("must be a JSON object, or its text")
        _check_schema(value, "a JSON schema")
        return value

    @field_validator("structural_tag", mode="before")
    @classmethod
    def _tag_is_the_text_of_an_object(cls, value: object) -> object:
        if value is None:
            return None
        if not isinstance(value, dict | str):
            raise ValueError("must be a JSON object, or its text")
        _check_schema(value, "a structural tag")
        return json.dumps(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _one_kind(self) -> StructuredOutputs:
        if sum(getattr(self, name) is not None for name in type(self).model_fields) != 1:
            raise ValueError("give exactly one of json, regex, choice, grammar, structural_tag")
        return self

    @property
    def kind(self) -> str:
        """The name of the constraint that is given, as its user writes it."""
        return next(
            field.alias or name
            for name, field in type(self).model_fields.items()
            if getattr(self, name) is not None
        )


class SamplingParams(Strict):
    """How to generate. Names, ranges and meanings are vLLM's; unknown names are refused."""

    max_tokens: int | None = Field(
        default=None, ge=1, le=MAX_TOKENS, description="most tokens to generate; left out: what still fits"
    )
    min_tokens: int = Field(
        default=0, ge=0, le=MAX_TOKENS, description="no end of sequence before this many tokens"
    )
    temperature: float = Field(default=1.0, ge=0.0, le=2.0, description="0 is greedy")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=-1, lt=2**31, description="0 or -1 considers every token")
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63, description="-1 is none")
    stop: Annotated[tuple[Annotated[str, _bounded(1, 256)], ...], BeforeValidator(_texts)] = Field(
        default=(), max_length=16, description="text that ends the output: one, or a list"
    )
    stop_token_ids: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], BeforeValidator(_ids)] = Field(
        default=(), max_length=64
    )
    ignore_eos: bool = False
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0)
    logprobs: int | None = Field(default=None, ge=0, le=20, description="of each token and of the N most probable")
    structured_outputs: StructuredOutputs | None = Field(default=None, description="what the output must match")
    logit_bias: Annotated[
        dict[Annotated[int, Field(ge=0, lt=2**31)], Annotated[float, Field(ge=-100.0, le=100.0)]] | None,
        BeforeValidator(_biases),
    ] = Field(default=None, max_length=MAX_LISTED_IDS, description="added to the logits of these token ids")
    allowed_token_ids: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] | None, BeforeValidator(lambda ids: _ids(ids) or None)
    ] = Field(default=None, max_length=MAX_LISTED_IDS, description="the only token ids that may be generated")
    bad_words: Annotated[tuple[Annotated[str, _bounded(1, 256)], ...], BeforeValidator(_texts)] = Field(
        default=(), max_length=256, description="texts whose last token is never generated after their others"
    )
    skip_special_tokens: bool = Field(default=True, description="whether special tokens give no text")

    @model_validator(mode="before")
    @classmethod
    def _what_is_not_offered_is_said(cls, values: object) -> object:
        for name in values if isinstance(values, dict) else ():
            if name in NOT_OFFERED:
                raise ValueError(f"{name}: {NOT_OFFERED[name]}")
        return plain_values(values)

    @field_validator("top_k")
    @classmethod
    def _every_token_is_0(cls, value: int) -> int:
        return max(0, value)  # one spelling on the wire: the earlier release knows no other

    @field_validator("seed")
    @classmethod
    def _no_seed_is_none(cls, value: int | None) -> int | None:
        return None if value == -1 else value

    @field_validator("stop", "bad_words")
    @classmethod
    def _texts_are_short(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if any(not text or len(text) > 256 for text in value):
            name = "stop string" if info.field_name == "stop" else "bad word"
            raise ValueError(f"each {name} must have 1 to 256 characters")
        for text in value:
            check_text(text)
        return value

    @model_validator(mode="after")
    def _min_within_max(self) -> SamplingParams:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}")
        return self

    @model_validator(mode="after")
    def _logprobs_are_bounded(self) -> SamplingParams:
        most = self._bound_tokens
        if self.max_tokens is not None and self.max_tokens > most:
            raise ValueError(f"logprobs {self.logprobs} of {self.max_tokens} max_tokens; at most of {most}")
        return self

    @model_validator(mode="after")
    def _a_constraint_says_the_end(self) -> SamplingParams:
        if self.structured_outputs is not None and (self.ignore_eos or self.min_tokens):
            raise ValueError("structured_outputs end by themselves: leave out ignore_eos and min_tokens")
        return self

    def tokens_that_fit(self, room_tokens: int) -> int:
        """The value of a left-out `max_tokens` in a model with this room: all that the bounds allow."""
        return min(room_tokens, self._bound_tokens)

    @property
    def _bound_tokens(self) -> int:
        return MAX_TOKENS if self.logprobs is None else min(MAX_TOKENS, MAX_LOGPROBS // (self.logprobs + 1))

    @property
    def is_pinned(self) -> bool:
        """Whether a resume by recompute would change what may be generated.

        Output penalties count generated tokens only, bad words are looked for in these, and a grammar begins with
        the first one; after a resume these are part of the prompt. Such a request is never handed over, streams
        nothing before its end and restarts from zero after a crash.
        """
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
            or self.structured_outputs is not None
            or bool(self.bad_words)
        )


def _check_schema(value: dict[Any, Any] | str, what: str) -> None:
    """ValueError unless it is an object, or the text of one, that every reader of JSON understands alike."""
    try:
        if isinstance(value, str) and len(value) > MAX_SCHEMA_CHARS:
            raise ValueError(f"has {len(value)} characters; at most {MAX_SCHEMA_CHARS} are accepted")
        schema = read_json(value) if isinstance(value, str) else value
        check_json(schema, max_bytes=4 * MAX_SCHEMA_CHARS)
    except JsonError as error:
        raise ValueError(f"cannot be {what}: {error}") from None
    if not isinstance(schema, dict):
        raise ValueError(f"must be a JSON object: {what}")
    if isinstance(value, dict) and len(json.dumps(value)) > MAX_SCHEMA_CHARS:
        raise ValueError(f"has more than {MAX_SCHEMA_CHARS} characters as JSON")
    for text in values_of(schema):
        if isinstance(text, str):
            _check_has_no_nul(text)


def _check_has_no_nul(text: str) -> None:
    """ValueError for what ends a text in the C++ of grammar compilers."""
    if "\x00" in text:
        raise ValueError("has a NUL character")
