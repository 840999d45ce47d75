"""The connection that tasks share: everyone gets the own reply, whatever breaks, hangs or is cancelled."""

from __future__ import annotations

import asyncio
import os
import signal
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4queue.errors import ServiceUnavailable
from l4queue.protocol.calls import Call, Verdict
from l4queue.protocol.executor import AsyncExecutor, Executor
from l4queue.protocol.foreign import text
from l4queue.protocol.reads import parse_entries
from tests.protocol.scene import Scene
from tests.protocol.server import VOLATILE, RedisServer
from tests.protocol.spoiler import Spoiler, Spoiling

MiB = 1 << 20


def echo(word: str) -> Call[str]:
    """A call whose reply tells whose it is."""
    return Call(None, (), ("ECHO", word), text)


def plain(*words: Any) -> Call[Any]:
    """A command as it is."""
    return Call(None, (), words, lambda reply: reply)


class Callers:
    """Tasks that each ask for what only they know."""

    def __init__(self, executor: AsyncExecutor) -> None:
        self.executor = executor
        self.num_right = 0
        self._number = 0

    async def ask(self, num_calls: int = 1) -> None:
        """One that asks; an assertion error when it is told what another asked for."""
        self._number += 1
        words = [f"{self._number}-{i}" for i in range(num_calls)]
        if num_calls == 1:
            found = [await self.executor.run(echo(words[0]))]
        else:
            found = await self.executor.run_many([echo(word) for word in words])
        assert found == words
        self.num_right += 1


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Wait for it; what hangs is ended by the test's own time limit."""
    while not await holds():  # noqa: ASYNC110  # another process is looked at
        await asyncio.sleep(0.005)


STEPS = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3), st.integers(-1, 12)), min_size=1, max_size=30)
"""Of each caller: its commands, turns of the loop before the next begins, turns until its cancel; -1: never."""


@settings(max_examples=40, deadline=None)
@given(steps=STEPS)
def test_every_caller_that_survives_gets_its_own_reply(redis_server: RedisServer, steps: list[Any]) -> None:
    """Any mixture of single calls, batches and cancels on one connection."""

    async def play() -> None:
        executor = AsyncExecutor(redis_server.url, max_connections=1)
        callers, tasks = Callers(executor), list[asyncio.Task[None]]()
        turn = 0
        due: dict[int, list[asyncio.Task[None]]] = {}
        for num_calls, pause, patience in steps:
            task = asyncio.create_task(callers.ask(num_calls))
            tasks.append(task)
            if patience >= 0:
                due.setdefault(turn + patience, []).append(task)
            for _ in range(pause):
                for one in due.pop(turn, ()):
                    one.cancel()
                await asyncio.sleep(0)
                turn += 1
        for later in due.values():
            for one in later:
                one.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert not [end for end in ends if end is not None and not isinstance(end, asyncio.CancelledError)]
        assert sum(end is None for end in ends) >= sum(patience < 0 for *_, patience in steps)
        await callers.ask(3)
        await executor.close()

    asyncio.run(play())


@pytest.mark.parametrize("plan", ["hang", "close", "garbage"])
async def test_a_spoilt_reply_is_nobodys(redis_server: RedisServer, plan: Spoiling) -> None:
    """A server that hangs or hangs up amid a reply, or says something else: all get their own on the next try."""
    async with Spoiler(redis_server.port) as proxy:
        executor = AsyncExecutor(proxy.url, retry_s=60.0, socket_timeout_s=0.5)
        callers = Callers(executor)
        await callers.ask()
        proxy.plan = plan
        await asyncio.gather(*(callers.ask(1 + index % 3) for index in range(40)))
        assert callers.num_right == 41
        assert proxy.plan is None
        assert proxy.num_connections >= 2
        await executor.close()


async def test_what_nobody_asked_for_breaks_the_connection(redis_server: RedisServer) -> None:
    """Or the next one would be told it."""
    async with Spoiler(redis_server.port) as proxy:
        executor = AsyncExecutor(proxy.url, retry_s=60.0)
        callers = Callers(executor)
        proxy.plan = "unasked"
        await callers.ask()
        for _ in range(20):
            await callers.ask()
        assert proxy.num_connections >= 2
        await executor.close()


