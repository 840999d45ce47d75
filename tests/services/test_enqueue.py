"""No accepted request is lost: not by a full backlog, a conflict, an outage, a cancellation or a lost reply."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from l4queue import AsyncClient, Client, Settings, cli
from l4queue.cli.outcome import ExitCode
from l4queue.errors import (
    IdempotencyConflict,
    InvalidRequest,
    L4QueueError,
    QueueFull,
    ServiceUnavailable,
    UnknownRequest,
)
from l4queue.models import RequestState
from tests.protocol.proxy import CuttingProxy
from tests.protocol.scene import Scene
from tests.protocol.server import RedisServer
from tests.services.pipeline import true, until

pytestmark = pytest.mark.services
SUBMITTED = RequestState.SUBMITTED


@pytest.fixture
def small(redis_url: str, namespace: str) -> Settings:
    """Room for 50 requests of 10 tokens: one for the prompt and nine more."""
    return Settings(redis_url=redis_url, namespace=namespace, max_backlog_tokens=500)


@pytest.fixture
def client(small: Settings) -> Iterator[Client]:
    """A blocking client with this room."""
    with Client(settings=small) as opened:
        yield opened


def prompts(number: int) -> list[dict[str, Any]]:
    return [{"prompt": "x", "max_tokens": 9, "metadata": {"n": n}} for n in range(number)]


def numbers(handles: Any) -> list[int]:
    """Which of the requests these are, by what Redis has of each."""
    return [handle.status().request["metadata"]["n"] for handle in handles]


def test_of_a_bulk_that_does_not_fit_the_accepted_part_is_told(client: Client, scene: Scene) -> None:
    """50 are queued: their handles are in the exception, with the positions of the others."""
    seen: list[int] = []
    with pytest.raises(QueueFull) as caught:
        client.enqueue_many(prompts(80), block=False, progress=seen.append)
    error = caught.value
    assert (numbers(error.accepted), error.refused) == (list(range(50)), tuple(range(50, 80)))
    assert (error.in_doubt, seen) == ((), [50])
    assert str(error).startswith(
        "the backlog is full: 500 tokens wait or run, and this request would exceed the 500"
    )
    assert "L4_MAX_BACKLOG_TOKENS; retry after " in str(error)
    assert error.__notes__ == ["50 of 80 requests were accepted: see `accepted`"]
    assert scene.counts()["live"] == 50
    assert all(handle.cancel() for handle in error.accepted)


def test_the_bound_that_is_reached_is_named(redis_url: str, namespace: str) -> None:
    """Bytes, where tokens would do."""
    settings = Settings(redis_url=redis_url, namespace=namespace, max_backlog_bytes=1)
    with Client(settings=settings) as client:
        client.enqueue("x", max_tokens=9)
        with pytest.raises(QueueFull, match="take the 1 bytes of L4_MAX_BACKLOG_BYTES; retry after"):
            client.enqueue("x", max_tokens=9)


def test_a_long_command_without_the_password_is_told_so(durable_server: RedisServer, namespace: str) -> None:
    """Redis hangs up amid it: the credentials are at fault, not the network."""
    with redis.Redis.from_url(durable_server.url) as admin:
        admin.config_set("requirepass", "new")
    settings = Settings(redis_url=durable_server.url, namespace=namespace)
    refused = pytest.raises(ServiceUnavailable, match="refuses the credentials in L4_REDIS_URL")
    with Client(settings=settings, timeout_s=0) as client, refused:
        client.enqueue_many(["x" * 1_000_000] * 32, max_tokens=1)


@pytest.mark.parametrize("prefix", ["", "chatcmpl-", "cmpl-", "resp_"])
def test_commands_know_the_ids_of_answers_over_http(
    prefix: str, client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of them, as `get` does, and print the queue's own."""
    monkeypatch.setenv("L4_REDIS_URL", client.settings.redis_url.reveal())
    monkeypatch.setenv("L4_NAMESPACE", client.settings.namespace)
    handle = client.enqueue("x", max_tokens=9)
    assert client.get(prefix + handle.id) == handle
    for command in ("status", "cancel"):
        assert cli.main([command, prefix + handle.id, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["request_id"] == handle.id
    assert cli.main(["explain", prefix + handle.id]) == 0
    assert cli.main(["result", prefix + handle.id]) == ExitCode.CANCELLED


async def test_the_asyncio_client_tells_the_same(small: Settings, scene: Scene) -> None:
    """And what is alone is refused without a word of others."""
    async with AsyncClient(settings=small) as client:
        with pytest.raises(QueueFull) as caught:
            await client.enqueue_many(prompts(300), block=False)
        assert (len(caught.value.accepted), len(caught.value.refused)) == (50, 206)
        assert [(await handle.status()).state for handle in caught.value.accepted] == [SUBMITTED] * 50
        with pytest.raises(QueueFull) as alone:
            await client.enqueue("x", max_tokens=9)
        assert (alone.value.accepted, alone.value.in_doubt, alone.value.refused) == ((), (), (0,))
        assert not hasattr(alone.value, "__notes__")
    assert scene.counts()["live"] == 50


def test_what_fits_after_one_that_does_not_is_told_too(client: Client) -> None:
    """The positions say which is which."""
    requests = prompts(4)
    requests[1]["max_tokens"] = 490
    with pytest.raises(QueueFull) as caught:
        client.enqueue_many(requests, block=False)
    assert (numbers(caught.value.accepted), caught.value.refused) == ([0, 2, 3], (1,))


def test_a_full_backlog_is_waited_for_and_nothing_is_sent_twice(client: Client, scene: Scene) -> None:
    """Room appears while the client waits; handles come back in order."""

    def make_room(accepted: int) -> None:
        for request_id in list(scene.raw.scan_iter(match=scene.keys.request("*")))[:accepted]:
            scene.cancel(request_id.decode().partition("req:")[2])

    handles = client.enqueue_many(prompts(120), progress=make_room)
    assert numbers(handles) == list(range(120))
    assert scene.counts()["submitted"] == 120


def test_a_conflict_costs_no_other_handle(client: Client, scene: Scene) -> None:
    """One key was used before with another body: the rest of its batch is accepted, and told."""
    client.enqueue("before", idempotency_key="k", max_tokens=9)
    requests = prompts(10)
    requests[4]["idempotency_key"] = "k"
    with pytest.raises(IdempotencyConflict) as caught:
        client.enqueue_many(requests)
    assert (numbers(caught.value.accepted), caught.value.refused) == ([0, 1, 2, 3, 5, 6, 7, 8, 9], (4,))
    assert scene.counts()["live"] == 10


def test_a_bad_request_is_found_before_any_is_sent(client: Client, scene: Scene) -> None:
    """Nothing is accepted, and the error says so."""
    with pytest.raises(InvalidRequest) as caught:
        client.enqueue_many([*prompts(3), {"prompt": "x", "max_tokens": 0}])
    assert caught.value.accepted == ()
    assert "submitted" not in scene.counts()


class Odd:
    """Requests of a source that fails before the first one, or behind it."""

    def __init__(self, kind: type[BaseException], num_good: int) -> None:
        self._kind, self._num_good = kind, num_good

    def __iter__(self) -> Iterator[str]:
        if not self._num_good:
            raise self._kind("enough")
        return self._requests()

    def _requests(self) -> Iterator[str]:
        yield from ["x"] * self._num_good
        raise self._kind("enough")


@pytest.mark.parametrize("num_good", [0, 300])
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, L4QueueError])
async def test_a_source_of_requests_that_fails_tells_that_none_was_sent(
    small: Settings, client: Client, scene: Scene, kind: type[BaseException], num_good: int
) -> None:
    """As any other error does."""
    with pytest.raises(kind, match="enough") as caught:
        client.enqueue_many(Odd(kind, num_good))
    async with AsyncClient(settings=small) as other:
        with pytest.raises(kind, match="enough") as caught_too:
            await other.enqueue_many(Odd(kind, num_good))
    for error in (caught.value, caught_too.value):
        assert (error.accepted, error.in_doubt, error.refused) == ((), (), ())  # type: ignore[attr-defined]
        assert not hasattr(error, "__notes__")
    assert "submitted" not in scene.counts()


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_whatever_a_progress_callback_raises_has_the_handles(client: Client, kind: type[BaseException]) -> None:
    """Also Ctrl-C."""

    def fail(_: int) -> None:
        raise kind("enough")

    with pytest.raises(kind, match="enough") as caught:
        client.enqueue_many(prompts(20), progress=fail)
    assert numbers(caught.value.accepted) == list(range(20))  # type: ignore[attr-defined]


