"""Every form of Redis URL that the docs name, against a real server: queue and broker alike."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis
from flower.utils.broker import Broker
from kombu.exceptions import OperationalError

from dispatcher.flower import SocketBroker
from l4queue import AsyncClient, Client
from l4queue.config import Settings, load_settings
from l4queue.errors import ServiceUnavailable
from l4queue.protocol.calls import Call
from l4queue.protocol.executor import AsyncExecutor, Executor
from tests.protocol.server import RedisServer
from tests.services.processes import Processes, until
from tests.services.redis_sets import has_tls, make_certificate
from workers.app import make_app

pytestmark = [pytest.mark.services]

SPECIAL = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ äß€%41"
ENCODED = quote(SPECIAL, safe="")


class Place:
    """A server with a password full of special characters, a user of its own, TCP, a socket and TLS."""

    def __init__(self, binary: str, folder: Path) -> None:
        self.socket = folder / "my redis.sock"
        self.certificate, key = make_certificate(folder)
        files = (
            "--tls-cert-file",
            self.certificate,
            "--tls-key-file",
            key,
            "--tls-ca-cert-file",
            self.certificate,
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.tls_port = int(probe.getsockname()[1])
        tls = (*files, "--tls-auth-clients", "no", "--tls-port", str(self.tls_port))
        bind = ("--bind", "127.0.0.1", "::1") if _has_ipv6() else ()
        tls = tls if has_tls(binary) else ()
        options = ("--appendonly", "no", "--unixsocket", str(self.socket), *tls, *bind)
        self.has_tls = bool(tls)
        self.server = RedisServer(binary, folder, options, password=SPECIAL).start()
        with redis.Redis(port=self.server.port, password=SPECIAL) as client:
            client.execute_command("ACL", "SETUSER", "me", "on", f">{SPECIAL}", "+@all", "~*", "&*")

    def databases(self, namespace: str) -> list[int]:
        """Where this namespace has keys."""
        found = []
        for number in range(16):
            with redis.Redis(port=self.server.port, password=SPECIAL, db=number) as client:
                found += [number] if next(client.scan_iter(f"*{namespace}*", count=1000), None) else []
        return found

    def url(self, form: str) -> str:
        """One of the forms below with this server's places in it."""
        if form.startswith("rediss") and not self.has_tls:
            pytest.skip("this server was built without TLS")
        return form.format(
            port=self.server.port,
            tls=self.tls_port,
            password=ENCODED,
            user=f"me:{ENCODED}",
            socket=quote(str(self.socket)),
            ca=quote(self.certificate, safe=""),
        )


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def place(redis_executable: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    opened = Place(redis_executable, tmp_path_factory.mktemp("redis"))
    yield opened
    opened.server.kill()


FORMS = {
    "redis://:{password}@127.0.0.1:{port}": 0,
    "redis://:{password}@localhost:{port}/3": 3,
    "redis://default:{password}@127.0.0.1:{port}/?db=3": 3,
    "redis://127.0.0.1:{port}/3?password={password}": 3,
    "redis://{user}@127.0.0.1:{port}/2": 2,
    **({"redis://:{password}@[::1]:{port}/1": 1} if _has_ipv6() else {}),
    "redis://:{password}@127.0.0.1:{port}/0?client_name=me&health_check_interval=10&max_connections=50": 0,
    "redis://:{password}@127.0.0.1:{port}/0?socket_timeout=40&socket_connect_timeout=2&socket_keepalive=no": 0,
    "rediss://:{password}@127.0.0.1:{tls}/2?ssl_ca_certs={ca}": 2,
    "rediss://{user}@127.0.0.1:{tls}/2?ssl_ca_certs={ca}&ssl_check_hostname=true&ssl_min_version=771": 2,
    "rediss://:{password}@127.0.0.1:{tls}/2?ssl_cert_reqs=none": 2,
    "unix://:{password}@{socket}": 0,
    "unix://:{password}@{socket}?db=2": 2,
    "unix://{user}@{socket}?db=2": 2,
    "unix://{socket}?db=2&username=default&password={password}": 2,
}
"""Each with the database that it names."""


@pytest.mark.parametrize(("form", "database"), FORMS.items())
def test_it_works_for_the_queue(place: Place, form: str, database: int, namespace: str) -> None:
    """Blocking and asyncio, calls and waits, scripts included."""
    settings = load_settings(redis_url=place.url(form), namespace=namespace)
    executor = Executor(settings.redis_url, retry_s=0.0)
    with Client(settings=settings) as client:
        assert client.enqueue("hello", max_tokens=3).id
        assert executor.wait({"none": "0"}, block_s=0.01) == {}
    executor.close()

    async def again() -> str:
        async with AsyncClient(settings=settings) as other:
            return (await other.enqueue("hello", max_tokens=3)).id

    assert asyncio.run(again())
    assert place.databases(namespace) == [database]


@pytest.mark.parametrize(
    "form",
    [
        "redis://{user}@127.0.0.1:{port}/2",
        "rediss://{user}@127.0.0.1:{tls}/2?ssl_ca_certs={ca}",
        "unix://{user}@{socket}?db=2",
    ],
)
async def test_tasks_share_every_kind_of_connection(place: Place, form: str) -> None:
    """With long bodies, and a third of them cancelled."""
    executor = AsyncExecutor(place.url(form))

    async def ask(number: int) -> None:
        body = f"{number} " * 50_000
        calls = [Call(None, (), ("ECHO", body + str(index)), bytes.decode) for index in range(3)]
        assert await executor.run_many(calls) == [body + str(index) for index in range(3)]

    tasks = [asyncio.create_task(ask(number)) for number in range(60)]
    for task in tasks[::3]:
        await asyncio.sleep(0)
        task.cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(end) for end in ends[::3]} <= {asyncio.CancelledError, type(None)}
    assert ends[1::3] + ends[2::3] == [None] * 40
    await executor.close()


