"""`l4queue health`: each role is well while it works, and says what is wrong when it does not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from dispatcher.host import keep_up
from dispatcher.planner.rounds import replan_once
from dispatcher.routing.service import Dispatcher
from l4queue.cli.health import Role, sign_of_life
from l4queue.config import Settings
from l4queue.errors import ServiceUnavailable
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.upkeep import Upkeep
from tests.services.pipeline import ByteTokenizer, open_pipeline, true, until

pytestmark = pytest.mark.services


async def sick(role: Role, settings: Settings) -> str:
    """Why it is not well."""
    with pytest.raises(ServiceUnavailable) as caught:
        await asyncio.to_thread(sign_of_life, role, settings)
    return str(caught.value)


async def test_a_worker_is_well_while_it_has_a_lease(redis_url: str, namespace: str) -> None:
    """Not before it serves, not for another name, and not after it ended."""
    async with open_pipeline(redis_url, namespace, worker_id="here") as pipeline:
        settings = pipeline.settings
        assert "worker here has no lease" in await sick(Role.WORKER, settings)

        pipeline.start("there")
        pipeline.start("here")

        async def is_well() -> bool:
            try:
                return "serves stage 0" in await asyncio.to_thread(sign_of_life, Role.WORKER, settings)
            except ServiceUnavailable:
                return False

        await until(is_well)
        await pipeline.stop("here")
        assert "worker here has no lease" in await sick(Role.WORKER, settings)


async def one_upkeep(dispatcher: Dispatcher, executor: AsyncExecutor) -> None:
    """One turn of what a dispatcher does beside routing."""
    stopping, adopt_once = asyncio.Event(), dispatcher.adopt_once

    async def adopt_and_stop() -> int:
        stopping.set()
        return await adopt_once()

    dispatcher.adopt_once = adopt_and_stop  # type: ignore[method-assign]
    await keep_up(dispatcher, Upkeep(settings=dispatcher.settings, executor=executor), executor, stopping)


async def test_a_dispatcher_is_well_after_a_round(redis_url: str, namespace: str) -> None:
    """Also when nothing arrives; one whose routing stands still is not, whatever its upkeep does."""
    settings = Settings(redis_url=redis_url, namespace=namespace)
    executor = AsyncExecutor(redis_url, retry_s=None)
    dispatcher = Dispatcher(settings=settings, executor=executor, tokenizer=ByteTokenizer(), name="d")  # type: ignore[arg-type]

    dispatcher._rounded_s -= 3600.0
    await one_upkeep(dispatcher, executor)
    assert "no dispatcher of" in await sick(Role.DISPATCHER, settings)

    routing = asyncio.create_task(dispatcher.run())
    await until(lambda: true(dispatcher.idle_s < 60.0))
    await one_upkeep(dispatcher, executor)
    assert "finished a round 0." in await asyncio.to_thread(sign_of_life, Role.DISPATCHER, settings)
    dispatcher.request_stop()
    await routing
    await executor.close()


async def test_planner_and_beat_are_well_after_a_round(redis_url: str, namespace: str) -> None:
    """Whichever of the two stands still, no round ends."""
    settings = Settings(redis_url=redis_url, namespace=namespace)
    for role in (Role.PLANNER, Role.BEAT):
        assert "no round of planning yet" in await sick(role, settings)

    await replan_once(settings)

    for role in (Role.PLANNER, Role.BEAT):
        assert "ended 0." in await asyncio.to_thread(sign_of_life, role, settings)


@pytest.fixture
def flower_port() -> Iterator[int]:
    """A server that answers as Flower does."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/healthcheck" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


async def test_flower_is_well_while_it_answers(flower_port: int) -> None:
    """And the complaint names the address."""
    assert "Flower answers" in await asyncio.to_thread(
        sign_of_life, Role.FLOWER, Settings(flower_port=flower_port)
    )
    assert "http://127.0.0.1:1/healthcheck" in await sick(Role.FLOWER, Settings(flower_port=1))


async def test_without_redis_nobody_is_well() -> None:
    """The address is in the complaint."""
    for role in (Role.WORKER, Role.DISPATCHER, Role.PLANNER):
        assert "127.0.0.1:1" in await sick(role, Settings(redis_url="redis://127.0.0.1:1/0"))
