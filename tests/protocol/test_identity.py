"""An idempotency key is known for its time; afterwards it makes a new request. No id has two lives."""

from __future__ import annotations

from typing import Any

import pytest

from l4queue.client import AsyncClient, Client
from l4queue.config import Settings
from l4queue.errors import IdempotencyConflict, ResultExpired, UnknownRequest
from l4queue.models import RequestState
from l4queue.protocol.calls import Verdict
from tests.protocol.consistency import check
from tests.protocol.earlier_scripts import earlier_script
from tests.protocol.scene import Scene

S = RequestState
KEYED = "k" + "0123456789abcdef0123456789abcde"


def _submit(scene: Scene, *, key_ttl_ms: int = 60_000, **over: Any) -> Any:
    return scene.submit(KEYED, digest="d", key_ttl_ms=key_ttl_ms, **over)


def _submit_earlier(scene: Scene, *, digest: str = "d") -> list[bytes]:
    """A client of release 913e1db repeats or begins the same request."""
    keys = (scene.keys.counts, scene.keys.inbox, scene.keys.request(KEYED))
    args = (KEYED, digest, "{}", "p", b"hello", 10, 7, 1000, 10**8, 0, 60_000, "old")
    return list(scene.raw.eval(earlier_script("submit"), 3, *keys, *args))


def _finish(scene: Scene, request_id: str) -> None:
    scene.route(request_id)
    scene.register()
    scene.grant()
    assert scene.settle(request_id, num=2) is Verdict.OK


def _forget(scene: Scene, request_id: str) -> None:
    """What the time to live does, at once."""
    scene.raw.delete(scene.keys.request(request_id), scene.keys.output(request_id))


def test_a_key_is_known_beyond_its_result(scene: Scene) -> None:
    """For its own time after the end; a repetition is told the outcome, whatever of it is left."""
    _submit(scene, key_ttl_ms=600_000, ttl_ms=60_000)
    _finish(scene, KEYED)
    for _ in range(2):
        assert 60_000 < scene.raw.pttl(scene.keys.request(KEYED)) <= 600_000
        assert 0 < scene.raw.pttl(scene.keys.output(KEYED)) <= 60_000
        scene.pack()
    scene.raw.delete(scene.keys.output(KEYED))

    reply = _submit(scene)

    assert (reply.verdict, reply.state, reply.request_id) == (Verdict.DUP, "done", KEYED)
    assert scene.record(KEYED).offset == 2


def test_a_key_that_was_forgotten_gets_a_new_id_each_time(scene: Scene) -> None:
    """And while the new one is known, a repetition finds it, live and ended."""
    ids = []
    for _ in range(4):
        first = _submit(scene)
        assert first.verdict is Verdict.OK
        assert first.request_id is not None
        ids.append(first.request_id)
        again = _submit(scene)
        assert (again.verdict, again.request_id) == (Verdict.DUP, ids[-1])
        assert scene.submit(KEYED, digest="other", key_ttl_ms=1).verdict is Verdict.CONFLICT
        _finish(scene, ids[-1])
        scene.pack()
        assert _submit(scene).state == "done"
        assert scene.state(ids[-1]) is S.DONE
        _forget(scene, ids[-1])

    assert len(set(ids)) == 4
    assert ids[0] == KEYED
    assert scene.raw.pttl(f"{scene.keys.prefix}key:{KEYED}") > 0


def test_a_writer_of_the_first_life_cannot_touch_the_second(scene: Scene) -> None:
    """Same key, same worker, same epoch. A reader of the first finds no tokens of the second."""
    _submit(scene)
    scene.route(KEYED)
    scene.register()
    grant = scene.grant()
    scene.emit(KEYED, num=2)
    scene.cancel(KEYED)
    _forget(scene, KEYED)
    second = _submit(scene).request_id
    scene.route(second)
    assert scene.grant().epoch == grant.epoch

    assert scene.emit(KEYED, epoch=grant.epoch, offset=0) is Verdict.FENCED
    assert scene.settle(KEYED, epoch=grant.epoch, offset=0) is Verdict.FENCED
    assert scene.emit(second, epoch=1, num=3) is Verdict.OK

    assert scene.output(KEYED, after=2) == []
    assert [e.upto for e in scene.output(second)] == [3]


