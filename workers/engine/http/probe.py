"""Requests that show what a server can, before any that counts: token ids both ways, and constraints."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

from l4queue.errors import ConfigError
from l4queue.sampling import SamplingParams
from workers.engine.base import EngineDied, EngineRequest
from workers.engine.http.connection import BrokenStream, ServerBusy, ServerConnection, ServerRefusal
from workers.engine.http.translate import BrokenEvent, completion_body, output_of

__all__ = ("keeps_constraints",)

_PROMPT = (1, 1)  # ids that every vocabulary has
_MAX_TOKENS = 4  # the word below has at most three, one for each letter, and the end
_WORD = "yes"
_NAME = "probe"


async def keeps_constraints(server: ServerConnection, *, model: str, version: str) -> bool:
    """Whether structured outputs are kept; a server may know them by another name, and ignores ours.

    ConfigError where token ids do not come back as they were sent; EngineDied where the server goes.
    """
    try:
        await _answer(server, model, version, {"logprobs": 1})
        try:
            text = await _answer(server, model, version, {"structured_outputs": {"choice": [_WORD]}})
        except ConfigError:  # it refuses them
            return False
    except (BrokenStream, ServerBusy) as error:
        raise EngineDied(f"the server at {server.url} did not serve a first request: {error}") from error
    return text == _WORD


async def _answer(server: ServerConnection, model: str, version: str, params: dict[str, Any]) -> str:
    """The text of an answer; ConfigError where there is none, or it is not one of token ids."""
    asked = SamplingParams.model_validate(params)
    request = EngineRequest(
        request_id=_NAME,
        token_ids=_PROMPT,
        max_tokens=_MAX_TOKENS if asked.structured_outputs is not None else 1,
        min_tokens=0,
        params=asked,
        priority=1,
    )
    text = ""
    try:
        async with aclosing(server.events(completion_body(request, model=model))) as events:
            async for event in events:
                text += _text_of(event, server.url, version)
                output = output_of(_NAME, event, num_top=asked.logprobs)
                if output is not None and output.finish_reason is not None:
                    return text
    except ServerRefusal as error:
        raise ConfigError(f"the server at {server.url} refuses a first request: {error}") from error
    except BrokenEvent as error:
        raise ConfigError(_without_ids(server.url, version, str(error))) from error
    return text


def _text_of(event: dict[str, Any], url: str, version: str) -> str:
    """The text of an event; the first one repeats the prompt, which must be what was sent."""
    for choice in event.get("choices") or ():
        if "token_ids" not in choice or choice["token_ids"] is None:
            raise ConfigError(_without_ids(url, version, "its answer has none"))
        given = choice.get("prompt_token_ids")
        if given is not None and tuple(given) != _PROMPT:
            raise ConfigError(f"the server at {url} changes prompts: of {list(_PROMPT)} it made {given[:8]}")
        return str(choice.get("text") or "")
    return ""


def _without_ids(url: str, version: str, why: str) -> str:
    return (
        f"the server at {url} ({version}) gives no token ids for return_token_ids ({why}): it is too old, or no "
        "vLLM; docs/engines.md"
    )
