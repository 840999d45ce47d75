"""The end of streams and results of many requests on one client: a real redis-server, a worker played by hand."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from l4queue import AsyncClient, Client
from l4queue.client.aio import AsyncHandle
from l4queue.errors import (
    InvalidRequest,
    OutputLost,
    RequestCancelled,
    ResultExpired,
    ResultTimeout,
    UnknownRequest,
)
from tests.protocol.scene import Scene
from tests.services.pipeline import true, until
from tests.services.played_worker import finished, follows, run, start, tokens_of

pytestmark = pytest.mark.services


@pytest.mark.parametrize(
    ("after", "token_ids", "text_after", "text"),
    [
        (0, [1000, 1001, 1002, 1003, 1004], 0, "1000,1001,1002,1003,1004,end"),
        (1, [1001, 1002, 1003, 1004], 0, "1000,1001,1002,1003,1004,end"),
        (2, [1002, 1003, 1004], 0, "1000,1001,1002,1003,1004,end"),
        (3, [1003, 1004], 3, "1003,1004,end"),
        (4, [1004], 3, "1003,1004,end"),
        (5, [], 5, "end"),
    ],
)
async def test_a_stream_resumes_after_any_token(
    scene: Scene, client: AsyncClient, after: int, token_ids: list[int], text_after: int, text: str
) -> None:
    """Exactly the tokens after it; text of the first chunk from where that was written on, and told so."""
    handle = await client.enqueue("x", max_tokens=9)
    finished(scene, handle)
    chunks = [chunk async for chunk in handle.stream(after=after, timeout=0)]
    assert [t for chunk in chunks for t in chunk.token_ids] == token_ids
    assert (chunks[0].text_after, "".join(chunk.text for chunk in chunks)) == (text_after, text)
    assert chunks[-1].offset == 5


def test_a_blocking_stream_resumes_after_any_token(scene: Scene, blocking: Client) -> None:
    """The same."""
    handle = blocking.enqueue("x", max_tokens=9)
    finished(scene, handle)
    for after in range(6):
        found = [t for chunk in handle.stream(after=after, timeout=0) for t in chunk.token_ids]
        assert found == scene.tokens(1, after, 5 - after)


async def test_after_beyond_the_end_is_an_error(scene: Scene, client: AsyncClient, blocking: Client) -> None:
    """Not a wait until the record expires."""
    handle = await client.enqueue("x", max_tokens=9)
    finished(scene, handle)
    with pytest.raises(InvalidRequest, match="beyond the end, the output has 5 tokens"):
        await tokens_of(handle, after=6, timeout=300)
    with pytest.raises(InvalidRequest, match="beyond the end"):
        list(blocking.get(handle.id).stream(after=6, timeout=300))


@pytest.mark.parametrize("left", [[], ["3-0"], ["5-0", "5-1"], ["5-1"]])
async def test_output_that_is_gone_is_an_error_that_says_so(
    scene: Scene, client: AsyncClient, blocking: Client, left: list[str]
) -> None:
    """All of it, its end, its beginning: neither a wait for ever, nor a result that lacks tokens."""
    handle = await client.enqueue("x", max_tokens=9)
    finished(scene, handle)
    for entry_id in {"3-0", "5-0", "5-1"} - set(left):
        scene.raw.xdel(scene.keys.output(handle.id), entry_id)
    other = blocking.get(handle.id)
    kind, says = (OutputLost, "5 tokens") if left else (ResultExpired, "has expired")
    with pytest.raises(kind, match=says):
        await handle.result(timeout=300)
    with pytest.raises(kind, match=says):
        await tokens_of(handle)
    with pytest.raises(kind):
        other.result(timeout=300)
    with pytest.raises(kind):
        list(other.stream(timeout=300))


async def test_output_that_vanishes_under_a_stream_is_an_error(scene: Scene, client: AsyncClient) -> None:
    """Somebody deletes it while the request runs; news of the next tokens leave a gap that nothing fills."""
    handle = await client.enqueue("x", max_tokens=9)
    start(scene, handle)
    scene.emit(handle.id, num=3)
    scene.raw.delete(scene.keys.output(handle.id))
    with pytest.raises(OutputLost):
        await tokens_of(handle)


async def test_an_end_without_its_marker_ends_the_wait(scene: Scene, client: AsyncClient) -> None:
    """The record is terminal, and all tokens are there."""
    handle = await client.enqueue("x", max_tokens=9)
    finished(scene, handle)
    scene.raw.xdel(scene.keys.output(handle.id), "5-1")
    assert await tokens_of(handle) == scene.tokens(1, 0, 5)
    assert (await handle.result(timeout=300)).output_tokens == 5


async def test_what_has_ended_is_there_whatever_the_timeout(
    scene: Scene, client: AsyncClient, blocking: Client
) -> None:
    """Zero asks whether it is done."""
    done, waits = await client.enqueue_many(["x", "y"], max_tokens=9)
    finished(scene, done)
    others = blocking.get(done.id), blocking.get(waits.id)
    assert (await done.result(timeout=0)).output_tokens == 5
    assert others[0].result(timeout=0).output_tokens == 5
    assert await tokens_of(done, timeout=0) == scene.tokens(1, 0, 5)
    for timeout in (0, -1.0):
        with pytest.raises(ResultTimeout):
            await waits.result(timeout=timeout)
        with pytest.raises(ResultTimeout):
            others[1].result(timeout=timeout)
        with pytest.raises(ResultTimeout):
            await tokens_of(waits, timeout=timeout)
    completed = client.as_completed([waits, done], timeout=0)
    assert await anext(completed) is done
    with pytest.raises(ResultTimeout, match="1 request"):
        await anext(completed)


async def test_a_record_that_goes_ends_every_wait(scene: Scene, client: AsyncClient, blocking: Client) -> None:
    """It expired, or a batch deleted it."""
    handle = await client.enqueue("x", max_tokens=9)
    other = blocking.get(handle.id)
    waits = [asyncio.create_task(tokens_of(handle)), asyncio.create_task(handle.result(timeout=300))]
    waits.append(asyncio.create_task(asyncio.to_thread(other.result, timeout=300)))
    await follows(scene, handle, number=2)
    scene.raw.delete(scene.keys.request(handle.id))
    for wait in waits:
        with pytest.raises(UnknownRequest):
            await wait


# many ends ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("lose_mail", [False, True])
async def test_3000_that_have_ended_come_at_once(scene: Scene, client: AsyncClient, lose_mail: bool) -> None:
    """Also without mail, which is trimmed: none is passed over until the next look."""
    handles = await client.enqueue_many(["x"] * 3000, max_tokens=9)
    run(scene, [scene.calls.cancel(handle.id, reason="") for handle in handles])
    if lose_mail:
        scene.raw.delete(scene.keys.mailbox(client._core.client_id))
    ended = [handle async for handle in client.as_completed(handles, timeout=0)]
    assert sorted(h.id for h in ended) == sorted(h.id for h in handles)


def test_blocking_clients_get_all_that_have_ended(scene: Scene, blocking: Client) -> None:
    """The same."""
    handles = blocking.enqueue_many(["x"] * 2500, max_tokens=9)
    run(scene, [scene.calls.cancel(handle.id, reason="") for handle in handles])
    scene.raw.delete(scene.keys.mailbox(blocking._core.client_id))
    assert len(list(blocking.as_completed(handles, timeout=0))) == 2500


async def test_handles_come_once_whosever_they_are(scene: Scene, client: AsyncClient, blocking: Client) -> None:
    """One given twice comes once; two of one request are two; those of another client come, too."""
    own = await client.enqueue("x", max_tokens=9)
    same = await client.get(own.id)
    foreign = await client.get(blocking.enqueue("y", max_tokens=9).id)
    waiting = asyncio.create_task(_all(client.as_completed([own, own, same, foreign], timeout=300)))
    await follows(scene, foreign)
    for handle in (foreign, own):
        scene.cancel(handle.id)
    assert {id(h) for h in await waiting} == {id(own), id(same), id(foreign)}
    assert len(waiting.result()) == 3


async def test_an_end_that_a_server_has_forgotten_is_none(
    scene: Scene, client: AsyncClient, blocking: Client
) -> None:
    """Mail tells of it, and the record does not: the result is waited for."""
    handle, other = await client.enqueue("x", max_tokens=9), blocking.enqueue("y", max_tokens=9)
    start(scene, handle, other)
    for one, of in ((handle, client), (other, blocking)):
        mail = scene.keys.mailbox(of._core.client_id)  # type: ignore[attr-defined]
        scene.raw.xadd(mail, {"i": one.id, "s": "done"})
        scene.raw.xadd(mail, {"i": one.id, "s": "a state of a later release"})
        scene.raw.xadd(mail, {"nothing": "known"})
    waits = [asyncio.create_task(handle.result(timeout=300))]
    waits.append(asyncio.create_task(asyncio.to_thread(other.result, timeout=300)))
    await asyncio.to_thread(lambda: [until_read(scene, of) for of in (client, blocking)])
    for one in (handle, other):
        scene.emit(one.id)
        scene.settle(one.id, offset=2)
    assert [(await wait).output_tokens for wait in waits] == [2, 2]


def until_read(scene: Scene, client: Any) -> None:
    """Wait until a client has read all of its mail."""
    mail = scene.keys.mailbox(client._core.client_id)
    while client._listener._demux.streams[mail] == "0-0":
        threading.Event().wait(0.01)


@pytest.mark.parametrize("number", [1, 3])
async def test_an_end_whose_mail_is_lost_is_found(scene: Scene, client: AsyncClient, number: int) -> None:
    """Results and completions alike, by the next look."""
    handles = await client.enqueue_many(["x"] * number, max_tokens=9)
    waits = [asyncio.create_task(handle.result(timeout=300)) for handle in handles]
    waits.append(asyncio.create_task(_all(client.as_completed(handles, timeout=300))))
    await until(lambda: true(len(client._listener._demux._watches) == number))
    pipe = scene.raw.pipeline()  # ended and its mail lost in one step
    for handle in handles:
        pipe.hset(scene.keys.request(handle.id), mapping={"state": "cancelled"})
    pipe.execute()
    for wait in waits[:-1]:
        with pytest.raises(RequestCancelled):
            await wait
    assert len(await waits[-1]) == number


async def _all(source: AsyncIterator[AsyncHandle]) -> list[AsyncHandle]:
    return [handle async for handle in source]
