"""Keys of another type, and broken records and outputs of requests that run: each ends alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from l4queue.errors import L4QueueError
from l4queue.models import TERMINAL, RequestState
from tests.services.foreign_place import BYTES, LONG_S, NUMBERS, Place
from tests.services.pipeline import true, until

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]


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
    "ready": lambda p: p.keys.ready("0"),
    "thieves": lambda p: p.keys.thieves,
    "survey": lambda p: p.keys.survey,
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
        if name == "wake":
            both.delete(place.keys.ready("0"))  # it tells only of what nobody is ready for
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


async def test_counts_are_whole_after_records_that_nobody_can_read(place: Place) -> None:
    """What is broken after it was counted leaves no request that is live for ever."""
    request_id = await place.running()
    place.raw.hset(place.keys.request(request_id), "offset", "abc")
    assert await place.ended(request_id) is RequestState.FAILED
    await place.good()
    assert int(place.raw.hget(place.keys.counts, "live")) == 0