async def test_the_clock_of_a_reply_runs_from_the_one_before(redis_server: RedisServer) -> None:
    """Two that take 0.5 s each on one connection, with a limit of 0.8 s: neither they nor what follows fail."""
    executor = AsyncExecutor(redis_server.url, retry_s=0.0, socket_timeout_s=0.8, max_connections=1)
    slow = plain("WAIT", 1, 500)  # there is no replica
    await executor.run(echo("before"))
    await asyncio.sleep(0.5)  # idle
    assert await executor.run_many([slow, slow, echo("after")]) == [0, 0, "after"]
    with pytest.raises(ServiceUnavailable, match="Timeout reading"):
        await executor.run_many([plain("WAIT", 1, 60_000), echo("after")])
    await executor.close()


async def test_a_hung_server_is_noticed_by_all_at_once(redis_executable: str, tmp_path: Path) -> None:
    """Stopped by SIGSTOP: each of many callers waits for one limit, not for those before it."""
    server = RedisServer(redis_executable, tmp_path).start()
    executor = AsyncExecutor(server.url, retry_s=0.0, socket_timeout_s=0.5)
    try:
        await executor.run(echo("a"))
        os.kill(server.pid, signal.SIGSTOP)
        began_s = asyncio.get_running_loop().time()
        ends = await asyncio.gather(*(executor.run(echo("b")) for _ in range(50)), return_exceptions=True)
        assert asyncio.get_running_loop().time() - began_s < 0.5 * 50
        assert {str(end) for end in ends} == {
            f"Redis at {server.url} cannot be reached (Timeout reading from 127.0.0.1:{server.port}); "
            "try `l4queue doctor`"
        }
        with pytest.raises(ServiceUnavailable, match="Timeout"):  # nor does it take anything
            await executor.run_many([echo("x" * MiB)] * 20)
    finally:
        os.kill(server.pid, signal.SIGCONT)
        await executor.close()
        server.kill()


async def test_a_slow_server_is_not_a_hung_one(redis_server: RedisServer) -> None:
    """One that takes 32 MiB in about two seconds, and answers then, with a limit of one."""
    async with Spoiler(redis_server.port, pause_s=0.003) as proxy:
        executor = AsyncExecutor(proxy.url, retry_s=0.0, socket_timeout_s=1.0)
        assert len(await executor.run(echo("x" * (32 * MiB)))) == 32 * MiB
        assert proxy.num_connections == 1
        await executor.close()


async def _connections(watcher: Executor, name: str) -> list[str]:
    listed = await asyncio.to_thread(watcher.run, plain("CLIENT", "LIST"))
    return [line for line in listed.decode().splitlines() if f" name={name} " in line]


async def test_many_callers_share_few_connections(redis_server: RedisServer, namespace: str) -> None:
    """With its name set; all are gone after the close, and a close amid calls leaves each its reply."""
    executor, watcher = AsyncExecutor(f"{redis_server.url}?client_name={namespace}"), Executor(redis_server.url)
    callers = Callers(executor)
    await asyncio.gather(*(callers.ask(1 + index % 3) for index in range(300)))
    assert len(await _connections(watcher, namespace)) == 1
    tasks = [asyncio.create_task(callers.ask()) for _ in range(50)]
    await asyncio.sleep(0)
    await executor.close()
    await asyncio.gather(*tasks)
    await executor.close()
    await until(lambda: _is_none(_connections(watcher, namespace)))
    watcher.close()


async def _is_none(listed: Awaitable[list[str]]) -> bool:
    return not await listed


async def test_a_cancelled_wait_leaves_nothing_blocked(redis_server: RedisServer, namespace: str) -> None:
    """And the connection of one that ended serves the next."""
    executor, watcher = AsyncExecutor(f"{redis_server.url}?client_name={namespace}"), Executor(redis_server.url)

    async def num_blocked(number: int) -> bool:
        return sum(" cmd=xread " in line for line in await _connections(watcher, namespace)) == number

    for _ in range(3):
        assert await executor.wait({f"{namespace}:none": "0-0"}, block_s=0.001) == {}
    assert await num_blocked(1)
    tasks = [asyncio.create_task(executor.wait({f"{namespace}:none": "0-0"}, block_s=60.0)) for _ in range(5)]
    await until(lambda: num_blocked(5))
    await Callers(executor).ask()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    await until(lambda: num_blocked(0))
    await executor.close()
    watcher.close()


