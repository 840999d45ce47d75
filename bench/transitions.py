"""CPU time of Redis, and of the caller, for each transition of a short request: submit, route, take, emit, settle.

    python bench/transitions.py [--requests 8192] [--at-once 1,64] [--rounds 3] [--json]

A redis-server of its own (AOF once a second). Requests of a text and 16 output tokens go through their life in
groups of `--at-once` calls of one round trip, by the scripts of client, dispatcher and worker. There is no
engine, and nobody follows them. Redis counts the commands, inside scripts too. Medians of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from told import machine, tell

from l4queue.cli.stack.embedded import EmbeddedRedis
from l4queue.models import RequestState
from l4queue.policy.admission import unbounded_budget
from l4queue.protocol.calls import Call, Calls, Taker
from l4queue.protocol.executor import Executor
from l4queue.protocol.keys import Keys
from l4queue.protocol.records import Outcome

_EVERYTHING = 10**12
_BODY = '{"params":{"max_tokens":20}}'
_OWNER: dict[str, Any] = {"incarnation": "w:1", "epoch": 1}
_TOKENS = 16

Figures = dict[str, float]


class Lives:
    """Requests that go through their transitions together."""

    def __init__(self, url: str, *, namespace: str, num_requests: int, at_once: int) -> None:
        self._executor = Executor(url)
        self._keys = Keys(namespace)
        self._calls = Calls(self._keys)
        self._ids = [uuid.uuid4().hex for _ in range(num_requests)]
        self._at_once = at_once

    def measure(self) -> dict[str, Figures]:
        """Microseconds and commands of each transition, per request."""
        register = self._calls.renew("w:1", worker_id="w", lease_ms=10**9, load="{}", sequence=0, register=True)
        self._executor.run(register)
        return {name: self._timed(run) for name, run in self._transitions().items()}

    def close(self) -> None:
        """Close the connections."""
        self._executor.close()

    def _transitions(self) -> dict[str, Callable[[], None]]:
        calls = self._calls
        common: dict[str, Any] = {"digest": "", "kind": "p", "prompt": b"Name a river.", "client_id": "c"}
        common |= {"max_live_tokens": _EVERYTHING, "max_live_bytes": _EVERYTHING, "deadline_ms": 0}
        common |= {"ttl_ms": 86_400_000, "body": _BODY, "charge_tokens": 30}
        routed: dict[str, Any] = {"stage": "0", "score": 1.0, "token_ids": range(4), "max_tokens": 20}
        routed |= {"entry_id": "1-1", "plan_version": 0, "bucket": 2}
        told: dict[str, Any] = {**_OWNER, "offset": 0, "token_ids": range(_TOKENS), "text": " a word" * _TOKENS}
        last: dict[str, Any] = {**_OWNER, "offset": _TOKENS, "token_ids": (), "text": ""}
        last["outcome"] = Outcome(state=RequestState.DONE, finish_reason="length")
        return {
            "submit": lambda: self._each([calls.submit(i, **common) for i in self._ids]),
            "route": lambda: self._each([calls.route(i, **routed) for i in self._ids]),
            "take": self._take,
            "emit": lambda: self._each([calls.emit(i, **told) for i in self._ids]),
            "settle": lambda: self._each([calls.settle(i, **last) for i in self._ids]),
        }

    def _each(self, calls: Sequence[Call[Any]]) -> None:
        for begin in range(0, len(calls), self._at_once):
            self._executor.run_many(calls[begin : begin + self._at_once])

    def _take(self) -> None:
        taker = Taker(worker_id="w", incarnation="w:1", stage="0")
        budget = unbounded_budget(self._at_once, reason="benchmark")
        for number in range(0, len(self._ids), self._at_once):
            self._executor.run(self._calls.take("0", taker=taker, nonce=str(number), budget=budget))

    def _timed(self, run: Callable[[], None]) -> Figures:
        before, began_s = self._spent(), time.process_time()
        run()
        own_s, after, count = time.process_time() - began_s, self._spent(), len(self._ids)
        return {
            "redis_us": (after[0] - before[0]) / count * 1e6,
            "caller_us": own_s / count * 1e6,
            "commands": (after[1] - before[1]) / count,
        }

    def _spent(self) -> tuple[float, int]:
        """CPU s of the server, and its commands."""
        cpu, stats = (
            self._executor.run(Call(None, (), ("INFO", section), dict)) for section in ("cpu", "commandstats")
        )
        spent_s = cpu["used_cpu_user_main_thread"] + cpu["used_cpu_sys_main_thread"]
        return float(spent_s), sum(one["calls"] for one in stats.values())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=8192)
    parser.add_argument("--at-once", default="1,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    sizes = [int(size) for size in given.at_once.split(",")]
    rounds: dict[int, list[dict[str, Figures]]] = {size: [] for size in sizes}
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder), durability="fast", port=0) as redis:
        for number in range(given.rounds):
            for size in sizes:
                name = f"{number}-{size}"
                lives = Lives(redis.url, namespace=name, num_requests=given.requests, at_once=size)
                rounds[size].append(lives.measure())
                lives.close()
    found: dict[str, Any] = {"requests": given.requests, "rounds": given.rounds}
    for size, runs in rounds.items():
        for name in runs[0]:
            for key in runs[0][name]:
                found[f"{name}_{key}_at_{size}"] = round(statistics.median(run[name][key] for run in runs), 2)
        for key in ("redis_us", "caller_us", "commands"):
            found[f"sum_{key}_at_{size}"] = round(sum(found[f"{name}_{key}_at_{size}"] for name in runs[0]), 2)
    tell({**found, "machine": machine()}, as_json=given.json)


if __name__ == "__main__":
    main()
