"""A worker whose server drops requests, or goes: each token comes once, and blame falls where it should."""

from __future__ import annotations

import asyncio

import pytest

from l4queue.errors import RequestDead
from tests.services.pipeline import Pipeline, until
from tests.services.small_server import BREAK, Fate, small_server
from workers.engine.base import EngineDied
from workers.engine.emulated.scheduler import next_token

pytestmark = pytest.mark.services
PROMPT = "Once"


def uncut(num_tokens: int) -> tuple[int, ...]:
    """What a well server generates."""
    ids = list(PROMPT.encode())
    for _ in range(num_tokens):
        ids.append(next_token(ids))
    return tuple(ids[len(PROMPT) :])


async def test_a_request_that_is_dropped_goes_on_from_its_tokens(pipeline: Pipeline) -> None:
    """Without blame, as often as it gets on; the others run on meanwhile. The prompt is sent with its output."""
    async with small_server() as server:
        server.fates.extend(Fate(at=at, line=BREAK) for at in (3, 1, 5))
        pipeline.start("w", make_engine=lambda *_, **__: server.engine())
        handles = [await pipeline.client.enqueue(PROMPT, max_tokens=12, ignore_eos=True) for _ in range(4)]
        for handle in handles:
            chunks = [chunk async for chunk in handle.stream(timeout=300)]
            result = await handle.result(timeout=300)
            assert result.token_ids == uncut(12) == tuple(i for chunk in chunks for i in chunk.token_ids)
            assert (await handle.status()).crashes == 0
        assert len(server.bodies) == 4 + 3
        rest = {(len(body["prompt"]) - len(PROMPT), body["max_tokens"]) for body in server.bodies}
        assert all(given + left == 12 for given, left in rest)
        await pipeline.stop("w")


async def test_a_request_that_never_gets_a_token_is_blamed_until_it_is_dead(pipeline: Pipeline) -> None:
    """Else it would be sent for ever; the next one is served."""
    async with small_server() as server:
        pipeline.start("w", make_engine=lambda *_, **__: server.engine())
        server.fates.extend(Fate(at=0, line=BREAK) for _ in range(20))
        bad = await pipeline.client.enqueue(PROMPT, max_tokens=12, ignore_eos=True)
        with pytest.raises(RequestDead):
            await bad.result(timeout=300)
        server.fates.clear()
        good = await pipeline.client.enqueue(PROMPT, max_tokens=12, ignore_eos=True)
        assert (await good.result(timeout=300)).token_ids == uncut(12)
        await pipeline.stop("w")


async def test_a_worker_ends_with_its_server_and_another_goes_on(pipeline: Pipeline) -> None:
    """It gives back running requests with their tokens; the next worker waits until there is a server."""
    async with small_server() as other:
        async with small_server() as server:
            pipeline.start("w", make_engine=lambda *_, **__: server.engine())
            server.fates.append(Fate(at=4, line='{"error": {"message": "EngineCore is dead", "code": 500}}'))
            server.health = 503
            handle = await pipeline.client.enqueue(PROMPT, max_tokens=12, ignore_eos=True)
            _, ending = pipeline.workers.pop("w")
            with pytest.raises(EngineDied, match="crashed"):
                await ending
        pipeline.start("v", make_engine=lambda *_, **__: other.engine())
        result = await handle.result(timeout=300)
        assert (result.token_ids, result.resumed) == (uncut(12), True)
        assert (await handle.status()).crashes == 1
        await pipeline.stop("v")


async def test_a_worker_that_waits_for_its_server_can_be_stopped(
    pipeline: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    """It has taken nothing, says what it waits for, and ends in good order."""
    async with small_server() as server:
        engine = server.engine()
    pipeline.start("w", make_engine=lambda *_, **__: engine)

    async def is_told() -> bool:
        return "waiting for the engine's server: no engine answers" in caplog.text

    with caplog.at_level("WARNING"):
        await until(is_told)
        async with asyncio.timeout(300):
            await pipeline.stop("w")
    assert "stopped before its engine served" in caplog.text
