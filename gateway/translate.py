"""vLLM's sampling parameters as ours, and output of the queue as what vLLM's engine core gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from l4queue.errors import InvalidRequest
from l4queue.protocol.records import CachedPrompt, TokenLogprobs

__all__ = ("core_output", "options_of")

_SAME = (
    "max_tokens",
    "min_tokens",
    "top_k",
    "seed",
    "ignore_eos",
    "logprobs",
    "skip_special_tokens",
    "bad_words",
    "allowed_token_ids",
    "logit_bias",
)
_FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_LISTS = ("stop", "stop_token_ids")
_OURS = frozenset((*_SAME, *_FLOATS, *_LISTS, "structured_outputs"))
_LOCAL = frozenset(
    {
        "n",  # each output is a request of its own
        "flat_logprobs",
        "detokenize",
        "spaces_between_special_tokens",
        "include_stop_str_in_output",
        "output_kind",
        "stream_interval",
        "skip_clone",
        "output_text_buffer_length",
        "watermarking",
        "skip_reading_prefix_cache",
    }
)
"""Parameters that the gateway alone heeds, where it makes the text."""


def options_of(params: Any) -> dict[str, Any]:
    """Options of our `enqueue` for one output of vLLM's parameters. InvalidRequest names what is not offered."""
    kind: Any = type(params)
    for name, default in _defaults(kind).items():
        value = getattr(params, name)
        if name not in _OURS and name not in _LOCAL and value not in (default, None, {}, []):
            raise InvalidRequest("is not offered by this server", field=name)
    options = {name: getattr(params, name) for name in _SAME}
    options |= {name: float(getattr(params, name)) for name in _FLOATS}
    for name in _LISTS:
        value = getattr(params, name)
        options[name] = [value] if isinstance(value, str) else list(value or ())
    options["structured_outputs"] = _structured_outputs(params.structured_outputs)
    return {name: value for name, value in options.items() if value is not None}


@cache
def _defaults(kind: Any) -> dict[str, Any]:
    """Public fields of a msgspec structure with a plain default."""
    names = kind.__struct_fields__
    plain = names[len(names) - len(kind.__struct_defaults__) :]
    return {n: d for n, d in zip(plain, kind.__struct_defaults__, strict=True) if not n.startswith("_")}


def _structured_outputs(given: Any) -> dict[str, Any] | None:
    """The constraint in our words: a JSON object of any kind is a schema, too."""
    if given is None:
        return None
    for name in ("whitespace_pattern", "disable_any_whitespace", "disable_additional_properties"):
        if getattr(given, name):  # vLLM accepts them, and its engine does not heed them
            raise InvalidRequest("is not offered by this server", field=f"structured_outputs.{name}")
    if given.json_object is False:
        raise InvalidRequest("must be true if set", field="structured_outputs.json_object")
    if given.json_object:
        return {"json": {"type": "object"}}
    for name in ("json", "regex", "choice", "grammar", "structural_tag"):
        if getattr(given, name) is not None:
            return {name: getattr(given, name)}
    return None


def core_output(
    request_id: str,
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs] | None = None,
    *,
    cached: CachedPrompt | None = None,
    ends: tuple[str, int | None] | None = None,
) -> Any:
    """New tokens of a request as an `EngineCoreOutput`, with (reason, token that stopped it) at its end."""
    from vllm.v1.engine import EngineCoreOutput, FinishReason
    from vllm.v1.metrics.stats import PrefillStats

    output = EngineCoreOutput(request_id=request_id, new_token_ids=list(token_ids))
    if logprobs:
        output.new_logprobs = _logprob_lists(logprobs)
    if cached is not None:
        stats: Any = {"num_cached_tokens": cached.found_tokens, "num_cache_creation_tokens": cached.made_tokens}
        output.prefill_stats = PrefillStats(**stats)
    if ends is not None:
        reasons: Mapping[str, Any] = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}
        output.finish_reason, output.stop_reason = reasons[ends[0]], ends[1]
    return output


def _logprob_lists(rows: Sequence[TokenLogprobs]) -> Any:
    """As the sampler gives them: each token first, then the most probable ones."""
    import numpy as np
    from vllm.v1.outputs import LogprobsLists

    ids = np.array([[row.token_id, *(token for token, _ in row.top)] for row in rows], dtype=np.int32)
    values = np.array([[row.logprob, *(value for _, value in row.top)] for row in rows], dtype=np.float32)
    ranks = np.array([_rank(row) for row in rows], dtype=np.int32)
    return LogprobsLists(ids, values, ranks)


def _rank(row: TokenLogprobs) -> int:
    """The token's place among the most probable ones, from 1; one more than these where it is none of them."""
    return next((place for place, (token, _) in enumerate(row.top, 1) if token == row.token_id), len(row.top) + 1)
