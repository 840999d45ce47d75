"""The http engine and servers that are not well: refusals, broken streams, wrong ones. A real one: tests/e2e."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from l4queue.errors import ConfigError
from l4queue.models import SamplingParams
from l4queue.protocol.records import CachedPrompt
from tests.services.small_server import BREAK, CAPACITY_TOKENS, Fate, SmallServer, small_server
from workers.engine.base import EngineDied, EngineOutput, EngineRequest, FinishReason
from workers.engine.emulated.scheduler import next_token
from workers.engine.http.engine import HttpEngine

PROMPT = [5, 6, 7]
ERROR = json.dumps({"error": {"message": "out of vocabulary", "param": "prompt_token_ids", "code": 400}})
DEAD = json.dumps({"error": {"message": "EngineCore encountered an issue", "param": None, "code": 500}})


def request(name: str = "a", **params: Any) -> EngineRequest:
    """Four tokens."""
    asked = SamplingParams.model_validate(params)
    return EngineRequest(request_id=name, token_ids=PROMPT, max_tokens=4, min_tokens=0, params=asked)


def whole() -> list[int]:
    """The tokens of `request` from a well server."""
    ids = list(PROMPT)
    for _ in range(4):
        ids.append(next_token(ids))
    return ids[len(PROMPT) :]


async def end_of(engine: HttpEngine, name: str = "a") -> tuple[list[int], EngineOutput]:
    """All tokens of a request and its last output."""
    tokens: list[int] = []
    while True:
        for output in await engine.outputs():
            assert output.request_id == name
            tokens += output.token_ids
            if output.finish_reason is not None:
                return tokens, output


async def test_a_well_server_is_read_to_the_end_and_told_of() -> None:
    """Its limits are the engine's; the longest request is bounded by model, KV cache and setting."""
    async with small_server() as server:
        engine = server.engine()
        info = await engine.start()
        assert (info.name, info.model, info.max_model_len) == ("http", "m", 2048)
        assert (info.kv_capacity_tokens, info.can_move_kv) == (CAPACITY_TOKENS, False)
        assert "0.32.0" in info.version
        await engine.add(request(logprobs=1))
        tokens, last = await end_of(engine)
        assert (tokens, last.finish_reason) == (whole(), FinishReason.LENGTH)
        await engine.add(request("b"))
        with pytest.raises(ValueError, match="already"):
            await engine.add(request("b"))
        await engine.stop()
        await engine.stop()
        shorter = server.engine(max_model_len=100)
        assert (await shorter.start()).max_model_len == 100
        await shorter.stop()


@pytest.mark.parametrize(
    ("options", "wanted", "says"),
    [
        (
            {"models": [{"id": "x", "root": "/models/x"}]},
            {},
            r"serves x \(of /models/x\), not m; correct L4_MODEL",
        ),
        ({"models": []}, {}, "serves no model"),
        ({"models": [{"id": "m", "root": "/a", "parent": "x"}]}, {}, "adapter of another model"),
        ({"models": ["m"]}, {}, "is no vLLM"),
        ({"token_ids": False}, {}, "gives no token ids for return_token_ids"),
        ({"changes_prompts": True}, {}, r"changes prompts: of \[1, 1\] it made \[0, 1, 1\]"),
        ({"tells_metrics": False}, {}, "--disable-log-stats"),
        ({"key": "secret"}, {}, r"refuses the key \(HTTP 401\): L4_ENGINE_KEY"),
        ({}, {"max_model_len": 3000}, "L4_MAX_MODEL_LEN is 3000, and the server at .* holds 2048"),
    ],
)
async def test_a_server_that_will_never_do_is_a_configuration_error(
    options: dict[str, Any], wanted: dict[str, Any], says: str
) -> None:
    async with small_server(**options) as server:
        engine = server.engine(**wanted)
        with pytest.raises(ConfigError, match=says):
            await engine.start()
        await engine.stop()


async def test_constraints_that_a_server_ignores_are_refused_here() -> None:
    """The field is named, and nothing is sent."""
    async with small_server(keeps_constraints=False) as server:
        engine = server.engine()
        await engine.start()
        await engine.add(request(structured_outputs={"choice": ["a"]}))
        _, last = await end_of(engine)
        assert (last.finish_reason, last.field) == (FinishReason.ERROR, "structured_outputs")
        assert "ignores structured outputs" in (last.error or "")
        assert server.bodies == []
        await engine.stop()


