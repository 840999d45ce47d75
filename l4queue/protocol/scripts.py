"""The Lua scripts, read once: each file is one transition, with the shared prelude in front."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

__all__ = ("Script", "all_scripts", "script")

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
    "hold_batch",
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
    "route",
    "settle",
    "submit",
    "take",
    "unfollow",
)


@dataclass(frozen=True, slots=True)
class Script:
    """One server-side function and the digest by which it is called."""

    name: str
    source: str
    sha: str


@cache
def script(name: str) -> Script:
    """The script of this name, with the prelude prepended."""
    folder = files("l4queue.protocol") / "lua"
    source = (folder / "prelude.lua").read_text("utf-8") + (folder / f"{name}.lua").read_text("utf-8")
    return Script(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


def all_scripts() -> tuple[Script, ...]:
    """Every script, in name order."""
    return tuple(script(name) for name in _NAMES)
