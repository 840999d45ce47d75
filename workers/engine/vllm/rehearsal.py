"""Rehearsal of every kind of request, so that none is the first of its kind while others are served.

The first request of a kind loads libraries, makes tables of the vocabulary and, on a GPU, compiles kernels.
It holds up the whole engine meanwhile, and one that an engine cannot bear ends it.
"""

from __future__ import annotations

from typing import Any

from l4queue.models import SamplingParams
from workers.engine.base import EngineRequest

__all__ = ("rehearsals",)

_SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
_TAG = {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": _SCHEMA}}
_KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("logprobs", {"logprobs": 1}),
    ("greedy", {"temperature": 0.0}),
    ("seed", {"seed": 1}),
    ("limits", {"top_k": 2, "top_p": 0.9, "min_p": 0.1}),
    ("penalties", {"presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1}),
    ("json", {"structured_outputs": {"json": _SCHEMA}}),
    ("regex", {"structured_outputs": {"regex": "[ab]{1,9}"}}),
    ("choice", {"structured_outputs": {"choice": ["yes", "no"]}}),
    ("grammar", {"structured_outputs": {"grammar": 'root ::= "yes" | "no"'}}),
    ("tag", {"structured_outputs": {"structural_tag": _TAG}}),
    ("more-logprobs", {"logprobs": 5, "ignore_eos": True}),
)
_TOKENS = 2  # a step of prefill and one of generation


def rehearsals() -> tuple[tuple[EngineRequest, ...], ...]:
    """Requests to run before the first real one, those of one group together.

    Logprobs come alone and in company: torch compiles for one row and for several.
    """
    company = tuple(_request(name, params) for name, params in _KINDS)
    return company[:1], company


def _request(name: str, params: dict[str, Any]) -> EngineRequest:
    return EngineRequest(
        request_id=f"rehearsal of {name}",
        token_ids=(1,) * _TOKENS,
        max_tokens=_TOKENS,
        min_tokens=0,
        params=SamplingParams.model_validate(params),
    )
