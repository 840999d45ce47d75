"""Options of a request, typed for editors and type checkers. The values are checked by `SamplingParams`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from typing import Any, Protocol, SupportsFloat, SupportsIndex, TypeAlias, TypedDict, TypeVar

from l4queue.models import ChatMessage
from l4queue.sampling import SamplingParams, StructuredOutputs

__all__ = (
    "EnqueueOptions",
    "Messages",
    "Params",
    "RequestFields",
    "SamplingOptions",
    "TokenIds",
    "with_options",
)

F = TypeVar("F", bound=Callable[..., Any])


class Array(Protocol):
    """An array of numpy, `array`, pandas or torch."""

    def tolist(self) -> Any:
        """Its contents as a list."""


Whole: TypeAlias = int | SupportsIndex
"""A whole number: Python's, or numpy's."""
Number: TypeAlias = float | SupportsFloat
"""A finite number."""
TokenIds: TypeAlias = Sequence[Whole] | Array
"""Ids of the model's vocabulary: a list, tuple, range or array."""
Messages: TypeAlias = Sequence[Mapping[str, Any] | ChatMessage]
"""A chat: `{"role": "user", "content": "..."}` for each message; the content is a text or a list of text parts."""


class SamplingOptions(TypedDict, total=False):
    """How to generate, under vLLM's names. None is the same as left out: the default."""

    max_tokens: Whole | None
    """Most tokens to generate, 1 to 1,000,000. Default: all that still fits the model."""
    min_tokens: Whole | None
    """Tokens before any end of sequence or stop. Default 0."""
    temperature: Number | None
    """0 is greedy, at most 2. Default 1."""
    top_p: Number | None
    """Share of probability to sample from, above 0, at most 1. Default 1."""
    top_k: Whole | None
    """Number of most probable tokens to sample from; 0 or -1 is every token. Default 0."""
    min_p: Number | None
    """Least probability, as a share of the most probable token's, 0 to 1. Default 0."""
    seed: Whole | None
    """Makes sampling repeatable: 64 bits, signed; -1 is none. Default: none."""
    stop: str | Sequence[str] | Array | None
    """One text, or up to 16 of at most 256 characters, that end the output. Default: none."""
    stop_token_ids: TokenIds | None
    """Up to 64 token ids that end the output. Default: none."""
    ignore_eos: bool | None
    """Whether the end of sequence is a token like any other. Default False."""
    presence_penalty: Number | None
    """-2 to 2. Default 0. A request with a penalty streams nothing before its end."""
    frequency_penalty: Number | None
    """-2 to 2. Default 0."""
    repetition_penalty: Number | None
    """Above 0. Default 1, which is none."""
    logprobs: Whole | None
    """Number of most probable tokens to tell beside each generated one, 0 to 20. Default: no logprobs."""
    structured_outputs: StructuredOutputs | dict[str, Any] | None
    """One of `json` (a schema), `regex`, `choice` that the output matches. Default: none."""
    logit_bias: Mapping[Any, Number] | None
    """Added to the logits of these token ids, -100 to 100 each. Default: none."""
    allowed_token_ids: TokenIds | None
    """The only token ids that may be generated. Default: all."""
    bad_words: str | Sequence[str] | Array | None
    """Up to 256 texts that are never generated. Default: none."""
    skip_special_tokens: bool | None
    """Whether special tokens give no text. Default True."""


class EnqueueOptions(SamplingOptions, total=False):
    """All options of a request beside its prompt."""

    priority: Whole | None
    """-100 to 100, lower is served first. Default 0; from 100 on it is background."""
    deadline_s: Number | None
    """Seconds from acceptance until the request expires, at most 30 days. Default: never."""
    idempotency_key: str | None
    """Same key, same request: 1 to 512 characters. Default: none, each call makes a request."""
    metadata: dict[str, Any] | None
    """Comes back with the result: at most 65,536 bytes as JSON. Default: none."""
    traceparent: str | None
    """W3C trace context of the caller. Default: that of the current OpenTelemetry span, if traces are on."""


Params: TypeAlias = SamplingParams | SamplingOptions
"""Sampling parameters in one value; single options beside it count more."""


class RequestFields(EnqueueOptions, total=False):
    """One request of `enqueue_many` as a dictionary: one of `prompt`, `messages`, `token_ids`, and options."""

    prompt: str
    messages: Messages
    token_ids: TokenIds
    params: Params


def with_options(method: F) -> F:
    """`enqueue` with each option in the signature that `help` and notebooks show."""
    shown = signature(method)
    prompts = RequestFields.__annotations__.keys() - EnqueueOptions.__annotations__.keys()
    names = sorted(RequestFields.__annotations__, key=lambda name: name not in prompts)  # stable
    first = [parameter for parameter in shown.parameters.values() if parameter.kind is not Parameter.VAR_KEYWORD]
    taken = {parameter.name for parameter in first}
    options = [
        Parameter(
            name, Parameter.KEYWORD_ONLY, default=None, annotation=_text_of(RequestFields.__annotations__[name])
        )
        for name in names
        if name not in taken
    ]
    method.__signature__ = shown.replace(parameters=[*first, *options])  # type: ignore[attr-defined]
    return method


def _text_of(annotation: object) -> str:
    return str(getattr(annotation, "__forward_arg__", annotation))
