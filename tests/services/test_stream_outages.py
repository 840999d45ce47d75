"""Streams and results while Redis restarts or is away, and without its replicas; a worker is played by hand."""

from __future__ import annotations

import asyncio
import threading

import pytest

from l4queue import AsyncClient, Client, Settings
from l4queue.client.sync import Handle
from l4queue.errors import ServiceUnavailable
from l4queue.protocol.executor import Executor
from tests.protocol.scene import Scene
from tests.protocol.server import RedisServer
from tests.services.pipeline import true, until
from tests.services.played_worker import finished, follows, start, tokens_of

pytestmark = pytest.mark.services


def test_streams_survive_a_restart_of_redis(durable_server: RedisServer, namespace: str) -> None:
    """Killed with what it has in its AOF: blocking and asyncio streams go on without gap or repeat."""
    settings = Settings(redis_url=durable_server.url, namespace=namespace)
    scene = Scene(Executor(durable_server.url), namespace)
    found: list[list[int]] = []

    def read(handle: Handle) -> None:
        found.append([t for chunk in handle.stream(timeout=300) for t in chunk.token_ids])

    async def read_async(request_id: str) -> None:
        async with AsyncClient(settings=settings) as client:
            found.append(await tokens_of(await client.get(request_id)))

    with Client(settings=settings) as client:
        handle = client.enqueue("x", max_tokens=99)
        start(scene, handle)
        threads = [threading.Thread(target=read, args=(handle,))]
        threads.append(threading.Thread(target=lambda: asyncio.run(read_async(handle.id))))
        for thread in threads:
            thread.start()
        asyncio.run(follows(scene, handle, number=2))
        for turn in range(4):
            scene.emit(handle.id, offset=3 * turn, num=3)
            durable_server.restart()
        scene.settle(handle.id, offset=12)
        for thread in threads:
            thread.join()
    assert found == [scene.tokens(1, 0, 12)] * 2
    scene.close()
    scene.executor.close()


async def test_an_outage_ends_every_wait_and_the_next_one_goes_on(
    durable_server: RedisServer, namespace: str
) -> None:
    """The error names what a caller waited for; a stream goes on from its offset."""
    scene = Scene(Executor(durable_server.url), namespace)
    async with AsyncClient(settings=Settings(redis_url=durable_server.url, namespace=namespace)) as client:
        client._executor.retry_s = 0.1
        handle = await client.enqueue("x", max_tokens=9)
        start(scene, handle)
        stream = handle.stream(timeout=300)
        scene.emit(handle.id)
        assert (await anext(stream)).offset == 2
        waits = [asyncio.ensure_future(anext(stream)), asyncio.ensure_future(handle.result(timeout=300))]
        await until(lambda: true(len(client._listener._demux._watches[handle.id]) == 2))
        durable_server.kill()
        for wait in waits:
            with pytest.raises(ServiceUnavailable, match="cannot be reached"):
                await wait
        durable_server.start()
        client._executor.retry_s = 10.0
        scene.settle(handle.id, offset=2, num=1)
        assert await tokens_of(handle, after=2) == scene.tokens(1, 2, 1)
    scene.close()
    scene.executor.close()


async def test_results_and_streams_are_read_without_replicas(scene: Scene, redis_url: str, namespace: str) -> None:
    """`?replicas=1` is about what is written; with the replica away, what there is can be read."""
    async with AsyncClient(settings=Settings(redis_url=redis_url, namespace=namespace)) as client:
        handle = await client.enqueue("x", max_tokens=9)
    finished(scene, handle)
    settings = Settings(redis_url=redis_url + "?replicas=1", namespace=namespace)
    async with AsyncClient(settings=settings) as client:
        same = await client.get(handle.id)
        assert (await same.result(timeout=300)).output_tokens == 5
        assert await tokens_of(same) == scene.tokens(1, 0, 5)
    with Client(settings=settings) as blocking:
        assert blocking.get(handle.id).result(timeout=300).output_tokens == 5
        assert list(blocking.as_completed([blocking.get(handle.id)], timeout=300))
