"""Claims of names, such as a worker's, on one Redis: the first process has a name for as long as it renews it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from l4queue.protocol.calls import Call
from l4queue.protocol.keys import Keys

__all__ = ("claim", "extend_claim", "give_back", "left_ms")


def claim(keys: Keys, name: str, *, token: str, ttl_ms: int) -> list[Call[Any]]:
    """Take a name unless another token has it. The last reply is the token that has it now."""
    key = keys.name(name)
    return [
        _plain("SET", key, token, "NX", "PX", ttl_ms),
        Call(None, (key,), ("GET", key), lambda reply: (reply or b"").decode(errors="replace")),
    ]


def extend_claim(keys: Keys, name: str, *, ttl_ms: int) -> Call[Any]:
    """Keep a claim for longer."""
    return _plain("PEXPIRE", keys.name(name), ttl_ms)


def left_ms(keys: Keys, name: str) -> Call[int]:
    """How long a claim holds if it is not renewed; negative where there is none."""
    return Call(None, (keys.name(name),), ("PTTL", keys.name(name)), int)


def give_back(keys: Keys, names: Iterable[str]) -> Call[Any]:
    """Let others have these names at once."""
    return _plain("DEL", *(keys.name(name) for name in names))


def _plain(*words: str | int) -> Call[Any]:
    return Call(None, (str(words[1]),), words, lambda reply: reply)
