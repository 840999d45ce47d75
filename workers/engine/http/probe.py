"""Requests that show what a server can, before any that counts: token ids both ways, constraints, priorities."""

from __future__ import annotations

import logging
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from l4queue.errors import ConfigError
from l4queue.sampling import SamplingParams
from workers.engine.base import EngineDied, EngineRequest
from workers.engine.http.connection import BrokenStream, ServerBusy, ServerConnection, ServerRefusal
from workers.engine.http.translate import BrokenEvent, completion_body, output_of

__all__ = ("Abilities", "probe")

log = logging.getLogger("l4queue.worker")
_PROMPT = (1, 1)  # ids that every vocabulary has
_MAX_TOKENS = 4  # the word below has at most three, one for each letter, and the end
_WORD = "yes"
_NAME = "probe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What differs between servers that take token ids."""

    has_priorities: bool
    has_constraints: bool


async def probe(server: ServerConnection, *, model: str, version: str) -> Abilities:
    """Try it. ConfigError where token ids do not come back as they were sent; EngineDied where the server goes."""
    try:
        has_priorities = await _takes(server, model, version, has_priorities=True)
        if not has_priorities:
            await _takes(server, model, version, has_priorities=False)
        return Abilities(
            has_priorities=has_priorities,
            has_constraints=await _takes(server, model, version, is_constrained=True),
        )
    except (BrokenStream, ServerBusy) as error:
        raise EngineDied(f"the server at {server.url} did not serve a first request: {error}") from error


async def _takes(
    server: ServerConnection,
    model: str,
    version: str,
    *,
    has_priorities: bool = False,
    is_constrained: bool = False,
) -> bool:
    """Whether the server takes a request with these; one that it must take is a ConfigError if it does not."""
    params: dict[str, Any] = {"logprobs": 1}
    if is_constrained:
        params["structured_outputs"] = {"choice": [_WORD]}
    request = EngineRequest(
        request_id=_NAME,
        token_ids=_PROMPT,
        max_tokens=_MAX_TOKENS if is_constrained else 1,
        min_tokens=0,
        params=SamplingParams.model_validate(params),
        priority=1,
    )
    body = completion_body(request, model=model, has_priorities=has_priorities)
    text = ""
    try:
        async with aclosing(server.events(body)) as events:
            async for event in events:
                text += _text_of(event, server.url, version)
                output = output_of(_NAME, event, num_top=1)
                if output is not None and output.finish_reason is not None:
                    break
    except ServerRefusal as error:
        if error.status not in (401, 403, 404) and (has_priorities or is_constrained):
            log.info("%s at %s: %s", "priorities" if has_priorities else "constraints", server.url, error)
            return False
        raise ConfigError(f"the server at {server.url} refuses a first request: {error}") from error
    except BrokenEvent as error:
        raise ConfigError(_without_ids(server.url, version, str(error))) from error
    return text == _WORD if is_constrained else True


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
