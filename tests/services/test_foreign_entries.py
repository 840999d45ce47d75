"""What somebody else writes under our names: no process ends, other requests are done, its bytes are kept."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from l4queue import Client
from l4queue.models import TERMINAL, RequestState
from tests.services.foreign_place import BYTES, LONG_S, NUMBERS, Place

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

_NAMES = itertools.count()

RECORD = {
    "state": "queued",
    "epoch": "0",
    "offset": "0",
    "crashes": "0",
    "solo_crashes": "0",
    "charge_tokens": "10",
    "charge_bytes": "10",
    "ttl_ms": "60000",
    "submitted_ms": "1",
    "queued_ms": "1",
    "prompt_tokens": "3",
    "max_tokens": "4",
    "score": "1.0",
    "stage": "0",
    "kind": "t",
    "prompt": b"\1\0\0\0",
    "ids": b"\1\0\0\0\2\0\0\0\3\0\0\0",
    "body": "{}",
    "client": "",
    "digest": "",
}


def forged(place: Place, **changed: Any) -> str:
    """A record as ours but for these fields; None leaves one out. Its id."""
    request_id = f"forged{next(_NAMES)}"
    fields = {name: value for name, value in (RECORD | changed).items() if value is not None}
    place.raw.hset(place.keys.request(request_id), mapping=fields)
    return request_id


def _inbox(place: Place) -> Iterator[str | None]:
    add: Callable[[dict[Any, Any]], Any] = lambda values: place.raw.xadd(place.keys.inbox, values)  # noqa: E731
    for values in ({"x": "y"}, {"i": ""}, {"i": BYTES}, {BYTES: BYTES}, {"i": "nobody"}, {"i": "a b,c"}):
        add(values)
    add({"i": "x" * 100_000})
    for field, values in {
        "submitted_ms": (*NUMBERS, None),
        "kind": (b"q", BYTES, None),
        "body": (b"{", b"[]", BYTES, None, b'{"params": 3}', b"[" * 10_000),
        "prompt": (None, b"\1", BYTES),
        "charge_tokens": (*NUMBERS, None),
        "charge_bytes": NUMBERS,
        "ttl_ms": (*NUMBERS, None),
        "offset": NUMBERS,
        "epoch": NUMBERS,
        "entry": NUMBERS,
        "deadline_ms": NUMBERS,
    }.items():
        for value in values:
            request_id = forged(place, state="submitted", **{field: value})
            add({"i": request_id})
            yield request_id
    for value in (BYTES, b"", b"weird"):
        add({"i": forged(place, state=value)})
    place.raw.set(place.keys.request("text"), "no hash")
    add({"i": "text"})


def _queued(place: Place) -> Iterator[str | None]:
    queue = place.keys.queue("0")
    for name in (b"nobody", BYTES, b"", b"a b", b"a,b", b"x" * 10_000):
        place.raw.zadd(queue, {name: 1})
    place.raw.zadd(queue, {"inf": float("inf"), "-inf": float("-inf"), "huge": 1e300})
    place.raw.lpush(place.keys.request("list"), "no hash")
    place.raw.zadd(queue, {"list": 0})
    for field, values in {
        "offset": (*NUMBERS, None, b"5"),
        "epoch": (*NUMBERS, None),
        "crashes": (*NUMBERS, None),
        "prompt_tokens": (*NUMBERS, None),
        "score": (b"abc", BYTES, None, b"nan", b"inf"),
        "submitted_ms": (*NUMBERS, None),
        "charge_tokens": (*NUMBERS, None),
        "ttl_ms": (*NUMBERS, None),
        "ids": (None, b"\1", b""),
        "body": (None, b"{", BYTES, b'{"params": {"max_tokens": "many"}}'),
        "deadline_ms": NUMBERS,
        "moved_ms": NUMBERS,
        "started_ms": NUMBERS,
        "kv": (BYTES,),
        "from": (BYTES,),
        "client": (BYTES,),
        "ledger": (BYTES,),
    }.items():
        for value in values:
            request_id = forged(place, **{field: value})
            place.raw.zadd(queue, {request_id: 0})
            place.raw.xadd(place.keys.wake("0"), {"i": request_id})
            yield request_id
    for stage in (None, b"", b"77", BYTES):
        request_id = forged(place, stage=stage)
        place.raw.zadd(place.keys.queue("77"), {request_id: 0})
        place.raw.hset(place.keys.backlog, "77", 100)
        yield request_id


def _personal(place: Place) -> Iterator[str | None]:
    for queue in ("@w0", "@ghost", "solo", "@"):
        place.raw.zadd(place.keys.queue(queue), {b"nobody": 1, BYTES: 2})
        place.raw.hset(place.keys.backlog, queue, "12")
        request_id = forged(place, stage=queue, offset="abc")
        place.raw.zadd(place.keys.queue(queue), {request_id: 0})
        place.raw.xadd(place.keys.wake(queue), {"i": "?"})
        yield request_id
    place.raw.set(place.keys.queue("@other"), "no queue")
    place.raw.hset(place.keys.backlog, "@other", "12")


def _control(place: Place) -> Iterator[str | None]:
    control = place.keys.control(place.incarnation)
    ask = {"worker_id": "w9", "room_tokens": 10, "num_slots": 1, "num_running": 0, "context_tokens": 0}
    for message in (
        b"no json",
        BYTES,
        b"",
        b"[]",
        b"{}",
        b'{"ask": 3}',
        b'{"ask": {}}',
        b"[" * 100_000,
        json.dumps({"ask": ask | {"room_tokens": "many"}}),
        json.dumps({"ask": ask | {"num_slots": 10**400}}),
        json.dumps({"ask": ask, "v": 99}),
        json.dumps({"later": 1}),
    ):
        place.raw.xadd(control, {"m": message})
    place.raw.xadd(control, {"i": BYTES})
    place.raw.xadd(control, {"i": "nobody"})
    place.raw.xadd(control, {BYTES: BYTES})
    place.raw.xadd(place.keys.wake("0"), {BYTES: BYTES})
    yield None


def _plan(place: Place) -> Iterator[str | None]:
    for version, body in (
        (b"abc", b"{}"),
        (b"5", b"no json"),
        (b"6", BYTES),
        (b"7", b"[]"),
        (b"8", b'{"version": 8, "stages": []}'),
        (b"9" * 400, b'{"version": 8}'),
        (b"", b""),
    ):
        place.raw.hset(place.keys.plan, mapping={"version": version, "body": body})
        place.raw.xadd(place.keys.plans, {"version": version, "body": body})
        yield None
    place.raw.hdel(place.keys.plan, "body")
    yield None
    place.raw.xadd(place.keys.plans, {"x": "y"})
    yield None


def _workers(place: Place) -> Iterator[str | None]:
    raw, keys = place.raw, place.keys
    raw.zadd(keys.workers, {b"no colon": 9e15, BYTES: 9e15, "x:1": float("inf"), "y:1": float("-inf"), "": 9e15})
    good = json.loads(raw.hget(keys.worker(place.incarnation), "load"))
    for i, load in enumerate(
        (
            b"no json",
            BYTES,
            b"[]",
            b"{}",
            b'{"load": 3}',
            json.dumps(good | {"load": {"worker_id": 3}}),
            json.dumps(good | {"load": good["load"] | {"num_running": "many"}}),
            json.dumps(good | {"load": good["load"] | {"num_running": -1}}),
            json.dumps(good | {"load": good["load"] | {"context_tokens": 10**400}}),
            json.dumps(good | {"load": good["load"] | {"step_ms": float("nan")}}),
            json.dumps(good | {"load": good["load"] | {"stage": 99}}),
            json.dumps(good | {"cost": {"alpha_ms": "x"}}),
            json.dumps(good | {"cost": 7, "price": 7, "more": 7}),
            json.dumps(good | {"price": {"bandwidth_bytes_per_s": 0}}),
            json.dumps(good | {"v": 99}),
        )
    ):
        name = f"w{i}f:0123"
        raw.zadd(keys.workers, {name: 9e15})
        raw.hset(keys.worker(name), mapping={"worker": f"w{i}f", "load": load, "seen_ms": "1", "seq": "abc"})
    raw.hset(keys.worker("w77:1"), mapping={"worker": BYTES})
    raw.zadd(keys.workers, {"w77:1": 9e15, "w78:1": 9e15})
    raw.set(keys.worker("w78:1"), "no hash")
    raw.sadd(keys.held(place.incarnation), "nobody", BYTES, "")
    yield None
    for name in raw.zrange(keys.workers, 0, -1):
        if name.decode(errors="replace") != place.incarnation:
            raw.zadd(keys.workers, {name: 1})
            raw.sadd(
                keys.prefix.encode() + b"held:" + name,
                "nobody",
                BYTES,
                forged(place, state="running", owner=name, offset="abc"),
            )
    yield None


def _figures(place: Place) -> Iterator[str | None]:
    raw, keys = place.raw, place.keys
    for value in NUMBERS:
        for field in (
            "live",
            "live_tokens",
            "live_bytes",
            "done",
            "submitted",
            "output_tokens",
            "drain_tokens_per_s",
        ):
            raw.hset(keys.counts, field, value)
        for field in ("0", "solo", "5", BYTES):
            raw.hset(keys.backlog, field, value)
            raw.hset(keys.foreground, field, value)
        for field in ("a:3", "p:3", "d:3", "c:3", "a:x", "nonsense", b"a:\xff", "a:" + "9" * 400):
            raw.hset(keys.hist, field, value)
        raw.set(keys.tick, value)
        raw.zadd(keys.deadlines, {b"nobody": 1, BYTES: 1})
        raw.hset(keys.counts, BYTES, value)
        yield None


def _records_of_others(place: Place) -> Iterator[str | None]:
    raw, keys = place.raw, place.keys
    for stream in (keys.finished, keys.dead, keys.decisions, keys.plans):
        for values in ({"x": "y"}, {BYTES: BYTES}, {"i": BYTES, "s": "done", "o": "abc"}, {"d": BYTES}):
            raw.xadd(stream, values)
    mail = keys.mailbox(place.client._core.client_id)
    for values in ({"x": "y"}, {"i": BYTES}):
        raw.xadd(mail, values)
    for memory in (b"no json", BYTES, b"[]", b"{}", b'{"at_ms": "x"}', b'{"at_ms": 1, "raw": 3}'):
        raw.set(keys.memory, memory)
        yield None


def _last_ids(place: Place) -> Iterator[str | None]:
    last = "18446744073709551615-18446744073709551615"
    mail = place.keys.mailbox(place.client._core.client_id)
    streams = (
        place.keys.finished,
        place.keys.dead,
        place.keys.decisions,
        place.keys.wake("0"),
        mail,
        place.keys.plans,
    )
    for stream in streams:
        place.raw.xadd(stream, {"x": "y"}, id=last)
        yield None


TABLES = {
    "inbox": _inbox,
    "queue": _queued,
    "personal queues": _personal,
    "control": _control,
    "plan": _plan,
    "workers": _workers,
    "figures": _figures,
    "streams and memory": _records_of_others,
    "last ids": _last_ids,
}


@pytest.mark.parametrize("table", TABLES, ids=str)
async def test_what_somebody_else_wrote_ends_no_process(place: Place, table: str) -> None:
    """Requests before and after are done; what can end ends; readers and planners go on."""
    before = await place.running()
    ids = []
    for request_id in TABLES[table](place):
        if request_id is not None:
            ids.append(request_id)
        else:
            await place.look()
            await place.good(1)
    await place.look()
    await place.good()
    for request_id in ids:
        assert await place.ended(request_id) in TERMINAL
    await place.look()
    await place.good()
    await (await place.client.get(before)).cancel()
    assert await place.ended(before) in (RequestState.CANCELLED, RequestState.DONE)
    await place.good()
    assert place.letters(), "nothing of it is among the dead letters"


async def test_blocking_clients_outlive_it_too(place: Place) -> None:
    """The same through `Client`: as_completed reads a mailbox with foreign entries."""

    def work() -> None:
        with Client(settings=place.settings) as client:
            handles = client.enqueue_many(["a", "b"], max_tokens=2)
            mail = place.keys.mailbox(client._core.client_id)
            raw = redis.Redis.from_url(place.redis_url)
            raw.xadd(mail, {"x": "y"})
            raw.xadd(mail, {"i": BYTES})
            assert {handle.id for handle in client.as_completed(handles, timeout=LONG_S)} == {
                h.id for h in handles
            }
            raw.close()

    await asyncio.to_thread(work)
