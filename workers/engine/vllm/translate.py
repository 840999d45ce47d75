"""Requests in vLLM's terms, and its outputs in ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from l4queue.protocol.records import CachedPrompt
from workers.engine.base import EngineOutput, EngineRequest, FinishReason
from workers.engine.vllm.logprobs import token_logprobs

if TYPE_CHECKING:
    from l4queue.sampling import StructuredOutputs

__all__ = ("cached_prompt", "engine_output", "failed", "prompt", "sampling_params")

_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "repetition": FinishReason.STOP,
}


def sampling_params(request: EngineRequest) -> Any:
    """vLLM's `SamplingParams` of a request: token ids in and out, each piece only what is new."""
    from vllm import SamplingParams as VllmParams
    from vllm.sampling_params import RequestOutputKind

    params = request.params
    return VllmParams(
        max_tokens=request.max_tokens,
        min_tokens=request.min_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        seed=params.seed,
        stop_token_ids=list(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logprobs=params.logprobs,
        flat_logprobs=params.logprobs is not None,
        structured_outputs=_structured_outputs(params.structured_outputs),
        logit_bias=params.logit_bias,
        allowed_token_ids=None if params.allowed_token_ids is None else list(params.allowed_token_ids),
        bad_words=list(params.bad_words),
        detokenize=False,  # the worker makes the text, so that it survives a change of worker
        output_kind=RequestOutputKind.DELTA,
    )


def prompt(request: EngineRequest) -> Any:
    """vLLM's prompt of a request: ids that need no further work."""
    from vllm.inputs import tokens_input

    return tokens_input(list(request.token_ids))


def _structured_outputs(given: StructuredOutputs | None) -> Any:
    """As vLLM's. Nothing in it is checked here: `add_request` does before the engine core sees it."""
    if given is None:
        return None
    from vllm.sampling_params import StructuredOutputsParams

    return StructuredOutputsParams(
        json=given.json_schema,
        regex=given.regex,
        choice=None if given.choice is None else list(given.choice),
        grammar=given.grammar,
        structural_tag=given.structural_tag,
    )


def failed(request_id: str, why: str, *, field: str) -> EngineOutput:
    """The only output of a request that vLLM refuses, for this field if it is for one."""
    reason = FinishReason.ERROR
    return EngineOutput(request_id=request_id, token_ids=(), finish_reason=reason, error=why, field=field)


def cached_prompt(out: Any) -> CachedPrompt | None:
    """What vLLM's `RequestOutput` tells of its prefix cache, with the first tokens or later."""
    if out.num_cached_tokens is None:
        return None
    return CachedPrompt(found_tokens=out.num_cached_tokens, made_tokens=out.num_cache_creation_tokens)


def engine_output(
    request_id: str, done: Any, *, num_top: int | None, cached: CachedPrompt | None = None
) -> EngineOutput:
    """vLLM's `CompletionOutput` as ours, with this number of logprobs beside each token's; None: without any."""
    has_any = num_top is not None and done.logprobs
    logprobs = token_logprobs(done.logprobs, done.token_ids, num_top=num_top or 0) if has_any else ()
    if done.finish_reason is None:
        return EngineOutput(
            request_id=request_id, token_ids=tuple(done.token_ids), logprobs=logprobs, cached=cached
        )
    reason = _REASONS.get(done.finish_reason, FinishReason.ERROR)
    error = f"vLLM ended it: {done.finish_reason}" if reason is FinishReason.ERROR else None
    return EngineOutput(
        request_id=request_id,
        token_ids=tuple(done.token_ids),
        finish_reason=reason,
        error=error,
        logprobs=logprobs,
        cached=cached,
    )
