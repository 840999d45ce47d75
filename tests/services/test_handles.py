"""Handles and clients against a real Redis: other processes, other event loops, a server that is away."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import redis

from l4queue import (
    AsyncClient,
    AsyncHandle,
    Client,
    Handle,
    QueueFull,
    RequestState,
    ServiceUnavailable,
    Settings,
)
from l4queue.protocol.executor import Executor
from tests.protocol.server import RedisServer
from tests.services.pipeline import Pipeline
from tests.services.processes import until

pytestmark = pytest.mark.services
READ = """
import pickle, sys
handle = pickle.loads(bytes.fromhex(sys.argv[1]))
print(handle, handle.status().state, handle.cancel(), handle == pickle.loads(pickle.dumps(handle)), sep="|")
"""


def test_a_handle_is_used_in_another_process(blocking: Client, redis_url: str) -> None:
    """It brings its place; that process has other settings."""
    handle = blocking.enqueue("x", max_tokens=9)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("L4_")}
    words = [sys.executable, "-c", READ, pickle.dumps(handle).hex()]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"<Handle {handle.id}: cancelled, 0 output tokens>|submitted|True|True\n"
    assert handle.status().state is RequestState.CANCELLED
    assert blocking.get(pickle.loads(pickle.dumps(handle))) == handle


def test_a_handle_outlives_its_client(redis_url: str, namespace: str) -> None:
    """Where it was pickled, a new connection is made: the old client was closed."""
    with Client(redis_url, settings=Settings(namespace=namespace)) as client:
        handle = pickle.loads(pickle.dumps(client.enqueue("x", max_tokens=9)))
    assert handle.status().state is RequestState.SUBMITTED
    assert handle._client is not client
    handle._client.close()


def test_an_asyncio_handle_is_used_on_another_event_loop(redis_url: str, namespace: str) -> None:
    """Each loop has a client of its own."""

    async def enqueue() -> bytes:
        async with AsyncClient(redis_url, settings=Settings(namespace=namespace)) as client:
            return pickle.dumps(await client.enqueue("x", max_tokens=9))

    async def look(handle: AsyncHandle) -> RequestState:
        try:
            return (await handle.status()).state
        finally:
            await handle._client.close()

    handle = pickle.loads(asyncio.run(enqueue()))
    assert [asyncio.run(look(handle)) for _ in range(2)] == [RequestState.SUBMITTED] * 2


def test_handles_in_an_error_pass_between_processes(redis_url: str, namespace: str) -> None:
    """As handles."""
    settings = Settings(redis_url=redis_url, namespace=namespace, max_backlog_tokens=20)
    with Client(settings=settings) as client:
        with pytest.raises(QueueFull) as caught:
            client.enqueue_many(["x"] * 5, max_tokens=9, block=False)
        again = pickle.loads(pickle.dumps(caught.value))
        assert again.accepted == caught.value.accepted
        assert [handle.status().state for handle in again.accepted] == [RequestState.SUBMITTED] * 2


async def test_a_notebook_shows_state_and_lengths(pipeline: Pipeline, blocking: Client) -> None:
    """`repr` tells the last that was seen; the table of a blocking handle looks again."""
    pipeline.start("w0")
    handle = await pipeline.client.enqueue("hello", max_tokens=7)
    shown: Handle = blocking.get(handle.id)
    assert "output tokens" not in repr(handle)
    await handle.result()
    assert repr(handle) == f"<AsyncHandle {handle.id}: done, 5 prompt tokens, 7 output tokens>"
    table = await asyncio.to_thread(shown._repr_html_)
    assert "<tr><th>state</th><td>done</td></tr>" in table
    assert "<tr><th>output tokens</th><td>7</td></tr>" in table
    assert handle._repr_html_() == table
    status = await handle.status()
    assert status.is_finished
    assert status.submitted_at_s <= status.finished_at_s
    assert status.e2e_s == pytest.approx(status.finished_at_s - status.submitted_at_s, abs=1e-3)


async def test_a_ping_tells_whether_redis_is_there(client: AsyncClient, blocking: Client) -> None:
    """And how far away it is."""
    assert 0 < blocking.ping() < 60
    assert 0 < await client.ping() < 60


def test_a_handle_looks_as_it_last_did_while_redis_is_away(durable_server: RedisServer) -> None:
    """Neither `repr` nor the table of a notebook raises."""
    with Client(durable_server.url, timeout_s=0) as client:
        handle = client.enqueue("x", max_tokens=9)
        handle.status()
        durable_server.kill()
        for call in (client.ping, handle.status, lambda: client.enqueue("y")):
            with pytest.raises(ServiceUnavailable):
                call()
        assert repr(handle) == f"<Handle {handle.id}: submitted>"
        assert "<td>submitted</td>" in handle._repr_html_()


@contextmanager
def refusing() -> Iterator[tuple[str, list[int]]]:
    """A server that hangs up at once; its URL, and a list with an entry for each who came."""
    came: list[int] = []

    class Refusal(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            came.append(1)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Refusal) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"redis://127.0.0.1:{server.server_address[1]}/0", came
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("timeout_s", "longest_s"), [(0, 1), (2, 2), (10, 10), (60, 30)])
def test_a_blocking_read_is_no_longer_than_the_patience(timeout_s: float, longest_s: float) -> None:
    """A server that hangs amid one is not noticed before; services wait for it anyhow."""
    with Client("redis://127.0.0.1:1/0", timeout_s=timeout_s) as client:
        assert client._executor.longest_read_s == longest_s
    executor = Executor("redis://127.0.0.1:1/0", retry_s=None)
    assert executor.longest_read_s == 30
    executor.close()


def test_a_wait_ends_where_its_server_hangs(durable_server: RedisServer, namespace: str) -> None:
    """Its connections stay open: the blocking read has to end first."""
    settings = Settings(redis_url=durable_server.url, namespace=namespace)
    with Client(settings=settings, timeout_s=0.1) as client:
        handle = client.enqueue("x", max_tokens=9)
        with ThreadPoolExecutor(1) as pool, redis.Redis.from_url(durable_server.url) as admin:
            waiting = pool.submit(handle.result)
            until(lambda: any("b" in one["flags"] for one in admin.client_list()), "it waits")
            os.kill(durable_server.pid, signal.SIGSTOP)
            try:
                assert isinstance(waiting.exception(), ServiceUnavailable)
            finally:
                os.kill(durable_server.pid, signal.SIGCONT)


async def test_a_client_tries_as_long_as_it_is_told() -> None:
    """Once with 0, again and again with more; the error comes in any case."""
    with refusing() as (url, came):
        with Client(url, timeout_s=0) as client, pytest.raises(ServiceUnavailable):
            client.ping()
        assert len(came) == 1
        async with AsyncClient(url, timeout_s=0) as other:
            with pytest.raises(ServiceUnavailable):
                await other.ping()
        assert len(came) == 2
        with Client(url, timeout_s=0.5) as client, pytest.raises(ServiceUnavailable):
            client.ping()
        assert len(came) > 3
