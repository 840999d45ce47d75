"""Batches over HTTP whose gateways are killed while they run them: for the suite and for `bench/http_batch.py`."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from typing import Any

from openai.types import Batch

from tests.services.gateways import Gateways
from tests.services.processes import until

__all__ = ("answers_of", "batch_lines", "begin", "ended", "kill_its_gateway")

_ENDED = ("failed", "completed", "expired", "cancelled")


def batch_lines(number: int, *, max_tokens: int) -> bytes:
    """Greedy chats, and one that is refused."""
    common = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    bodies: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"line {i}"}], **common} for i in range(number)
    ]
    bodies[number // 2]["n"] = 2
    lines = [
        json.dumps({"custom_id": f"c{i}", "method": "POST", "url": "/v1/chat/completions", "body": body})
        for i, body in enumerate(bodies)
    ]
    return "\n".join(lines).encode()


def begin(gateways: Gateways, name: str, lines: bytes) -> Batch:
    """Upload and begin, through this gateway."""
    with gateways.openai(name) as client:
        file = client.files.create(file=("in.jsonl", lines), purpose="batch")
        return client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )


def kill_its_gateway(gateways: Gateways, names: Sequence[str], batch: Batch, *, num_completed: int) -> str:
    """SIGKILL of the gateway that runs the batch, once so many lines are finished; its name."""
    with gateways.openai(names[0]) as client:

        def has_come_so_far() -> bool:
            found = client.batches.retrieve(batch.id)
            assert found.status not in _ENDED, "it has ended before the kill"
            return found.request_counts is not None and found.request_counts.completed >= num_completed

        until(has_come_so_far, f"{num_completed} lines are finished", timeout_s=1800)
    last = {name: gateways.processes.log(name).rfind(f"runs a batch batch={batch.id}") for name in names}
    holder = max(last, key=lambda name: last[name])
    assert last[holder] >= 0, f"no gateway says that it runs {batch.id}"
    gateways.processes.stop(holder, signal.SIGKILL)
    return holder


def ended(gateways: Gateways, name: str, batch: Batch) -> Batch:
    """The batch, once it has ended."""
    with gateways.openai(name) as client:

        def found() -> Batch | None:
            one = client.batches.retrieve(batch.id)
            return one if one.status in _ENDED else None

        one = until(found, "the batch has ended", timeout_s=1800)
        assert one is not None
        return one


def answers_of(gateways: Gateways, name: str, batch: Batch) -> dict[str, Any]:
    """By custom_id what does not change from run to run; AssertionError where one is there twice."""
    answers: dict[str, Any] = {}
    with gateways.openai(name) as client:
        for file_id in (batch.output_file_id, batch.error_file_id):
            content = b"" if file_id is None else client.files.content(file_id).content
            for line in content.splitlines():
                answer = json.loads(line)
                assert answer["custom_id"] not in answers, answer["custom_id"]
                response = answer["response"]
                body = {k: v for k, v in response["body"].items() if k not in ("id", "created")}
                answers[answer["custom_id"]] = (response["status_code"], body)
    return answers
