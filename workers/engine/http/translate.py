"""Requests as `/v1/completions` of vLLM has them, and the events of its stream as ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from l4queue.protocol.records import CachedPrompt, TokenLogprobs
from l4queue.sampling import StructuredOutputs
from workers.engine.base import EngineOutput, EngineRequest, FinishReason

__all__ = ("BrokenEvent", "cached_of", "completion_body", "output_of", "refused")

_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "repetition": FinishReason.STOP,
    "abort": FinishReason.LOST,  # by the server: nobody here has asked for it
}
_PLACEHOLDER = "token_id:"


class BrokenEvent(ValueError):
    """An event of a stream is not what vLLM sends; says which part."""


def completion_body(request: EngineRequest, *, model: str) -> dict[str, Any]:
    """The body of a request. Whatever the server has defaults of its own for is said."""
    params = request.params
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(request.token_ids),
        "request_id": request.request_id,
        "priority": request.priority,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "max_tokens": request.max_tokens,
        "min_tokens": request.min_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "stop_token_ids": list(params.stop_token_ids),
        "ignore_eos": params.ignore_eos,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": params.repetition_penalty,
        "bad_words": list(params.bad_words),
    }
    if params.seed is not None:
        body["seed"] = params.seed
    if params.logprobs is not None:
        body |= {"logprobs": params.logprobs, "return_tokens_as_token_ids": True}
    if params.logit_bias is not None:
        body["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
    if params.allowed_token_ids is not None:
        body["allowed_token_ids"] = list(params.allowed_token_ids)
    if params.structured_outputs is not None:
        body["structured_outputs"] = _constraint(params.structured_outputs)
    return body


def _constraint(given: StructuredOutputs) -> dict[str, Any]:
    named = {"json": given.json_schema, "regex": given.regex, "choice": given.choice}
    return {name: list(v) if name == "choice" else v for name, v in named.items() if v is not None}


def output_of(request_id: str, event: Mapping[str, Any], *, num_top: int | None) -> EngineOutput | None:
    """What an event adds to a request; None where it adds nothing.

    BrokenEvent where it has no token ids, which must not be taken for an output without tokens.
    """
    try:
        choices = event["choices"]
        if not choices:  # of usage
            return None
        choice = choices[0]
        token_ids = tuple(choice["token_ids"])
        reason = choice["finish_reason"]
        if not all(type(token) is int for token in token_ids):
            raise BrokenEvent("its token ids are not all numbers")
        if not token_ids and reason is None:
            return None
        logprobs: tuple[TokenLogprobs, ...] = ()
        if num_top is not None and token_ids:
            logprobs = _logprobs(choice["logprobs"], num_tokens=len(token_ids), num_top=num_top)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise BrokenEvent(f"it lacks {error}") from error
    if reason is None:
        return EngineOutput(request_id=request_id, token_ids=token_ids, logprobs=logprobs)
    ours = _REASONS.get(reason, FinishReason.ERROR)
    why = f"the server ended it: {reason}" if ours is FinishReason.ERROR else None
    return EngineOutput(
        request_id=request_id, token_ids=token_ids, finish_reason=ours, error=why, logprobs=logprobs
    )


def cached_of(event: Mapping[str, Any]) -> CachedPrompt | None:
    """The cached tokens that an event of usage tells; None without `--enable-prompt-tokens-details`."""
    try:
        told = event["usage"]["prompt_tokens_details"]
        found, made = told["cached_tokens"], told.get("created_cache_tokens")
    except (KeyError, TypeError, AttributeError):
        return None
    if type(found) is not int or found < 0:
        return None
    return CachedPrompt(found_tokens=found, made_tokens=made if type(made) is int and made >= 0 else None)


def _logprobs(told: Mapping[str, Any], *, num_tokens: int, num_top: int) -> tuple[TokenLogprobs, ...]:
    """Of each token itself and the most probable ones. vLLM names the token first, the others by their ranks."""
    rows = []
    for token, logprob, others in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        top = sorted(((_token(name), float(value)) for name, value in others.items()), key=lambda one: -one[1])
        rows.append(TokenLogprobs(token_id=_token(token), logprob=float(logprob), top=tuple(top[:num_top])))
    if len(rows) != num_tokens:
        raise BrokenEvent(f"it has logprobs of {len(rows)} tokens beside {num_tokens} tokens")
    return tuple(rows)


def _token(name: str) -> int:
    if not name.startswith(_PLACEHOLDER) or not name[len(_PLACEHOLDER) :].isdecimal():
        raise BrokenEvent(f"its logprobs name {name[:40]!r} and no token id")
    return int(name[len(_PLACEHOLDER) :])


def refused(request_id: str, why: str, *, field: str = "") -> EngineOutput:
    """The only output of a request that the server refuses, for this field if it is for one."""
    reason = FinishReason.ERROR
    return EngineOutput(request_id=request_id, token_ids=(), finish_reason=reason, error=why, field=field)