def _refusals(url: str) -> list[str]:
    """What the blocking and the asyncio executor say."""
    ping = Call(None, (), ("PING",), lambda reply: reply)
    executor, async_executor = Executor(url, retry_s=0.0), AsyncExecutor(url, retry_s=0.0)
    said = []
    for run in (lambda: executor.run(ping), lambda: asyncio.run(async_executor.run(ping))):
        with pytest.raises(ServiceUnavailable) as caught:
            run()
        said.append(str(caught.value))
    executor.close()
    return said


@pytest.mark.parametrize("form", FORMS)
def test_it_works_for_the_broker(place: Place, form: str, namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the database after the queue's, and as a setting of its own; Flower counts what waits there."""
    url = place.url(form)
    for settings in (
        Settings(redis_url=url, namespace=namespace),
        Settings(redis_url="redis+sentinel://s/q", celery_broker_url=url, namespace=namespace),
    ):
        with make_app(settings) as app, app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1)
            queue = connection.SimpleQueue("letters")
            queue.put({"a": 1})
            shown = connection.as_uri(include_password=True)
            options, tls = app.conf.broker_transport_options, app.conf.broker_use_ssl
            monkeypatch.setattr("flower.utils.broker.RedisSocket", SocketBroker)  # as our Flower does
            counted = asyncio.run(Broker(shown, broker_options=options, broker_use_ssl=tls).queues(["letters"]))
            message = queue.get(timeout=5)
            message.ack()
            queue.close()
        assert message.payload == {"a": 1}
        facts = connection.info() | {"password": None}  # which Celery leaves out
        assert not [text for text in (connection.as_uri(), repr(facts)) if ENCODED in text or SPECIAL in text]
        assert counted == [{"name": "letters", "messages": 1}]


@pytest.mark.parametrize(
    "form",
    ["rediss://:{password}@127.0.0.1:{tls}/2", "rediss://:{password}@127.0.0.1:{tls}/2?ssl_cert_reqs=required"],
)
def test_a_certificate_that_nobody_vouches_for_is_refused_by_both(place: Place, form: str) -> None:
    """Or an impostor reads the password."""
    settings = Settings(redis_url=place.url(form))
    for said in _refusals(settings.redis_url):
        assert re.search(r"CERTIFICATE_VERIFY_FAILED|certificate verify failed", said)
    with (
        make_app(settings) as app,
        app.connection_for_write() as connection,
        pytest.raises(OperationalError, match="certificate verify failed"),
    ):
        connection.ensure_connection(max_retries=1, interval_start=0)


def test_a_certificate_of_another_host_is_refused_by_both(place: Place) -> None:
    """Vouched for, and of 127.0.0.1 only."""
    settings = Settings(redis_url=place.url("rediss://:{password}@localhost:{tls}/2?ssl_ca_certs={ca}"))
    assert all("localhost" in said for said in _refusals(settings.redis_url))
    with (
        make_app(settings) as app,
        app.connection_for_write() as connection,
        pytest.raises(OperationalError, match="certificate verify failed"),
    ):
        connection.ensure_connection(max_retries=1, interval_start=0)


@pytest.mark.parametrize("form", ["redis://:wrong@127.0.0.1:{port}/0", "unix://:wrong@{socket}"])
def test_a_wrong_password_is_told_without_it(place: Place, form: str) -> None:
    """By TCP and socket."""
    for said in _refusals(place.url(form)):
        assert "refuses the credentials" in said
        assert "wrong" not in said


def test_a_password_of_its_own_setting_reaches_queue_and_broker(
    place: Place, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is, which a URL could not have."""
    monkeypatch.setenv("L4_REDIS_URL", place.url("redis://127.0.0.1:{port}/4"))
    monkeypatch.setenv("L4_REDIS_PASSWORD", SPECIAL)
    settings = load_settings(namespace=namespace)
    with Client(settings=settings) as client:
        assert client.enqueue("hello", max_tokens=3).id
    with make_app(settings) as app, app.connection_for_write() as connection:
        connection.ensure_connection(max_retries=1)


@pytest.mark.parametrize("form", ["redis://{user}@127.0.0.1:{port}/5", "unix://{user}@{socket}?db=5"])
def test_workers_tell_no_password_to_those_who_ask(
    place: Place, form: str, namespace: str, tmp_path: Path
) -> None:
    """What Flower's pages and `celery inspect` show of GPU workers and of the planner, and their logs."""
    given: dict[str, Any] = {"redis_url": place.url(form), "namespace": namespace, "engine": "emulated"}
    processes = Processes(tmp_path, **given)
    processes.worker("w1")
    planner = ("worker", "-P", "solo", "-Q", "l4-control", "-n", "planner@%h", "--loglevel", "INFO")
    processes.start("planner", "-m", "celery", "-A", "dispatcher.app", *planner)
    try:
        with make_app(load_settings(**given)) as app:
            ping = app.control.inspect(timeout=2.0).ping
            until(lambda: len(ping() or {}) == 2, "both answer", timeout_s=300)
            inspect = app.control.inspect(timeout=300.0, limit=2)  # it ends with the second answer
            told = [inspect.stats(), inspect.conf(with_defaults=True), inspect.report()]
        said = [processes.log("w1"), processes.log("planner")]
    finally:
        processes.close()

    assert [len(answers or {}) for answers in told] == [2, 2, 2]
    text = "\n".join([*map(repr, told), *said])
    assert "Connected to redis" in text
    assert ENCODED not in text
    assert SPECIAL not in text
