"""Load from outside, with the Python client, and an account of every request that was accepted."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass
from itertools import count

import numpy as np

from l4queue import Client, Settings
from l4queue.errors import L4QueueError, QueueFull, ServiceUnavailable
from tests.compose.console import Failed, check, say, until

__all__ = ("Mix", "Traffic")

_NUM_STREAMS = 2
_NUMBERS = count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What is sent: requests a second, and the range of their lengths (log-uniform)."""

    per_s: float
    prompt_tokens: tuple[int, int]
    max_tokens: tuple[int, int]


class Traffic:
    """Sends until stopped. A try that Redis did not answer is repeated under the same idempotency key."""

    def __init__(self, settings: Settings, mix: Mix, *, seed: int) -> None:
        self.client = Client(settings=settings)
        self._mix = mix
        self._rng = np.random.default_rng(seed)
        self._name = f"{seed}-{next(_NUMBERS)}"
        self._wanted: dict[str, int] = {}
        self._streamed = 0
        self._outages = 0
        self._problems: list[str] = []
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._send, daemon=True)]
        self._threads += [threading.Thread(target=self._read, args=(i,), daemon=True) for i in range(_NUM_STREAMS)]

    @property
    def num_accepted(self) -> int:
        """How many have an id so far."""
        return len(self._wanted)

    def start(self) -> None:
        """Begin to send."""
        for thread in self._threads:
            thread.start()

    def wait_accepted(self, number: int, *, timeout_s: float = 120.0) -> None:
        """Until so many more were accepted."""
        goal = self.num_accepted + number
        until(lambda: self.num_accepted >= goal, f"{number} more requests accepted", timeout_s=timeout_s)

    def finish(self, *, timeout_s: float) -> None:
        """Stop sending, wait for every accepted request and check that each ended done, whole, once."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(timeout_s)
        check(not self._problems, f"no stream repeated, skipped or lost a token {self._problems[:3]}")
        handles = [self.client.get(request_id) for request_id in self._wanted]
        ended = list(self.client.as_completed(handles, timeout=timeout_s))
        records = [handle.status() for handle in ended]
        states = Counter(str(record.state) for record in records)
        say(f"outcomes of {len(handles)} accepted requests: {dict(states)}; {self._outages} sends met an outage")
        check(states == {"done": len(handles)}, "every accepted request ended done")
        short = [r.request_id for r in records if r.output_tokens != self._wanted[r.request_id]]
        check(not short, f"each has all the tokens that it asked for {short[:3]}")
        check(len({handle.id for handle in ended}) == len(handles), "each ended once")
        moved = sum(record.was_resumed for record in records)
        waits = sorted(r.e2e_s for r in records if r.e2e_s is not None)
        say(
            f"{moved} of them changed their worker; latency p50 {waits[len(waits) // 2]:.2f} s, "
            f"p99 {waits[int(len(waits) * 0.99)]:.2f} s; {self._streamed} read token by token meanwhile"
        )
        self.client.close()

    def _send(self) -> None:
        pause_s = 0.25
        while not self._stopping.is_set():
            number = int(self._rng.poisson(self._mix.per_s * pause_s))
            requests = [self._request() for _ in range(number)]
            while requests and not self._stopping.is_set():
                try:
                    for request, handle in zip(requests, self.client.enqueue_many(requests), strict=True):
                        self._wanted[handle.id] = int(request["max_tokens"])  # type: ignore[call-overload]
                    break
                except (ServiceUnavailable, QueueFull):
                    self._outages += 1
                    time.sleep(0.5)
                except L4QueueError as error:
                    self._problems.append(f"enqueue: {error}")
                    return
            self._stopping.wait(pause_s)

    def _request(self) -> dict[str, object]:
        prompt, output = (self._length(bounds) for bounds in (self._mix.prompt_tokens, self._mix.max_tokens))
        token_ids = self._rng.integers(300, 8000, prompt).tolist()
        key = f"{self._name}-{next(_NUMBERS)}"
        return {
            "token_ids": token_ids,
            "max_tokens": output,
            "temperature": 0.0,
            "ignore_eos": True,
            "idempotency_key": key,
        }

    def _length(self, bounds: tuple[int, int]) -> int:
        low, high = np.log(bounds)
        return round(float(np.exp(self._rng.uniform(low, high))))

    def _read(self, number: int) -> None:
        """Follow one long request after the other, whatever happens to Redis and workers meanwhile."""
        rng = np.random.default_rng((number, 1))
        while not self._stopping.is_set():
            try:
                handle = self.client.enqueue(
                    token_ids=rng.integers(300, 8000, 64).tolist(),
                    max_tokens=self._mix.max_tokens[1],
                    temperature=0.0,
                    ignore_eos=True,
                    idempotency_key=f"{self._name}-stream-{number}-{self._streamed}",
                )
                self._wanted[handle.id] = self._mix.max_tokens[1]
                self._follow(handle)
            except ServiceUnavailable:
                self._outages += 1
                time.sleep(0.5)
            except (L4QueueError, Failed) as error:
                self._problems.append(f"stream: {error}")
                return

    def _follow(self, handle: object) -> None:
        seen = 0
        while True:
            try:
                for chunk in handle.stream(after=seen, timeout=300.0):  # type: ignore[attr-defined]
                    if chunk.offset != seen + len(chunk.token_ids):
                        raise Failed(f"{handle}: {seen} tokens read, then offset {chunk.offset}")
                    seen = chunk.offset
                break
            except ServiceUnavailable:
                self._outages += 1
                time.sleep(0.5)
        if seen != self._mix.max_tokens[1]:
            raise Failed(f"{handle}: {seen} tokens read")
        self._streamed += 1