@pytest.mark.parametrize("num_tasks", [1, 64])
async def test_bodies_of_100_megabytes_are_not_copied_at_once(redis_server: RedisServer, num_tasks: int) -> None:
    """In one batch, or from tasks side by side; a small call passes them."""
    body, each = "x" * (400 * 1024), 256 // num_tasks
    executor = AsyncExecutor(redis_server.url)
    await executor.run(echo("a"))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    write = Call(None, (), ("SETRANGE", "{thin}:body", 0, body), int)
    tasks = [asyncio.create_task(executor.run_many([write] * each)) for _ in range(num_tasks)]
    await asyncio.sleep(0)
    assert await executor.run(echo("b")) == "b"
    assert {n for found in await asyncio.gather(*tasks) for n in found} == {len(body)}
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert peak < 12 * MiB
    await executor.run(plain("DEL", "{thin}:body"))
    await executor.close()


async def test_a_big_reply_arrives_whole(redis_server: RedisServer) -> None:
    """32 MiB, between small ones."""
    executor = AsyncExecutor(redis_server.url)
    size = 32 * MiB
    found = await executor.run_many(
        [
            plain("SETRANGE", "{thin}:big", size - 1, "x"),
            plain("GET", "{thin}:big"),
            echo("after"),
            plain("DEL", "{thin}:big"),
        ]
    )
    assert (found[0], len(found[1]), found[2]) == (size, size, "after")
    await executor.close()


async def test_an_idle_connection_is_asked_first(redis_server: RedisServer, namespace: str) -> None:
    """With redis-py's `health_check_interval`: a PING before the command, and its reply is nobody's."""
    url = f"{redis_server.url}?health_check_interval=0.2"
    executor, watcher = AsyncExecutor(url, max_connections=1), Executor(redis_server.url)
    callers = Callers(executor)

    async def num_pings() -> int:
        stats = await asyncio.to_thread(watcher.run, plain("INFO", "commandstats"))
        return int(stats.get("cmdstat_ping", {"calls": 0})["calls"])

    await callers.ask()
    before = await num_pings()
    for _ in range(2):
        await asyncio.sleep(0.3)  # idle
        await callers.ask(2)
        await callers.ask(2)
    assert await num_pings() >= before + 2
    await executor.close()
    watcher.close()


def _rows(key: str) -> list[tuple[Any, ...]]:
    h, z, s, x = (f"{key}:{kind}" for kind in "hzsx")
    return [
        ("HSET", h, "a", 1, "b", "é"),
        ("ZADD", z, 1.5, "one", 2, "two"),
        ("SADD", s, "only"),
        ("XADD", x, "1-1", "f", "v"),
        ("XADD", x, "1-2", "g", b"\xff"),
        ("SET", f"{key}:t", "text"),
        ("GET", f"{key}:t"),
        ("HGETALL", h),
        ("HMGET", h, "a", "none"),
        ("HEXISTS", h, "a"),
        ("ZRANGE", z, 0, -1, "WITHSCORES"),
        ("ZSCORE", z, "one"),
        ("ZRANGE", z, 0, -1),
        ("ZCARD", z),
        ("SMEMBERS", s),
        ("XRANGE", x, "-", "+"),
        ("XREVRANGE", x, "+", "-", "COUNT", 1),
        ("XREAD", "COUNT", 5, "STREAMS", x, "0-0"),
        ("XLEN", x),
        ("PTTL", h),
        ("PEXPIRE", h, 100_000),
        ("CONFIG", "GET", "maxmemory"),
        ("PING",),
        ("DEL", h, z, s, x, f"{key}:t"),
    ]


def _read(*words: Any) -> Call[Any]:
    """A command as it is, but for entries of streams: `parse_entries` reads these."""
    if words[0] in ("XRANGE", "XREVRANGE"):
        return Call(None, (), words, parse_entries)
    if words[0] == "XREAD":
        return Call(None, (), words, lambda reply: [(key, parse_entries(entries)) for key, entries in reply])
    return plain(*words)