def test_an_exception_that_takes_no_attributes_passes(client: Client) -> None:
    """It is not hidden by another."""

    class Bare(Exception):
        def __setattr__(self, name: str, value: object) -> None:
            raise AttributeError(name)

    def fail(_: int) -> None:
        raise Bare

    with pytest.raises(Bare):
        client.enqueue_many(prompts(2), progress=fail)


async def test_a_cancelled_bulk_tells_what_was_accepted(small: Settings) -> None:
    """It waits for room, and its time is up: the cause of the TimeoutError has the handles."""
    async with AsyncClient(settings=small) as client:
        accepted = asyncio.Event()
        bulk = asyncio.create_task(client.enqueue_many(prompts(80), progress=lambda _: accepted.set()))
        await accepted.wait()
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.01):
                await bulk
        error = caught.value.__cause__
        assert isinstance(error, asyncio.CancelledError)
        handles = error.accepted  # type: ignore[attr-defined]
        assert [(await handle.status()).state for handle in handles] == [SUBMITTED] * 50


async def test_a_cancelled_submission_tells_what_is_in_doubt(
    redis_server: RedisServer, namespace: str, scene: Scene
) -> None:
    """Its call was sent, and the answer is on its way."""
    with CuttingProxy(redis_server.port, lambda _: None) as proxy:
        async with AsyncClient(settings=Settings(redis_url=proxy.url, namespace=namespace)) as client:
            await client.plan_history()
            proxy._delay_s = 600.0
            sending = asyncio.create_task(client.enqueue("x", max_tokens=9))
            await until(lambda: true("submitted" in scene.counts()))
            sending.cancel()
            with pytest.raises(asyncio.CancelledError) as caught:
                await sending
            (handle,) = caught.value.in_doubt  # type: ignore[attr-defined]
            assert scene.state(handle.id) is SUBMITTED


