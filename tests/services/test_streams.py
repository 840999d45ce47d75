"""Streams and results of many requests on one client: a real redis-server, and a worker that is played by hand."""

from __future__ import annotations

import asyncio
import multiprocessing
import subprocess
import sys
import threading
import time

import pytest

from l4queue import AsyncClient, Client, Settings
from l4queue.client.sync import Handle
from l4queue.errors import (
    RequestCancelled,
    RequestFailed,
    ServiceUnavailable,
)
from l4queue.models import RequestState
from tests.protocol.consistency import check
from tests.protocol.scene import Scene
from tests.services.pipeline import true, until
from tests.services.played_worker import emit_all, finished, follows, start, tokens_of

pytestmark = pytest.mark.services


async def test_a_client_with_many_streams_reads_seldom(scene: Scene, client: AsyncClient) -> None:
    """However often it is told something: several news come with one reply then."""
    handles = await client.enqueue_many(["x"] * 100, max_tokens=9)
    start(scene, *handles)
    reading = [asyncio.create_task(tokens_of(handle)) for handle in handles]
    await follows(scene, handles[0], handles[-1])
    scene.raw.config_resetstat()
    began_s = time.monotonic()
    for turn in range(6):
        for handle in handles:
            emit_all(scene, [handle], offset=turn, num=1)
            await asyncio.sleep(0)
    took_s = time.monotonic() - began_s
    num_reads = scene.raw.info("commandstats")["cmdstat_xread"]["calls"]
    for handle in handles:
        scene.settle(handle.id, offset=6, num=1)

    assert await asyncio.gather(*reading) == [scene.tokens(1, 0, 7)] * 100
    assert num_reads <= took_s / 0.01 + 2


async def test_2000_streams_share_one_blocking_connection(scene: Scene, client: AsyncClient) -> None:
    """Each has its tokens, each once; the server sees one reader that waits."""
    handles = await client.enqueue_many(["x"] * 2000, max_tokens=9)
    start(scene, *handles)
    reading = [asyncio.create_task(tokens_of(handle)) for handle in handles]
    await follows(scene, handles[0], handles[-1])
    for turn in range(3):
        emit_all(scene, handles, offset=2 * turn, num=2)
        await asyncio.sleep(0)
    blocked = [c for c in scene.raw.client_list() if c["cmd"].startswith("xread") and "b" in c["flags"]]
    assert len(blocked) <= 1
    for handle in handles:
        scene.settle(handle.id, offset=6, num=1)

    assert await asyncio.gather(*reading) == [scene.tokens(1, 0, 7)] * 2000


def test_threads_share_one_blocking_connection(scene: Scene, blocking: Client) -> None:
    """200 threads stream at once on one client."""
    handles = blocking.enqueue_many(["x"] * 200, max_tokens=9)
    start(scene, *handles)
    found: dict[str, list[int]] = {}

    def read(handle: Handle) -> None:
        found[handle.id] = [t for chunk in handle.stream(timeout=300) for t in chunk.token_ids]

    threads = [threading.Thread(target=read, args=(handle,)) for handle in handles]
    for thread in threads:
        thread.start()
    asyncio.run(follows(scene, *handles))
    blocked = [c for c in scene.raw.client_list() if c["cmd"].startswith("xread") and "b" in c["flags"]]
    assert len(blocked) <= 1
    for handle in handles:
        scene.emit(handle.id, num=3)
        scene.settle(handle.id, offset=3, num=1)
    for thread in threads:
        thread.join()

    assert found == {handle.id: scene.tokens(1, 0, 4) for handle in handles}


async def test_many_streams_of_one_request_on_several_clients(
    scene: Scene, client: AsyncClient, redis_url: str, namespace: str
) -> None:
    """From the first token and from others, early and late."""
    handle = await client.enqueue("x", max_tokens=9)
    async with AsyncClient(settings=Settings(redis_url=redis_url, namespace=namespace)) as second:
        other = await second.get(handle.id)
        reading = [asyncio.create_task(tokens_of(h, after=a)) for h in (handle, other) for a in (0, 1, 4)]
        await follows(scene, handle, number=2)
        start(scene, handle)
        scene.emit(handle.id, num=3)
        late = asyncio.create_task(tokens_of(other))
        scene.emit(handle.id, offset=3, num=3)
        scene.settle(handle.id, offset=6)
        found = await asyncio.gather(*reading, late)

    assert found == [scene.tokens(1, a, 6 - a) for a in (0, 1, 4, 0, 1, 4, 0)]
    check(scene)