def test_ids_without_a_key_are_never_changed(scene: Scene) -> None:
    """They are random; a repetition after a lost reply is the same request in any state."""
    for _ in range(2):
        scene.submit("a")
        assert scene.submit("a").request_id == "a"
    _finish(scene, "a")
    scene.pack()
    assert scene.submit("a").request_id == "a"
    assert scene.raw.exists(f"{scene.keys.prefix}given") == 0


def test_clients_of_an_earlier_release_find_the_same_request(scene: Scene) -> None:
    """In both orders, while it is live and after its end, with the same answer to another body."""
    assert _submit(scene).request_id == KEYED
    assert _submit_earlier(scene) == [b"DUP", b"submitted"]
    assert _submit_earlier(scene, digest="other") == [b"CONFLICT", b"submitted"]
    _finish(scene, KEYED)
    scene.pack()
    assert _submit_earlier(scene) == [b"DUP", b"done"]
    assert _submit_earlier(scene, digest="other") == [b"CONFLICT", b"done"]
    check(scene)


def test_a_request_of_an_earlier_release_is_found(scene: Scene) -> None:
    """It is accepted, counted, packed and known; after its time the key gets another id."""
    assert _submit_earlier(scene)[0] == b"OK"
    assert _submit(scene).request_id == KEYED
    _finish(scene, KEYED)
    scene.pack()
    assert _submit(scene).state == "done"
    check(scene)
    _forget(scene, KEYED)

    assert _submit(scene).request_id != KEYED


def test_a_result_that_has_gone_is_told_apart(scene: Scene, redis_url: str, namespace: str) -> None:
    """`enqueue` with its key finds the request, `status` its outcome, `result` and `stream` say what happened."""
    settings = Settings(redis_url=redis_url, namespace=namespace)
    with Client(settings=settings) as client:
        handle = client.enqueue("hello", idempotency_key="once")
        _finish(scene, handle.id)
        scene.pack()
        assert client.enqueue("hello", idempotency_key="once").result().output_tokens == 2
        with pytest.raises(IdempotencyConflict):
            client.enqueue("other", idempotency_key="once")
        scene.evict(max_bytes=1, limit=1)

        again = client.enqueue("hello", idempotency_key="once")
        assert again.id == handle.id
        assert again.status().state is S.DONE
        with pytest.raises(ResultExpired, match="L4_MAX_RESULT_BYTES"):
            again.result()
        with pytest.raises(ResultExpired, match="L4_MAX_RESULT_BYTES"):
            list(again.stream(after=2))
        _forget(scene, handle.id)
        with pytest.raises(UnknownRequest):
            again.result()
        new = client.enqueue("hello", idempotency_key="once")
        assert new.id != handle.id
        _finish(scene, new.id)
        assert new.result().output_tokens == 2


async def test_the_asyncio_client_tells_it_apart_too(scene: Scene, redis_url: str, namespace: str) -> None:
    """By time: the output has expired, the key has not."""
    settings = Settings(redis_url=redis_url, namespace=namespace)
    async with AsyncClient(settings=settings) as client:
        handle = await client.enqueue("hello", idempotency_key="once")
        _finish(scene, handle.id)
        assert (await handle.result()).output_tokens == 2
        scene.raw.delete(scene.keys.output(handle.id))

        again = await client.enqueue("hello", idempotency_key="once")
        with pytest.raises(ResultExpired, match="has expired"):
            await again.result()
        with pytest.raises(ResultExpired, match="has expired"):
            async for _ in again.stream():
                pass


@pytest.mark.parametrize("after", [0, 1, 3, 4])
def test_a_packed_output_is_streamed_from_any_bound(
    scene: Scene, redis_url: str, namespace: str, after: int
) -> None:
    """By a client that comes after the packing."""
    settings = Settings(redis_url=redis_url, namespace=namespace)
    with Client(settings=settings) as client:
        handle = client.enqueue("hello")
        scene.route(handle.id)
        scene.register()
        scene.grant()
        for offset, num in ((0, 1), (1, 2), (3, 1)):
            scene.emit(handle.id, offset=offset, num=num)
        scene.settle(handle.id, offset=4)
        before = [(c.offset, c.text, c.token_ids) for c in handle.stream(after=after)]
        scene.pack()

        assert [(c.offset, c.text, c.token_ids) for c in handle.stream(after=after)] == before