def test_an_outage_amid_a_bulk_keeps_what_was_accepted(durable_server: RedisServer, namespace: str) -> None:
    """The first batch of 256 is accepted, the second in doubt, the rest was not sent."""
    with Client(settings=Settings(redis_url=durable_server.url, namespace=namespace)) as client:
        client._executor.retry_s = 0.1
        with pytest.raises(ServiceUnavailable) as caught:
            client.enqueue_many(prompts(600), progress=lambda _: durable_server.kill())
        error: L4QueueError = caught.value
        assert (len(error.accepted), len(error.in_doubt), error.refused) == (256, 256, ())
        assert error.__notes__ == [
            "256 of 600 requests were accepted: see `accepted`; 256 may have been: see `in_doubt`"
        ]
        durable_server.start()
        client._executor.retry_s = 10.0
        assert numbers(error.accepted[::50]) == list(range(0, 256, 50))
        with pytest.raises(UnknownRequest):
            error.in_doubt[0].status()


def test_a_lost_reply_changes_no_answer(redis_server: RedisServer, namespace: str) -> None:
    """Each first call is executed and its reply lost: accepted is accepted, cancelled is cancelled."""
    with CuttingProxy(redis_server.port, lambda n: "after" if n % 2 == 0 else None) as proxy:
        with Client(settings=Settings(redis_url=proxy.url, namespace=namespace)) as client:
            handle = client.enqueue("x", max_tokens=9)
            assert handle._has_mail
            keyed = client.enqueue("x", max_tokens=9, idempotency_key="k")
            many = client.enqueue_many(prompts(5))
            assert [one.cancel() for one in (handle, keyed, *many)] == [True] * 7
            assert [one.cancel() for one in (handle, keyed, *many)] == [False] * 7
        assert proxy.num_cuts >= 10


async def test_a_lost_reply_changes_no_answer_for_asyncio(redis_server: RedisServer, namespace: str) -> None:
    """The same."""
    with CuttingProxy(redis_server.port, lambda n: "after" if n % 2 == 0 else None) as proxy:
        async with AsyncClient(settings=Settings(redis_url=proxy.url, namespace=namespace)) as client:
            handle = await client.enqueue("x", max_tokens=9)
            assert handle._has_mail
            assert [await handle.cancel(), await handle.cancel()] == [True, False]


async def test_a_copied_handle_is_the_handle(small: Settings, client: Client) -> None:
    """Where it stands in a structure that is copied, too."""
    async with AsyncClient(settings=small) as other:
        for handle in (client.enqueue("x", max_tokens=9), await other.enqueue("x", max_tokens=9)):
            assert copy.copy(handle) is handle
            assert copy.deepcopy({"handles": [handle]}) == {"handles": [handle]}


@pytest.mark.parametrize("handles", [["an id"], [None], "ids"])
async def test_what_is_no_handle_is_not_waited_for(small: Settings, client: Client, handles: Any) -> None:
    """An id, as pickling makes of a handle, is named as the mistake."""
    async with AsyncClient(settings=small) as other:
        with pytest.raises(InvalidRequest, match="get") as caught:
            next(client.as_completed(handles))
        with pytest.raises(InvalidRequest, match="get"):
            await anext(other.as_completed(handles))
    assert caught.value.field == "handles"