async def test_a_worker_that_sends_no_news_is_followed_all_the_same(scene: Scene, client: AsyncClient) -> None:
    """Of the release before: it knows the output stream only. Its streams go on, also before their end."""
    handle = await client.enqueue("x", max_tokens=9)
    start(scene, handle)
    stream = handle.stream(timeout=300)
    begun = asyncio.ensure_future(anext(stream))
    for turn in range(3):
        await follows(scene, handle)
        scene.raw.hdel(scene.keys.request(handle.id), "followers")
        scene.emit(handle.id, offset=2 * turn, num=2)
        assert list((await begun).token_ids) == scene.tokens(1, 2 * turn, 2)
        begun = asyncio.ensure_future(anext(stream))
    scene.raw.hdel(scene.keys.request(handle.id), "followers")
    scene.settle(handle.id, offset=6)
    assert (await begun).text == "end"
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_news_that_are_lost_are_read_from_the_output(scene: Scene, client: AsyncClient) -> None:
    """The stream of news is deleted again and again, as by a failover."""
    handle = await client.enqueue("x", max_tokens=99)
    start(scene, handle)
    reading = asyncio.create_task(tokens_of(handle))
    await follows(scene, handle)
    news = scene.keys.news(client._core.client_id)
    for turn in range(20):
        scene.emit(handle.id, offset=2 * turn, num=2)
        if turn % 3:
            scene.raw.delete(news)
        await asyncio.sleep(0.01)
    scene.settle(handle.id, offset=40)
    assert await reading == scene.tokens(1, 0, 40)


async def test_large_output_is_read_where_it_is_stored(scene: Scene, client: AsyncClient) -> None:
    """News tell of it, and do not carry it."""
    handle = await client.enqueue("x", max_tokens=99)
    start(scene, handle)
    reading = asyncio.create_task(tokens_of(handle))
    await follows(scene, handle)
    scene.emit(handle.id, num=500)
    scene.emit(handle.id, offset=500, num=1)
    scene.settle(handle.id, offset=501)
    assert await reading == scene.tokens(1, 0, 501)
    news = scene.raw.xrange(scene.keys.news(client._core.client_id))
    assert sum(len(value) for _, values in news for value in values.values()) < 1000


async def test_clients_that_never_stream_cost_nothing(scene: Scene, client: AsyncClient) -> None:
    """Neither a field of the record nor news; and a result waits for the end alone."""
    handle = await client.enqueue("x", max_tokens=9)
    start(scene, handle)
    waiting = asyncio.create_task(handle.result(timeout=300))
    await until(lambda: true(not client._listener._demux.is_idle))
    scene.emit(handle.id)
    scene.settle(handle.id, offset=2)
    assert (await waiting).token_ids == tuple(scene.tokens(1, 0, 2))
    assert scene.raw.hget(scene.keys.request(handle.id), "followers") is None
    assert scene.raw.exists(scene.keys.news(client._core.client_id)) == 0


async def test_an_outcome_other_than_done_follows_the_last_chunk(scene: Scene, client: AsyncClient) -> None:
    """Cancelled in the middle, and failed before the beginning."""
    cancelled, failed = await client.enqueue_many(["x", "y"], max_tokens=9)
    start(scene, cancelled, failed)
    scene.emit(cancelled.id)
    stream = cancelled.stream(timeout=300)
    assert (await anext(stream)).offset == 2
    assert await cancelled.cancel()
    with pytest.raises(RequestCancelled):
        await anext(stream)
    scene.settle(failed.id, state=RequestState.FAILED)
    with pytest.raises(RequestFailed):
        await tokens_of(failed)


async def test_a_closed_client_ends_its_waits(scene: Scene, client: AsyncClient, blocking: Client) -> None:
    """They do not wait for ever for what nobody reads."""
    handle = await client.enqueue("x", max_tokens=9)
    waits = [asyncio.create_task(tokens_of(handle)), asyncio.create_task(handle.result())]
    other = blocking.get(handle.id)
    thread = asyncio.create_task(asyncio.to_thread(other.result))
    await follows(scene, handle, number=2)
    await client.close()
    blocking.close()
    for wait in (*waits, thread):
        with pytest.raises(ServiceUnavailable, match="closed"):
            await wait
    finished(scene, handle)
    assert (await handle.result(timeout=300)).output_tokens == 5
    assert await asyncio.to_thread(other.result, timeout=300) == await handle.result(timeout=0)
    await client.close()
    blocking.close()


