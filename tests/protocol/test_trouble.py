"""What Redis refuses: which errors are waited for, what is said of them, and how clients and services differ."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import redis.exceptions as rx
from hypothesis import given
from hypothesis import strategies as st
from redis._parsers.base import BaseParser

from l4queue.errors import ServiceUnavailable
from l4queue.protocol import trouble as trouble_module
from l4queue.protocol.calls import Call, Verdict
from l4queue.protocol.executor import AsyncExecutor, Executor
from l4queue.protocol.trouble import FAILURES, Outage, Trouble, trouble_of
from l4queue.protocol.wire import ServerFull, explain
from tests.protocol.scene import Scene
from tests.protocol.server import RedisServer

PASSING = {
    "LOADING Redis is loading the dataset in memory": Trouble.AWAY,
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.": Trouble.FAILOVER,
    "READONLY You can't write against a read only replica.": Trouble.FAILOVER,
    "READONLY You can't write against a read only replica. script: 3b5, on @user_script:9.": Trouble.FAILOVER,
    "ERR Error running script (call to f_3b5): @user_script:9: -READONLY You can't write": Trouble.FAILOVER,
    "UNBLOCKED force unblock from blocking operation, instance state changed": Trouble.FAILOVER,
    "CLUSTERDOWN Hash slot not served": Trouble.CLUSTER,
    "TRYAGAIN Multiple keys request during rehashing of slot": Trouble.CLUSTER,
    "MOVED 3999 127.0.0.1:6381": Trouble.CLUSTER,
    "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.": Trouble.BUSY,
    "ERR Script killed by user with SCRIPT KILL... script: 1ff, on @user_script:1.": Trouble.BUSY,
    "ERR Error running script (call to f_1): @user_script:1: Script killed by user with SCRIPT": Trouble.BUSY,
    "OOM command not allowed when used memory > 'maxmemory'.": Trouble.MEMORY,
    "ERR Error running script (call to f_1): -OOM command not allowed when used memory > 'x'.": Trouble.MEMORY,
    "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to": Trouble.DISK,
    "MISCONF Errors writing to the AOF file: No space left on device": Trouble.DISK,
    "ERR Error running script (call to f_1): @user_script:5: @user_script: 5: -MISCONF Redis is": Trouble.DISK,
    "NOAUTH Authentication required.": Trouble.LOGIN,
    "WRONGPASS invalid username-password pair or user is disabled.": Trouble.LOGIN,
    "ERR invalid password": Trouble.LOGIN,
    "ERR AUTH <password> called without any password configured for the default user.": Trouble.LOGIN,
    "ERR Protocol error: unauthenticated multibulk length": Trouble.LOGIN,
    "DENIED Redis is running in protected mode because protected mode is enabled": Trouble.LOGIN,
    "NOPERM this user has no permissions to run the 'evalsha' command": Trouble.RIGHTS,
    "ERR ACL failure in script: No permissions to access a key": Trouble.RIGHTS,
    "ERR Error running script: The user executing the script can't run this command": Trouble.RIGHTS,
    "ERR max number of clients reached": Trouble.CLIENTS,
    "ERR max number of clients + cluster connections reached": Trouble.CLIENTS,
    "NOREPLICAS Not enough good replicas to write.": Trouble.REPLICAS,
    "ERR DB index is out of range": Trouble.DATABASE,
    "ERR Protocol error: invalid bulk length": Trouble.PROTOCOL,
    "QUOTA of this tenant is used up": Trouble.OTHER,
}
DEFECTS = (
    "ERR unknown command 'NOSUCH', with args beginning with: ",
    "ERR wrong number of arguments for 'get' command",
    "ERR value is not an integer or out of range",
    "ERR user_script:3: attempt to index a nil value, script: 3b5, on @user_script:3.",
    "ERR Error running script (call to f_1): @user_script:3: user_script:3: attempt to compare nil with number",
    "WRONGTYPE Operation against a key holding the wrong kind of value",
    "CROSSSLOT Keys in request don't hash to the same slot",
    "odd text without a code",
)


@pytest.mark.parametrize(("text", "trouble"), PASSING.items())
def test_what_passes_is_told_by_its_kind(text: str, trouble: Trouble) -> None:
    """As the library's parser reads it, from Redis 6.2 to 8 and Valkey; the text names the address."""
    error = BaseParser.parse_error(text)

    assert trouble_of(error) is trouble
    said = explain(error, "redis://:secret@host:6379/0")
    assert isinstance(said, ServerFull) is (trouble is Trouble.MEMORY)
    assert str(said).startswith("Redis at redis://***@host:6379/0 ")


