"""Handles and statuses without a server: identity, pickling, looks, units."""

from __future__ import annotations

import pickle
import threading
import warnings
from dataclasses import replace

import pytest

from l4queue import AsyncClient, AsyncHandle, Client, Handle, RequestState, RequestStatus, Settings
from l4queue.client.handle import QueueAddress
from l4queue.client.waiting import Ends, deadline_after
from l4queue.config import load_settings
from l4queue.errors import ResultTimeout
from l4queue.protocol.calls import Verdict
from l4queue.protocol.records import RequestRecord
from l4queue.redis_url import without_password

RECORD = RequestRecord(
    request_id="r<1>",
    state=RequestState.RUNNING,
    epoch=2,
    offset=12,
    stage="1",
    worker="w",
    plan=3,
    prompt_tokens=37,
    max_tokens=64,
    submitted_ms=1_700_000_000_250,
    queued_ms=1_700_000_000_260,
    started_ms=1_700_000_000_300,
    first_token_ms=1_700_000_000_500,
    body='{"params":{"seed":1},"priority":5,"metadata":{"n":1}}',
)


@pytest.fixture
def client() -> Client:
    """A client that never reaches its server."""
    return Client("redis://user:secret@127.0.0.1:1/0", settings=Settings(namespace="n"), timeout_s=0)


@pytest.mark.parametrize(
    ("url", "bare"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("redis://:secret@h:1/2", "redis://h:1/2"),
        ("rediss://bob:s%2Fecret@h/2?ssl_password=s&ssl_cert_reqs=none", "rediss://bob@h/2?ssl_cert_reqs=none"),
        ("unix://bob:secret@/run/redis.sock?db=1&password=x", "unix://bob@/run/redis.sock?db=1"),
        ("redis+sentinel://:s@a:1,b:2/name/1?sentinel_password=x", "redis+sentinel://a:1,b:2/name/1"),
    ],
)
def test_a_place_has_no_password(url: str, bare: str) -> None:
    """So neither has a pickled handle."""
    assert without_password(url) == bare


def test_handles_of_one_request_are_one(client: Client) -> None:
    """In sets and dictionaries, too; a blocking one is no asyncio one."""
    one, other = Handle(client, "a"), Handle(client, "a")
    assert one == other
    assert {one, other} == {one}
    assert one != Handle(client, "b")
    elsewhere = Client("redis://127.0.0.1:1/1", settings=Settings(namespace="n"))
    assert one != Handle(elsewhere, "a")
    assert one != AsyncHandle(
        AsyncClient("redis://user:secret@127.0.0.1:1/0", settings=Settings(namespace="n")), "a"
    )


def test_a_pickled_handle_has_its_place_and_no_password(client: Client) -> None:
    """It is the same request; its client is looked for when it is used."""
    handle = Handle(client, "a")
    data = pickle.dumps(handle)
    assert b"secret" not in data
    again = pickle.loads(data)
    assert again == handle
    assert again._client is client


def test_a_place_is_reached_by_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the password that this process has for it."""
    place = QueueAddress.of("redis://bob:secret@h:1/0", "n")
    monkeypatch.setenv("L4_REDIS_URL", "redis://bob:other@h:1/0")
    monkeypatch.setenv("L4_NAMESPACE", "n")
    assert place.settings()[0] == load_settings().redis_url
    monkeypatch.setenv("L4_REDIS_URL", "redis://elsewhere")
    monkeypatch.setenv("L4_REDIS_PASSWORD", "mine")
    monkeypatch.setenv("L4_NAMESPACE", "m")
    url, settings = place.settings()
    assert url.reveal() == "redis://bob:mine@h:1/0"
    assert settings.namespace == "n"


def test_a_handle_tells_what_it_has_seen(client: Client) -> None:
    """Without a look at the server, which is away here."""
    handle = Handle(client, RECORD.request_id)
    assert repr(handle) == "<Handle r<1>: accepted>"
    handle._noted(RECORD)
    assert repr(handle) == "<Handle r<1>: running, 37 prompt tokens, 12 of at most 64 output tokens>"
    shown = handle._repr_html_()
    assert "<td>r&lt;1&gt;</td>" in shown
    assert "<th>time to first token</th><td>0.250 s</td>" in shown
    assert "secret" not in repr(client) + shown


def test_a_handle_tells_the_end_that_it_was_told_of(client: Client) -> None:
    """By `as_completed`, a stream or a cancel: nobody read its record."""
    handle = Handle(client, "a")
    ends = Ends([handle], has_mail=lambda _: False, event=threading.Event())
    ends.watches[0].see(RequestState.DONE, 3)
    assert list(ends.take()) == [handle]
    assert repr(handle) == "<Handle a: done>"
    assert "<th>state</th><td>done</td>" in handle._repr_html_()
    streamed = Handle(client, "b")
    streamed._seen_tokens = 1
    assert repr(streamed) == "<Handle b: 1 output token so far>"
    streamed._noted(replace(RECORD, prompt_tokens=1, offset=1))
    assert repr(streamed) == "<Handle b: running, 1 prompt token, 1 of at most 64 output tokens>"
    assert streamed._was_cancelled(Verdict.OK)
    assert repr(streamed) == "<Handle b: cancelled, 1 prompt token, 1 output token>"


@pytest.mark.parametrize(
    ("num", "told"),
    [
        (1, "1 request is not finished; it goes on: wait again or cancel it"),
        (2, "2 requests .* they go on: .* them"),
    ],
)
def test_a_wait_that_ends_counts_what_is_left(client: Client, num: int, told: str) -> None:
    """One request, or several."""
    ends = Ends([Handle(client, str(n)) for n in range(num)], has_mail=lambda _: False, event=threading.Event())
    with pytest.raises(ResultTimeout, match=told):
        ends.left_s(deadline_after(0))


def test_a_status_is_in_seconds() -> None:
    """Moments by Unix time, durations by themselves."""
    status = RequestStatus.of(RECORD)
    assert (status.submitted_at_s, status.first_token_at_s, status.finished_at_s) == (
        1_700_000_000.25,
        1_700_000_000.5,
        None,
    )
    assert (status.ttft_s, status.e2e_s, status.output_tokens, status.was_resumed) == (0.25, None, 12, True)
    assert status.request["metadata"] == {"n": 1}
    assert not status.is_finished
    assert pickle.loads(pickle.dumps(status)) == status


def test_names_of_the_release_before_are_read_with_a_warning() -> None:
    """Their values are those of the record."""
    status = RequestStatus.of(RECORD)
    for name in (
        "offset",
        "epoch",
        "body",
        "submitted_ms",
        "queued_ms",
        "first_token_ms",
        "finished_ms",
        "ttft_ms",
    ):
        with pytest.warns(DeprecationWarning, match=name):
            assert getattr(status, name) == getattr(RECORD, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(AttributeError, match="ofset"):
            _ = status.ofset  # type: ignore[attr-defined]
