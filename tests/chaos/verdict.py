"""What must hold when a storm is over: one outcome each, the right tokens, nothing left, nothing growing."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from l4queue.models import RequestState
from l4queue.protocol.executor import Executor
from l4queue.protocol.records import OutputEntry
from tests.chaos.storm import MOVES, Storm
from tests.chaos.wishes import Wish, expected, wish
from tests.protocol.consistency import check
from tests.protocol.scene import Scene

__all__ = ("Verdict", "judge")

_FOR_EVER = {
    "in",
    "backlog",
    "foreground",
    "counts",
    "hist",
    "workers",
    "tick",
    "plan",
    "plans",
    "memory",
    "decisions",
    "finished",
    "packed",
    "results",
    "read",
    "keyed",
    "given",
}
_MAX_LEDGER_BYTES = 8_400


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Figures of one storm. `errors` is what went wrong; none of it may."""

    errors: tuple[str, ...]
    num_requests: int
    num_resumed: int
    num_singled_out: int
    states: dict[str, int]
    moves: dict[str, int]


def judge(storm: Storm, redis_url: str, namespace: str) -> Verdict:
    """Look at every record, every stream, every key, with plain reads."""
    executor = Executor(redis_url)
    scene = Scene(executor, namespace)
    errors: list[str] = list(storm.crashes)
    try:
        records = _records(scene)
        try:
            check(scene, are_tokens_marked=False)
        except AssertionError as error:
            errors.append(f"inconsistent: {error}")
        errors += _one_record_each(storm, records)
        for request_id, record in records.items():
            errors += _right(scene, request_id, record, wish(storm.seed, _number(record)))
        errors += _clients_saw_the_same(storm, records)
        errors += _bounded(scene, records)
        counts = scene.counts()
    finally:
        scene.close()
        executor.close()
    return Verdict(
        errors=tuple(errors),
        num_requests=len(records),
        num_resumed=sum(int(r["epoch"]) > 1 for r in records.values()),
        num_singled_out=sum(int(r["crashes"]) >= 2 for r in records.values()),
        states=dict(Counter(r["state"] for r in records.values())),
        moves={name: counts.get(name, 0) for name in MOVES},
    )


def _records(scene: Scene) -> dict[str, dict[str, str]]:
    prefix, found = scene.keys.request(""), {}
    for key in scene.raw.scan_iter(match=prefix + "*", count=1000):
        values = scene.raw.hgetall(key)
        found[key.decode().removeprefix(prefix)] = {k.decode(): v.decode("latin-1") for k, v in values.items()}
    return found


def _number(record: dict[str, str]) -> int:
    return int(json.loads(record["body"])["metadata"]["n"])


def _one_record_each(storm: Storm, records: dict[str, dict[str, str]]) -> list[str]:
    """A repeated wish is the same request; what a client was told of is there."""
    times = Counter(_number(record) for record in records.values())
    errors = [f"wish {n} became {k} requests" for n, k in times.items() if k > 1]
    ended = [row["n"] for row in storm.endings]
    errors += [f"wish {n} ended {k} times for its client" for n, k in Counter(ended).items() if k > 1]
    lost = set(storm.made) - set(ended)
    return errors + [f"wish {n} never ended for its client" for n in sorted(lost)]


def _right(scene: Scene, request_id: str, record: dict[str, str], one: Wish) -> list[str]:
    """The outcome is one that was asked for, and the output is that of an uncut run."""
    state, right = RequestState(record["state"]), expected(one.prompt, one.max_tokens)
    entries = [OutputEntry.parse(i, v) for i, v in scene.raw.xrange(scene.keys.output(request_id))]
    ids = tuple(token for entry in entries for token in entry.token_ids)
    may = {RequestState.DONE}
    if one.cancel_after is not None:
        may = {RequestState.DONE, RequestState.CANCELLED}
    if one.deadline_s is not None:
        may = {RequestState.DONE, RequestState.EXPIRED}
    if one.is_too_long:
        may = {RequestState.FAILED}
    errors = [] if state in may else [f"{request_id} (wish {one.n}) is {state}"]
    if ids != right[: len(ids)] or (state is RequestState.DONE and ids != right):
        errors.append(f"{request_id} (wish {one.n}, {state}) has {len(ids)} tokens that are not those of one run")
    if one.is_pinned and state is not RequestState.DONE and ids:
        errors.append(f"{request_id} is pinned and showed tokens before its end")
    return errors


def _clients_saw_the_same(storm: Storm, records: dict[str, dict[str, str]]) -> list[str]:
    errors = []
    for row in storm.endings:
        record: Any = records.get(row["id"])
        told = f"wish {row['n']} ({row['id']})"
        if record is None:
            errors.append(f"{told} has no record")
        elif (record["state"], int(record["offset"])) != (row["outcome"], row["tokens"]):
            errors.append(f"{told}: client saw {row['outcome']} after {row['tokens']} tokens, record {record}")
        if row["wrong"]:
            errors.append(f"{told}: {row['wrong']}")
    return errors


def _bounded(scene: Scene, records: dict[str, dict[str, str]]) -> list[str]:
    """What is kept for ever is of fixed number and capped; the rest has a TTL. Nobody is left."""
    raw, keys = scene.raw, scene.keys
    names = [k.decode().removeprefix(keys.prefix) for k in raw.scan_iter(match=keys.prefix + "*", count=1000)]
    lasting = [name for name in names if raw.pttl(keys.prefix + name) == -1]  # -2: it has just gone
    eternal = [name for name in lasting if name not in _FOR_EVER]
    errors = [f"{name} would stay for ever" for name in eternal]
    errors += [f"{name} is left" for name in names if name.startswith(("held:", "w:", "q:"))]
    for name in names:
        if name.startswith(("wake:", "ctl:")) and raw.xlen(keys.prefix + name) > 500:
            errors.append(f"{name} grows")
    backlog = {k.decode(): int(v) for k, v in raw.hgetall(keys.backlog).items()}
    errors += [f"backlog of {stage} is {tokens}" for stage, tokens in backlog.items() if tokens]
    errors += [f"backlog remembers {stage}" for stage in backlog if stage.startswith("@")]
    if raw.xlen(keys.inbox):
        errors.append("the inbox is not empty")
    errors += [
        f"{i} has a long ledger" for i, r in records.items() if len(r.get("ledger", "")) > _MAX_LEDGER_BYTES
    ]
    return errors