@pytest.mark.parametrize(
    ("fate", "says", "field"),
    [
        (Fate(status=400, body=ERROR), "out of vocabulary", "prompt"),
        (Fate(line=ERROR), "out of vocabulary", "prompt"),
        (Fate(status=422, body="no JSON"), "no JSON", ""),
        (Fate(at=1, line='{"choices": [{"text": "x", "finish_reason": null}]}'), "cannot be read: it lacks", ""),
    ],
)
async def test_what_a_server_refuses_fails_alone(fate: Fate, says: str, field: str) -> None:
    """Before its stream or in it; the next one is served."""
    async with small_server() as server:
        server.fates.append(fate)
        engine = server.engine()
        await engine.start()
        await engine.add(request())
        _, last = await end_of(engine)
        assert (last.finish_reason, last.field) == (FinishReason.ERROR, field)
        assert says in (last.error or "")
        await engine.add(request())
        assert (await end_of(engine))[0] == whole()
        await engine.stop()


@pytest.mark.parametrize("cached_tokens", [None, 0, 2])
async def test_cached_tokens_come_with_the_end_where_the_server_tells_them(cached_tokens: int | None) -> None:
    """A server without `--enable-prompt-tokens-details` ends as soon as its tokens do."""
    async with small_server(cached_tokens=cached_tokens) as server:
        engine = server.engine()
        await engine.start()
        await engine.add(request())
        tokens, last = await end_of(engine)
        await engine.stop()
    assert tokens == whole()
    assert last.cached == (None if cached_tokens is None else CachedPrompt(found_tokens=cached_tokens))
    assert server.bodies[0]["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("status", [429, 503])
async def test_a_server_that_is_full_is_asked_again(status: int) -> None:
    async with small_server() as server:
        server.fates.append(Fate(status=status, body='{"error": {"message": "full"}}'))
        engine = server.engine()
        await engine.start()
        await engine.add(request())
        assert (await end_of(engine))[0] == whole()
        assert len(server.bodies) == 2
        await engine.stop()


@pytest.mark.parametrize(
    "line", [BREAK, "no JSON", "[DONE]", '{"choices": [{"token_ids": [], "finish_reason": "abort"}]}', DEAD]
)
async def test_a_request_that_a_well_server_drops_is_lost_with_its_tokens_kept(line: str) -> None:
    """What came before is out, nothing of it twice; the id is free again."""
    async with small_server() as server:
        server.fates.append(Fate(at=2, line=line))
        engine = server.engine()
        await engine.start()
        await engine.add(request())
        tokens, last = await end_of(engine)
        assert (tokens, last.finish_reason, last.error) == (whole()[:2], FinishReason.LOST, None)
        await engine.add(request())
        assert (await end_of(engine))[0] == whole()
        await engine.stop()


async def expect_death(engine: HttpEngine, *, is_blameless: bool) -> None:
    """No request has an outcome; the engine stays dead."""

    async def until_death() -> None:
        while True:
            assert all(output.finish_reason is None for output in await engine.outputs())

    with pytest.raises(EngineDied) as died:
        await until_death()
    assert died.value.is_blameless is is_blameless
    with pytest.raises(EngineDied):
        await engine.add(request("later"))
    await engine.stop()


async def test_a_server_whose_engine_is_dead_takes_all_its_requests_along() -> None:
    """It says so itself; requests are not told apart, so all are suspects."""
    async with small_server() as server:
        server.fates.append(Fate(at=1, line=DEAD))
        server.health = 503
        engine = server.engine()
        await engine.start()
        await engine.add(request())
        await expect_death(engine, is_blameless=False)


async def test_a_server_that_is_gone_is_seen_without_a_request() -> None:
    """Nobody listens any more."""
    async with small_server() as server:
        engine = server.engine()
        await engine.start()
    await expect_death(engine, is_blameless=False)


async def test_a_model_that_is_gone_blames_no_request() -> None:
    """Unloaded, or a proxy leads to another server now: the worker begins anew and says what is wrong."""
    async with small_server() as server:
        server.fates.append(Fate(status=404, body='{"error": {"message": "The model `m` does not exist."}}'))
        engine = server.engine()
        await engine.start()
        await engine.add(request())
        await expect_death(engine, is_blameless=True)


async def test_what_is_aborted_falls_silent_and_its_connection_is_closed() -> None:
    """So is what is cut; neither has KV to give."""
    long = EngineRequest(
        request_id="a", token_ids=PROMPT, max_tokens=10**6, min_tokens=0, params=SamplingParams(), num_resumed=0
    )
    async with small_server() as server:
        engine = server.engine()
        await engine.start()
        await engine.add(long)
        await engine.outputs()
        await engine.abort(["a", "unknown"])
        assert await engine.cut("a") is None
        await engine.add(long)
        await engine.outputs()
        cut = await engine.cut("a")
        assert cut is not None
        assert cut.kv == ""
        await engine.add(request("b"))
        assert (await end_of(engine, "b"))[0] == whole()
        await until_closed(server, 2)
        await engine.stop()


async def until_closed(server: SmallServer, number: int) -> None:
    """Wait until so many streams were left by their client; the timeout of the test ends it."""
    while server.num_closed < number:  # noqa: ASYNC110 - the other end of a socket sees it when it does
        await asyncio.sleep(0.01)