@pytest.mark.parametrize("text", DEFECTS)
def test_defects_are_not_waited_for(text: str) -> None:
    """They end what runs into them."""
    error = BaseParser.parse_error(text)

    assert trouble_of(error) is None
    assert "refused a command" in str(explain(error, "redis://host"))


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (rx.ConnectionError("Error -2 connecting to queue:6379. Name or service not known."), Trouble.AWAY),
        (rx.TimeoutError("Timeout reading from socket"), Trouble.AWAY),
        (ConnectionResetError(104, "Connection reset by peer"), Trouble.AWAY),
        (UnicodeError("label empty or too long"), Trouble.AWAY),
        (rx.ConnectionError("Error 1: [SSL: CERTIFICATE_VERIFY_FAILED] certificate has expired"), Trouble.TLS),
        (rx.InvalidResponse("Protocol Error: b'HTTP/1.1 400'"), Trouble.PROTOCOL),
        (ValueError("invalid literal for int() with base 10: b'x'"), Trouble.PROTOCOL),
        (rx.DataError("Invalid input of type: 'NoneType'"), None),
        (KeyError("x"), None),
    ],
    ids=str,
)
def test_connections_break_in_many_ways(error: Exception, trouble: Trouble | None) -> None:
    """Names that do not resolve, certificates that expired, and half-started servers are waited for."""
    assert trouble_of(error) is trouble
    assert trouble is None or isinstance(error, FAILURES)


@given(st.text())
def test_any_text_of_a_server_has_an_answer(text: str) -> None:
    """Also one that no release ever sent."""
    try:
        error = BaseParser.parse_error(text)
    except FAILURES as unreadable:  # a redirection without an address
        error = unreadable
    for known in (error, rx.ConnectionError(text)):
        assert trouble_of(known) in (None, *Trouble)


def _ping() -> Call[bool]:
    return Call(None, (), ("PING",), lambda reply: bool(reply))


