"""What somebody else writes under our names: no process ends, other requests are done, its bytes are kept."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import redis

from dispatcher.exporter import Exporter
from dispatcher.planner.rounds import refine_once, replan_once
from dispatcher.routing.service import Dispatcher
from l4queue import AsyncClient, Client, Settings
from l4queue.cost.step import StepCost
from l4queue.errors import L4QueueError
from l4queue.models import TERMINAL, RequestState
from l4queue.observe import health
from l4queue.observe.watch import Watch
from l4queue.protocol.executor import AsyncExecutor, Executor
from l4queue.protocol.keys import Keys
from l4queue.protocol.upkeep import Upkeep
from tests.services.pipeline import MAX_LEN, ByteTokenizer, true, until
from workers.engine.emulated.engine import EmulatedEngine
from workers.loop.text import no_text
from workers.loop.worker import Worker
from workers.telemetry.observer import NullObserver

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

COST = StepCost(
    alpha_ms=4.0, beta_ms=0.01, gamma_ms=0.0, pi_ms=0.001, psi_ms=0.0, kv_capacity_tokens=100_000, max_num_seqs=32
)
LONG_S = 120.0
BYTES = b"\xff\xfe\x00"
NUMBERS = (b"abc", b"", b"-7", b"1e400", b"nan", b"9" * 400, BYTES)
_NAMES = itertools.count()


@dataclass(kw_only=True)
class Place:
    """One deployment in this process, with a raw connection for what nobody of ours would write."""

    settings: Settings
    client: AsyncClient
    executor: AsyncExecutor
    raw: Any
    keys: Keys
    dispatcher: Dispatcher
    upkeep: Upkeep
    tasks: dict[str, asyncio.Task[Any]]
    worker: Worker
    redis_url: str

    @property
    def incarnation(self) -> str:
        """Of the worker that serves."""
        return self.worker.lease.incarnation

    async def good(self, number: int = 3) -> None:
        """Requests of well-behaved clients are done."""
        handles = [await self.client.enqueue(token_ids=[1] * (5 + i), max_tokens=4) for i in range(number)]
        for handle in handles:
            assert len((await handle.result(timeout=LONG_S)).token_ids) == 4

    async def running(self) -> str:
        """The id of a request that the worker runs, and will for long."""
        handle = await self.client.enqueue(token_ids=[1] * 9, max_tokens=8000, ignore_eos=True)
        await until(lambda: self._runs(handle.id), timeout_s=LONG_S)
        return handle.id

    async def _runs(self, request_id: str) -> bool:
        record = await (await self.client.get(request_id)).status()
        return record.state is RequestState.RUNNING and record.offset > 0

    async def look(self) -> None:
        """Everything that reads or mends the deployment runs once, and none of it fails."""
        for _ in range(2):
            await self.upkeep.run_once(self.dispatcher.plan)
            await self.upkeep.measure_drain()
            await self.upkeep.repair_once()
            await self.upkeep.reroute(self.dispatcher.plan)
            await self.dispatcher.adopt_once()
            await replan_once(self.settings)
            await refine_once(self.settings)
            await self.worker.fleet_view.refresh()
            await asyncio.to_thread(self._look_blocking)
            await self.client.plan_history()
            await self.client.dead_letters()
        self.check()

    def _look_blocking(self) -> None:
        executor, namespace = Executor(self.redis_url), self.settings.namespace
        try:
            Watch(executor, namespace).look()
            exporter = Exporter(self.settings, executor)
            exporter.follow()
            exporter.follow()
            metrics = {metric.name: metric for metric in exporter.collect()}
            assert metrics["l4queue_redis_up"].samples[0].value == 1.0
            health.worker_life(executor, namespace, "w0")
            health.dispatcher_heard_s(executor, namespace, "host")
            health.planner_idle_s(executor, namespace)
        finally:
            executor.close()

    def check(self) -> None:
        """Every process serves."""
        for name, task in self.tasks.items():
            assert not task.done(), f"{name}: {task.exception()!r}"

    async def ended(self, request_id: str) -> RequestState:
        """The terminal state that this request comes to."""

        async def has_ended() -> bool:
            self.check()
            await self.upkeep.repair_once()
            await self.upkeep.run_once(self.dispatcher.plan)
            state = self.raw.hget(self.keys.request(request_id), "state")
            return state is not None and state.decode() in TERMINAL

        try:
            await until(has_ended, timeout_s=LONG_S)
        except TimeoutError:
            raise AssertionError(f"does not end: {self.raw.hgetall(self.keys.request(request_id))}") from None
        return RequestState(self.raw.hget(self.keys.request(request_id), "state").decode())

    def letters(self) -> list[str]:
        """All dead letters, as text."""
        if self.raw.type(self.keys.dead) != b"stream":
            return []
        return [repr(values) for _, values in self.raw.xrange(self.keys.dead)]


@asynccontextmanager
async def open_place(redis_url: str, namespace: str) -> AsyncIterator[Place]:
    """A dispatcher, upkeep, a worker and a client."""
    values: dict[str, Any] = {
        "lease_s": 5.0,
        "max_running": 16,
        "max_model_len": 4 * MAX_LEN,
        "engine": "emulated",
    }
    settings = Settings(redis_url=redis_url, namespace=namespace, metrics_port=9, **values)
    executor = AsyncExecutor(redis_url, retry_s=None)
    dispatcher = Dispatcher(settings=settings, executor=executor, tokenizer=ByteTokenizer(), name="d")  # type: ignore[arg-type]
    dispatcher._tokenizer.max_model_len = 4 * MAX_LEN
    worker = Worker(
        settings=settings,
        engine=EmulatedEngine(COST, speed=1.0, max_model_len=4 * MAX_LEN),
        observer=NullObserver(),
        worker_id="w0",
        text=no_text,
        cost=COST,
    )
    tasks = {
        "dispatcher": asyncio.create_task(dispatcher.run()),
        "worker": asyncio.create_task(worker.run()),
    }
    keys = Keys(namespace)
    raw = redis.Redis.from_url(redis_url, single_connection_client=True)
    async with AsyncClient(settings=settings) as client:
        place = Place(
            settings=settings,
            client=client,
            executor=executor,
            raw=raw,
            keys=keys,
            dispatcher=dispatcher,
            upkeep=Upkeep(settings=settings, executor=executor),
            tasks=tasks,
            worker=worker,
            redis_url=redis_url,
        )
        try:
            await place.good(1)
            yield place
            place.check()
        finally:
            worker.request_stop()
            dispatcher.request_stop()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
            await executor.close()
            raw.close()


@pytest.fixture
async def place(redis_url: str, namespace: str) -> AsyncIterator[Place]:
    """Serving already."""
    async with open_place(redis_url, namespace) as opened:
        yield opened


# what is written ------------------------------------------------------------------------------------
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


NAMES: dict[str, Callable[[Place], str]] = {
    "inbox": lambda p: p.keys.inbox,
    "counts": lambda p: p.keys.counts,
    "backlog": lambda p: p.keys.backlog,
    "foreground": lambda p: p.keys.foreground,
    "hist": lambda p: p.keys.hist,
    "workers": lambda p: p.keys.workers,
    "deadlines": lambda p: p.keys.deadlines,
    "tick": lambda p: p.keys.tick,
    "dead": lambda p: p.keys.dead,
    "finished": lambda p: p.keys.finished,
    "plan": lambda p: p.keys.plan,
    "plans": lambda p: p.keys.plans,
    "memory": lambda p: p.keys.memory,
    "decisions": lambda p: p.keys.decisions,
    "queue": lambda p: p.keys.queue("0"),
    "solo": lambda p: p.keys.queue("solo"),
    "personal": lambda p: p.keys.queue("@w0"),
    "wake": lambda p: p.keys.wake("0"),
    "wake personal": lambda p: p.keys.wake("@w0"),
    "worker": lambda p: p.keys.worker(p.incarnation),
    "held": lambda p: p.keys.held(p.incarnation),
    "control": lambda p: p.keys.control(p.incarnation),
    "mail": lambda p: p.keys.mailbox(p.client._core.client_id),
}


@pytest.mark.parametrize("name", NAMES)
async def test_a_key_of_another_type_under_our_name_is_set_aside(place: Place, name: str) -> None:
    """With its bytes among the dead letters and its value under another name; all goes on."""
    key = NAMES[name](place)
    aside = place.keys.prefix + "foreign:" + key.removeprefix(place.keys.prefix)
    with place.raw.pipeline() as both:
        both.delete(key)
        both.lpush(key, "somebody else's")
        both.execute()

    await place.good()
    await place.look()
    await until(lambda: true(bool(place.raw.exists(aside))), timeout_s=LONG_S)
    await place.good()
    await place.look()

    assert place.raw.type(key) != b"list"
    assert any("somebody else" in letter for letter in place.letters())


@pytest.mark.parametrize("values", [{"x": "y"}, {"t": b"abc"}, {"t": b"abcd"}, {"e": "weird"}, {BYTES: BYTES}])
@pytest.mark.parametrize("entry", ["999999-0", "999999-1", "18446744073709551615-18446744073709551615"])
async def test_a_foreign_entry_in_an_output_fails_that_request_alone(
    place: Place, entry: str, values: dict[Any, Any]
) -> None:
    """What no worker can follow ends in `failed`, with its record among the dead letters; its reader is told."""
    request_id = await place.running()
    place.raw.xadd(place.keys.output(request_id), values, id=entry)

    assert await place.ended(request_id) is RequestState.FAILED
    with pytest.raises(L4QueueError):
        await (await place.client.get(request_id)).result(timeout=LONG_S)
    await place.good()
    await place.look()
    assert any(request_id in letter for letter in place.letters())


RUNNING = {
    "offset": (*NUMBERS, None),
    "epoch": (*NUMBERS, None),
    "owner": (BYTES, None),
    "charge_tokens": NUMBERS,
    "ttl_ms": NUMBERS,
    "crashes": NUMBERS,
    "score": (b"abc", None),
    "stage": (None, BYTES),
    "moved_ms": NUMBERS,
    "first_token_ms": NUMBERS,
    "state": (b"weird", BYTES),
}


@pytest.mark.parametrize("field", RUNNING)
async def test_a_running_request_whose_record_is_broken_ends(place: Place, field: str) -> None:
    """By itself, by repair, or when it is cancelled; others go on."""
    for value in RUNNING[field]:
        request_id = await place.running()
        key = place.keys.request(request_id)
        if value is None:
            place.raw.hdel(key, field)
        else:
            place.raw.hset(key, field, value)
        await place.good(1)
        await place.look()
        if place.raw.hget(key, "state") == b"running":
            await place.client._executor.run(place.client._core.calls.cancel(request_id, reason="test"))
        if field != "state":
            assert await place.ended(request_id) in TERMINAL
    await place.good()


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


async def test_counts_are_whole_after_records_that_nobody_can_read(place: Place) -> None:
    """What is broken after it was counted leaves no request that is live for ever."""
    request_id = await place.running()
    place.raw.hset(place.keys.request(request_id), "offset", "abc")
    assert await place.ended(request_id) is RequestState.FAILED
    await place.good()
    assert int(place.raw.hget(place.keys.counts, "live")) == 0
