"""The server against the model: records, outputs, ledgers, queues, leases and counters must be the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from l4queue.protocol.calls import Call
from tests.protocol.model import Model, Req
from tests.protocol.scene import Scene

__all__ = ("agree",)


def agree(scene: Scene, model: Model, seen: dict[str, list[tuple[int, ...]]], *, stages: Sequence[str]) -> None:
    """All in one round trip. `seen` is what clients have read so far, by request: it grows here."""
    reads = scene.reads
    ids, leases = list(model.reqs), list(model.leases)
    answers: list[Any] = scene.executor.run_many(
        [
            *(reads.record(i) for i in ids),
            *(reads.output(i) for i in ids),
            *(_story(scene, i) for i in ids),
            *(reads.queue_ids(stage, limit=1000) for stage in stages),
            *(reads.held(worker) for worker in leases),
            reads.incarnations(),
            reads.counts(),
        ]
    )
    found = iter(answers)
    for request_id in ids:
        _record_agrees(model.reqs[request_id], next(found))
    for request_id in ids:
        shown = [entry.token_ids for entry in next(found)]
        before = seen.get(request_id, [])
        assert shown[: len(before)] == before, "what a client has read never changes"
        seen[request_id] = shown
    for request_id in ids:
        req, (ledger, is_moved, kv, came_from, score) = model.reqs[request_id], next(found)
        assert ledger == req.ledger, request_id
        assert (is_moved, kv, came_from, score) == (req.is_moved, req.kv, req.came_from, req.score), request_id
    for stage in stages:
        assert next(found) == model.waiting(stage)
    for worker in leases:
        assert next(found) == model.held(worker)
    assert {worker for worker, _ in next(found)} == set(leases)
    counts = next(found)
    for name in ("handovers", "steals_running", "steals_waiting", "resumes", "pardoned"):
        assert int(counts.get(name, 0)) == model.counts[name], name


def _record_agrees(req: Req, record: Any) -> None:
    found = (record.state, record.epoch, record.offset, record.crashes, record.stage or "")
    assert found == (req.state, req.epoch, req.offset, req.crashes, req.stage), record.request_id


def _story(scene: Scene, request_id: str) -> Call[tuple[list[str], bool, str, str, float]]:
    """What the ledger tells, whether a move still lacks its first token, ticket, the worker before, place."""
    args = ("HMGET", scene.keys.request(request_id), "ledger", "moved_ms", "kv", "from", "score")

    def parse(row: list[bytes | None]) -> tuple[list[str], bool, str, str, float]:
        lines = [json.loads(line)["what"] for line in (row[0] or b"").splitlines()]
        kv, came_from, score = (value or b"" for value in row[2:])
        return lines, row[1] is not None, kv.decode(), came_from.decode(), float(score or 0)

    return Call(None, (), args, parse)