@contextmanager
def _impostor(answer: bytes) -> Iterator[str]:
    """Something else that listens where Redis should; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer_all() -> None:
            try:
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(1000)
                        connection.sendall(answer)
            except OSError:
                return

        thread = threading.Thread(target=answer_all, daemon=True)
        thread.start()
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad\r\n\r\n", b":x\r\n", b"$x\r\n", b"-QUOTA used\r\n", b""], ids=str
)
async def test_clients_fail_typed_whatever_listens_there(answer: bytes) -> None:
    """After their own time, from both executors."""
    with _impostor(answer) as url:
        executor, async_executor = Executor(url, retry_s=0.05), AsyncExecutor(url, retry_s=0.05)
        with pytest.raises(ServiceUnavailable, match=r"Redis at redis://127\.0\.0\.1"):
            executor.run(_ping())
        with pytest.raises(ServiceUnavailable, match=r"Redis at redis://127\.0\.0\.1"):
            await async_executor.run(_ping())
        executor.close()
        await async_executor.close()


@pytest.mark.parametrize("url", ["redis://no-such-host.invalid:6379/0", "rediss://127.0.0.1:{port}/0"])
def test_names_and_certificates_fail_typed(redis_server: RedisServer, url: str) -> None:
    """A name that does not resolve, and TLS to a server without it."""
    executor = Executor(url.format(port=redis_server.port), retry_s=0.05)
    with pytest.raises(ServiceUnavailable, match="cannot be reached"):
        executor.run(_ping())
    executor.close()


@pytest.fixture(scope="module")
def full_server(redis_executable: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(redis_executable, tmp_path_factory.mktemp("full")).start()
    yield server
    server.kill()


@pytest.fixture
def full(full_server: RedisServer, namespace: str) -> Iterator[Scene]:
    """A server at its memory limit, which refuses `submit`."""
    executor = Executor(full_server.url, retry_s=0.05)
    scene = Scene(executor, namespace)
    scene.raw.config_set("maxmemory", 1)
    yield scene
    scene.raw.config_set("maxmemory", 0)
    scene.close()
    executor.close()


def _lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "l4queue.redis"]


def test_a_service_waits_and_says_so_once(full: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """For ever without `retry_s`. The blocking executor, from several threads."""
    executor = Executor(full.executor.url, retry_s=None)
    service = Scene(executor, full.keys.namespace)
    full.raw.config_set("maxmemory", 1)
    verdicts: list[Verdict] = []
    threads = [
        threading.Thread(target=lambda i=i: verdicts.append(service.submit(f"{i}").verdict)) for i in range(3)
    ]
    refused = full.raw.info("stats")["total_error_replies"]
    for thread in threads:
        thread.start()
    while full.raw.info("stats")["total_error_replies"] < refused + 10:
        continue
    assert not verdicts
    full.raw.config_set("maxmemory", 0)
    for thread in threads:
        thread.join()
    assert verdicts == [Verdict.OK] * 3
    service.close()
    executor.close()

    said = _lines(caplog)
    assert len(said) == 2
    assert "memory limit" in said[0]
    assert "serves again" in said[1]
    assert caplog.records[0].trouble == "memory"  # type: ignore[attr-defined]


def test_closing_ends_the_wait(full: Scene) -> None:
    """A thread that renews leases must not outlive its worker."""
    executor = Executor(full.executor.url, retry_s=None)
    service, errors = Scene(executor, full.keys.namespace), list[Exception]()

    def submit() -> None:
        try:
            service.submit()
        except ServiceUnavailable as error:
            errors.append(error)

    thread = threading.Thread(target=submit)
    refused = full.raw.info("stats")["total_error_replies"]
    thread.start()
    while full.raw.info("stats")["total_error_replies"] < refused + 3:
        continue
    executor.close()
    thread.join()

    assert len(errors) == 1


async def test_hints_are_offered_once(full: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """None while they are refused, even where everything else is waited for; a defect is raised all the same."""
    hint: Call[int] = Call(None, (), ("HSET", full.keys.counts, "hint", 1), int)
    defect: Call[int] = Call(None, (), ("NOSUCH",), int)
    executor, async_executor = (
        Executor(full.executor.url, retry_s=None),
        AsyncExecutor(full.executor.url, retry_s=None),
    )

    assert executor.offer(hint) is None
    assert await async_executor.offer(hint) is None
    for wrong in (defect, Call(None, (), ("GET",), int)):
        with pytest.raises(ServiceUnavailable, match="refused a command"):
            executor.offer(wrong)
        with pytest.raises(ServiceUnavailable, match="refused a command"):
            await async_executor.run(wrong)
    full.raw.config_set("maxmemory", 0)
    assert executor.offer(hint) == 1
    assert await async_executor.offer(hint) == 0
    executor.close()
    await async_executor.close()

    assert len(_lines(caplog)) == 2


def test_an_outage_is_over_when_what_failed_works_again(caplog: pytest.LogCaptureFixture) -> None:
    """Reads that go on while writes are refused do not end it; a broken connection is not said besides."""
    outage = Outage("redis://host:6379/0")
    outage.met(Trouble.DISK, "MISCONF x", {"emit", "renew"})
    outage.met(Trouble.AWAY, "reset", {"emit"})
    outage.passed({"plan", "emit"})
    assert len(_lines(caplog)) == 1
    outage.passed({"renew"})
    outage.passed({"renew"})
    outage.met(Trouble.DISK, "MISCONF x", {"take"})  # a reply that was late
    outage.passed({"take"})

    assert len(_lines(caplog)) == 2


@pytest.fixture(autouse=True)
def _listen(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is a process of its own in this: what failed in another is no outage of its."""
    monkeypatch.setattr(trouble_module, "_outages", {})
    caplog.set_level(logging.INFO, logger="l4queue.redis")