@pytest.mark.parametrize("timeout_s", [1.0, None])
async def test_a_client_that_is_closed_as_a_wait_begins_ends_it(
    client: AsyncClient, timeout_s: float | None
) -> None:
    """What it has not yet asked the server is not left unanswered, and no reader stays."""
    handle = await client.enqueue("x", max_tokens=9)
    wait = asyncio.create_task(handle.result(timeout=timeout_s))
    await asyncio.sleep(0)  # one turn: its question waits for the task that sends
    await client.close()
    with pytest.raises(ServiceUnavailable, match="closed"):
        await wait
    assert client._listener._reader is None or client._listener._reader.done()


async def test_an_abandoned_stream_leaves_no_reader(scene: Scene, client: AsyncClient) -> None:
    """The first chunk was enough."""
    handle = await client.enqueue("x", max_tokens=9)
    start(scene, handle)
    scene.emit(handle.id)
    async for chunk in handle.stream():
        assert chunk.offset == 2
        break
    await until(lambda: true(client._listener._reader is None or client._listener._reader.done()))


async def test_an_abandoned_stream_is_unfollowed(scene: Scene, client: AsyncClient) -> None:
    """By the next news of it, where the client waits for others."""
    handle, other = await client.enqueue_many(["x", "y"], max_tokens=99)
    start(scene, handle, other)
    scene.emit(handle.id)
    waiting = asyncio.create_task(tokens_of(other))
    async for _ in handle.stream():
        break
    await follows(scene, handle, other)
    scene.emit(handle.id, offset=2)

    async def is_unfollowed() -> bool:
        return not scene.raw.hexists(scene.keys.request(handle.id), "followers")

    await until(is_unfollowed)
    await follows(scene, other)
    scene.settle(other.id, num=1)
    assert await waiting == scene.tokens(1, 0, 1)


def test_a_fork_reads_for_itself(scene: Scene, blocking: Client) -> None:
    """A client that was made, and is used, before a server forks its processes."""
    own, other = blocking.enqueue_many(["x", "y"], max_tokens=9)
    start(scene, own, other)
    found: list[list[int]] = []

    def read(handle: Handle) -> list[int]:
        return [t for chunk in handle.stream(timeout=300) for t in chunk.token_ids]

    thread = threading.Thread(target=lambda: found.append(read(own)))
    thread.start()
    asyncio.run(follows(scene, own))
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    with blocking._listener._lock:  # as the reader may hold it
        child = context.Process(target=lambda: theirs.send(read(other)))
        child.start()
    asyncio.run(follows(scene, other))
    for handle in (own, other):
        scene.emit(handle.id)
        scene.settle(handle.id, offset=2, num=1)
    thread.join()
    assert ours.poll(50)
    assert [ours.recv(), *found] == [scene.tokens(1, 0, 3)] * 2
    child.join()


_FEW = """
import asyncio, resource, sys
from l4queue import AsyncClient, Client, Settings
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
settings = Settings(redis_url=sys.argv[1], namespace=sys.argv[2])

async def main():
    async with AsyncClient(settings=settings) as client:
        handles = await client.enqueue_many(["x"] * 1000, max_tokens=2)
        async def read(handle):
            try:
                return [t async for chunk in handle.stream() for t in chunk.token_ids]
            except Exception as error:
                return repr(error)
        reading = [asyncio.create_task(read(handle)) for handle in handles]
        while len(client._listener._demux._watches) < 1000:
            await asyncio.sleep(0.01)
        cancelled = await asyncio.gather(*(handle.cancel() for handle in handles))
        assert all(cancelled)
        outcomes = await asyncio.gather(*reading)
        assert all("RequestCancelled" in str(one) for one in outcomes), outcomes[:3]

asyncio.run(main())
print("fine")
"""


def test_1000_streams_need_few_file_descriptors(redis_url: str, namespace: str) -> None:
    """`ulimit -n 256`."""
    command = [sys.executable, "-c", _FEW, redis_url, namespace]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr[-2000:]


def test_a_client_on_a_second_event_loop_is_told(redis_url: str, namespace: str) -> None:
    """Its connections belong to the first, whose requests they would answer; closed, it may begin anew."""
    client = AsyncClient(settings=Settings(redis_url=redis_url, namespace=namespace))
    handle = asyncio.run(client.enqueue("x", max_tokens=9))

    async def waits() -> None:
        for wait in (handle.status(), handle.result(timeout=300), client.enqueue("y", max_tokens=9)):
            with pytest.raises(RuntimeError, match="another event loop"):
                await wait

    asyncio.run(waits())

    async def anew() -> RequestState:
        async with AsyncClient(settings=Settings(redis_url=redis_url, namespace=namespace)) as other:
            await other.close()
            return (await (await other.get(handle.id)).status()).state

    assert asyncio.run(anew()) is RequestState.SUBMITTED
