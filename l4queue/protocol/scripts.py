"""The Lua scripts, read once: each file is one transition, between the shared parts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

__all__ = ("Script", "all_scripts", "assembled", "lua_text", "script")

_NAMES = (
    "aside",
    "ask",
    "bury",
    "cancel",
    "cancel_batch",
    "charge",
    "emit",
    "evict",
    "expire",
    "extend",
    "follow",
    "forget",
    "hold",
    "hold_batch",
    "look",
    "mark_read",
    "migrate",
    "note_batch",
    "pack",
    "pardon",
    "publish",
    "reap",
    "refund",
    "refuse",
    "release",
    "renew",
    "repair",
    "retire",
    "ring",
    "route",
    "settle",
    "submit",
    "survey",
    "take",
    "unfollow",
)


@dataclass(frozen=True, slots=True)
class Script:
    """One server-side function and the digest by which it is called."""

    name: str
    source: str
    sha: str


def assembled(name: str, text_of: Callable[[str], str]) -> Script:
    """A script from its parts: what all share, its own text as the function `run`, the epilogue that calls it."""
    shared = "".join(map(text_of, ("prelude", "endings", "wakeups")))
    source = f"{shared}local function run(KEYS, ARGV)\n{text_of(name)}end\n{text_of('epilogue')}"
    return Script(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


def lua_text(name: str) -> str:
    """The text of one Lua file of this package."""
    return (files("l4queue.protocol") / "lua" / f"{name}.lua").read_text("utf-8")


@cache
def script(name: str) -> Script:
    """The script of this name."""
    return assembled(name, lua_text)


def all_scripts() -> tuple[Script, ...]:
    """Every script, in name order."""
    return tuple(script(name) for name in _NAMES)
