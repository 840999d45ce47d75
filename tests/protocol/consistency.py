"""What must hold of everything under a namespace at any moment, read with plain commands only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from l4queue.models import TERMINAL, RequestState
from l4queue.protocol.records import OutputEntry
from tests.protocol.scene import Scene

__all__ = ("check",)

_EXPIRING = ("ctl:", "lost:", "mail:", "news:", "wake:")
_LIVING = {state.value for state in RequestState} - {state.value for state in TERMINAL}


def check(scene: Scene, *, are_tokens_marked: bool = True) -> None:
    """Records, queues, leases, inbox, counters, outputs and lifetimes agree with each other.

    Tokens of a scene are marked: they tell epoch and position. Those of an engine are not.
    """
    raw, keys = scene.raw, scene.keys
    names = [k.decode().removeprefix(keys.prefix) for k in raw.scan_iter(match=keys.prefix + "*", count=1000)]
    records = {n[4:]: _text(raw.hgetall(keys.prefix + n)) for n in names if n.startswith("req:")}
    _queues(scene, names, records)
    _leases(scene, names, records)
    _inbox(scene, records)
    _counters(scene, records)
    _deadlines(scene, records)
    for request_id, record in records.items():
        _output(scene, request_id, record, are_marked=are_tokens_marked)
    for name in names:
        if name.startswith(_EXPIRING):
            assert raw.pttl(keys.prefix + name) != -1, f"{name} would stay for ever"  # -2: it has just expired


def _text(values: dict[bytes, bytes]) -> dict[str, str]:
    return {k.decode(): v.decode("latin-1") for k, v in values.items()}


def _length(record: dict[str, str]) -> int:
    return int(record["prompt_tokens"]) + int(record["offset"])


def _queues(scene: Scene, names: Iterable[str], records: dict[str, dict[str, str]]) -> None:
    raw, keys = scene.raw, scene.keys
    stages = {n[2:] for n in names if n.startswith("q:")}
    waiting: dict[str, str] = {}
    for stage in stages:
        for member, score in raw.zrange(keys.queue(stage), 0, -1, withscores=True):
            request_id = member.decode()
            assert request_id not in waiting, f"{request_id} waits twice"
            waiting[request_id] = stage
            assert records[request_id]["state"] == "queued"
            assert records[request_id]["stage"] == stage
            assert float(records[request_id]["score"]) == score
    queued = {i for i, record in records.items() if record["state"] == "queued"}
    assert queued == set(waiting), "every queued record has a queue entry, and nothing else has one"
    tokens: Counter[str] = Counter()
    for request_id, stage in waiting.items():
        tokens[stage] += _length(records[request_id])
    backlog = {stage: int(n) for stage, n in _text(raw.hgetall(keys.backlog)).items()}
    assert {s: n for s, n in backlog.items() if n} == dict(tokens), "backlog is the sum of what waits"


def _leases(scene: Scene, names: Iterable[str], records: dict[str, dict[str, str]]) -> None:
    raw, keys = scene.raw, scene.keys
    workers = {w.decode() for w in raw.zrange(keys.workers, 0, -1)}
    held: dict[str, str] = {}
    for name in names:
        if name.startswith("held:"):
            assert name[5:] in workers, f"{name} belongs to no registered worker"
            for member in raw.smembers(keys.prefix + name):
                assert member.decode() not in held, f"{member.decode()} is held twice"
                held[member.decode()] = name[5:]
        if name.startswith("w:"):
            assert name[2:] in workers, f"{name} outlives its worker"
    running = {i: record["owner"] for i, record in records.items() if record["state"] == "running"}
    assert running == held, "every running record is held by its owner, and nothing else is held"
    for request_id, record in records.items():
        if record["state"] != "running":
            assert "owner" not in record, f"{request_id} is {record['state']} and still has an owner"


def _inbox(scene: Scene, records: dict[str, dict[str, str]]) -> None:
    entries = {values[b"i"].decode() for _, values in scene.raw.xrange(scene.keys.inbox)}
    submitted = {i for i, record in records.items() if record["state"] == "submitted"}
    assert submitted <= entries, "every submitted record has an inbox entry"


def _counters(scene: Scene, records: dict[str, dict[str, str]]) -> None:
    counts = scene.counts()
    live = [record for record in records.values() if record["state"] in _LIVING]
    assert counts.get("live", 0) == len(live)
    assert counts.get("live_tokens", 0) == sum(int(r["charge_tokens"]) for r in live)
    assert counts.get("live_bytes", 0) == sum(int(r["charge_bytes"]) for r in live)
    assert counts.get("submitted", 0) == len(records)
    ended = Counter(record["state"] for record in records.values() if record["state"] not in _LIVING)
    assert {s.value: counts.get(s.value, 0) for s in TERMINAL if counts.get(s.value, 0)} == dict(ended)
    facts = Counter(values[b"i"].decode() for _, values in scene.raw.xrange(scene.keys.finished))
    assert facts == Counter(i for i, r in records.items() if r["state"] not in _LIVING), "one ending each"


def _deadlines(scene: Scene, records: dict[str, dict[str, str]]) -> None:
    for member in scene.raw.zrange(scene.keys.deadlines, 0, -1):
        assert records[member.decode()]["state"] in _LIVING, "a deadline of something finished"


def _output(scene: Scene, request_id: str, record: dict[str, str], *, are_marked: bool) -> None:
    raw, keys = scene.raw, scene.keys
    entries: list[tuple[bytes, dict[bytes, Any]]] = raw.xrange(keys.output(request_id))
    offset = epoch = 0
    for index, (entry_id, values) in enumerate(entries):
        entry = OutputEntry.parse(entry_id, values)
        if entry.state is not None:
            assert index == len(entries) - 1, "nothing follows the end marker"
            assert entry.state.value == record["state"]
        assert entry.upto == offset + len(entry.token_ids), "output is contiguous and ids are offsets"
        for token in entry.token_ids if are_marked else ():
            assert token % 1000 == offset
            assert token // 1000 >= epoch, "an earlier owner wrote after a later one"
            epoch, offset = token // 1000, offset + 1
        offset = entry.upto
    assert offset == int(record["offset"])
    is_over = record["state"] not in _LIVING
    assert (bool(entries) and b"e" in entries[-1][1]) is is_over, "the end marker tells the end"
    assert (raw.pttl(keys.request(request_id)) > 0) is is_over, "exactly what is finished has a TTL"
    if entries:
        assert (raw.pttl(keys.output(request_id)) > 0) is is_over
    if is_over:
        assert not {"prompt", "ids"} & set(record), "prompts do not outlive their request"
