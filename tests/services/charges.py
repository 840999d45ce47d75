"""Charges of one caller as Redis executes them: MONITOR shows what scripts write, so none is missed."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from redis import Redis

__all__ = ("Charges", "watched_charges")

_ID = re.compile(r"k[0-9a-f]{31}")
_END = "no-more-charges"


@dataclass(kw_only=True)
class Charges:
    """How often each line was charged and settled; complete once the watch has ended."""

    charged: Counter[str] = field(default_factory=Counter)
    settled: Counter[str] = field(default_factory=Counter)

    def saw(self, command: str) -> None:
        """Count one command about the hash of charges."""
        word = command.partition(" ")[0].upper()
        if word in ("HSET", "HDEL"):
            (self.charged if word == "HSET" else self.settled).update(_ID.findall(command))


@contextmanager
def watched_charges(redis: Redis, name: str) -> Iterator[Charges]:
    """Watch the hash of this name."""
    seen, is_watching = Charges(), threading.Event()

    def watch() -> None:
        with redis.monitor() as monitor:
            is_watching.set()
            for told in monitor.listen():
                command = str(told["command"])
                if _END in command:
                    return
                if name in command:
                    seen.saw(command)

    thread = threading.Thread(target=watch)
    thread.start()
    is_watching.wait()
    try:
        yield seen
    finally:
        redis.echo(_END)  # everything before it has been told by then
        thread.join()