async def test_both_executors_read_replies_alike(redis_server: RedisServer, namespace: str) -> None:
    """Every plain command that is used, alone and in a batch, and their refusals."""
    executor, blocking = AsyncExecutor(redis_server.url), Executor(redis_server.url)
    rows = _rows(f"{{{namespace}}}")
    calls = [_read(*row) for row in rows]
    expected = await asyncio.to_thread(blocking.run_many, calls)
    assert await executor.run_many(calls) == expected
    assert [await executor.run(call) for call in calls] == expected
    assert [await asyncio.to_thread(blocking.run, call) for call in calls] == expected
    changing = (plain("INFO", "server"), plain("TIME"), plain("SCAN", 0, "COUNT", 1))
    assert [type(value) for value in await executor.run_many(changing)] == [dict, tuple, tuple]
    for wrong in (("NOSUCH",), ("GET",), ("SET", "{x}:a", None), ("SET", "{x}:a", True), ("EVAL", "x(", 0)):
        said = set[str]()
        for executed in (executor.run(plain(*wrong)), asyncio.to_thread(blocking.run, plain(*wrong))):
            with pytest.raises(ServiceUnavailable) as caught:
                await executed
            said.add(str(caught.value))
        assert len(said) == 1
    await executor.close()
    blocking.close()


@pytest.mark.parametrize("login", [":wrong@", "nobody:wrong@", ""])
async def test_refused_credentials_are_told_alike(redis_executable: str, tmp_path: Path, login: str) -> None:
    """By both executors, of a short command and of a long batch; without the password."""
    server = RedisServer(redis_executable, tmp_path, password="right").start()
    url = server.url.replace("redis://", f"redis://{login}")
    executor, blocking = AsyncExecutor(url, retry_s=0.0), Executor(url, retry_s=0.0)
    said = set[str]()
    try:
        for calls in ([echo("a")], [echo("x" * MiB)] * 8):
            for executed in (executor.run_many(calls), asyncio.to_thread(blocking.run_many, calls)):
                with pytest.raises(ServiceUnavailable, match="refuses the credentials") as caught:
                    await executed
                said.add(str(caught.value))
    finally:
        await executor.close()
        blocking.close()
        server.kill()
    assert not [one for one in said if "wrong" in one or "right" in one]
    assert login == "" or len(said) == 1


async def test_writes_are_confirmed_by_the_replica(redis_executable: str, tmp_path: Path) -> None:
    """With replicas=1, from many tasks at once; without the replica the call is refused."""
    folders = [tmp_path / name for name in ("primary", "replica")]
    for folder in folders:
        folder.mkdir()
    primary = RedisServer(redis_executable, folders[0], (*VOLATILE, "--repl-diskless-sync-delay", "0")).start()
    replica = RedisServer(redis_executable, folders[1], ("--replicaof", "127.0.0.1", str(primary.port))).start()
    executor = AsyncExecutor(f"{primary.url}?replicas=1", retry_s=60.0, max_connections=8)
    hasty, raw = AsyncExecutor(f"{primary.url}?replicas=1", retry_s=0.0), Executor(primary.url)
    scene = Scene(raw, "confirmed")
    try:
        asks = [scene.calls.cancel(f"none{index}", reason="x") for index in range(40)]
        callers = Callers(executor)
        await executor.run(asks[0])
        waits = await asyncio.to_thread(_num_waits, raw)
        found = await asyncio.gather(*(executor.run(ask) for ask in asks), *(callers.ask() for _ in range(40)))
        assert found[:40] == [(Verdict.UNKNOWN, None)] * 40
        assert callers.num_right == 40
        assert await asyncio.to_thread(_num_waits, raw) == waits + 1, "those of one turn share it"
        replica.kill()
        await asyncio.to_thread(raw.run, plain("INCR", "{confirmed}:more"))
        with pytest.raises(ServiceUnavailable, match="0 of 1 replicas have what was written"):
            await hasty.run(asks[0])
    finally:
        await executor.close()
        await hasty.close()
        scene.close()
        raw.close()
        for server in (replica, primary):
            server.kill()


def _num_waits(executor: Executor) -> int:
    return int(executor.run(plain("INFO", "commandstats"))["cmdstat_wait"]["calls"])
