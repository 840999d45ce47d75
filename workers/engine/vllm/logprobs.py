"""vLLM's logprobs of generated tokens as ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from l4queue.protocol.records import TokenLogprobs

__all__ = ("token_logprobs",)

_LEAST_LOGPROB = -9999.0  # for -inf, which JSON has not: as vLLM's server has it


def token_logprobs(flat: Any, token_ids: Sequence[int], *, num_top: int) -> tuple[TokenLogprobs, ...]:
    """Of vLLM's `FlatLogprobs`: for each of these tokens itself and the `num_top` most probable ones.

    A position as the sampler gave it names the token first and again among the most probable. Where vLLM put the
    outputs of several steps together, because nobody had fetched them, it is named once.
    """
    rows = []
    for token_id, start, end in zip(token_ids, flat.start_indices, flat.end_indices, strict=True):
        found = {
            flat.token_ids[i]: (flat.ranks[i], max(flat.logprobs[i], _LEAST_LOGPROB)) for i in range(start, end)
        }
        top = sorted(found, key=lambda token: found[token][0])[:num_top]
        rows.append(
            TokenLogprobs(
                token_id=token_id,
                logprob=found[token_id][1],
                top=tuple((token, found[token][1]) for token in top),
            )
        )
    return tuple(rows)
