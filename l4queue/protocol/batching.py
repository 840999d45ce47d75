"""Commands of calls: neighbours of one script share an EVALSHA, which costs Redis half as much.

The scripts take several calls at once: see `lua/epilogue.lua`. Order is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from l4queue.protocol.calls import Arg, Call
from l4queue.protocol.scripts import script

__all__ = ("Commands", "round_trips")

_MAX_CALLS = 32
"""Most calls of one EVALSHA. Redis does nothing else meanwhile: about 1 ms at 30 microseconds a call."""
_MAX_BYTES = 65_536
"""Most bytes of keys and arguments of calls that share one. Chosen: larger calls gain nothing."""


_MAX_ROUND_TRIP_BYTES = 4 * 2**20
"""Most bytes of arguments of one round trip, but for a single larger call. Chosen: 33 ms at 1 Gbit/s, beside which
another round trip is nothing. As much is packed in memory, and sent again after a failure."""


def round_trips(calls: Sequence[Call[Any]]) -> Iterator[Commands]:
    """The same calls in order, cut into pieces of bounded size."""
    groups: list[Sequence[Call[Any]]] = []
    num_bytes = 0
    for group, size in _groups(calls):
        if groups and num_bytes + size > _MAX_ROUND_TRIP_BYTES:
            yield Commands(groups)
            groups, num_bytes = [], 0
        groups.append(group)
        num_bytes += size
    if groups:
        yield Commands(groups)


class Commands(Sequence[Call[Any]]):
    """Calls in groups, each with its command."""

    def __init__(self, groups: Sequence[Sequence[Call[Any]]]) -> None:
        self._groups = groups
        self._calls = [call for group in groups for call in group]
        self.words = [_command(group) for group in groups]

    @classmethod
    def of(cls, calls: Sequence[Call[Any]]) -> Commands:
        """The commands of calls that make one round trip."""
        return calls if isinstance(calls, Commands) else cls([group for group, _ in _groups(calls)])

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[Call[Any]]:
        return iter(self._calls)

    def __getitem__(self, place: Any) -> Any:
        return self._calls[place]

    def replies(self, found: Sequence[Any]) -> list[Any]:
        """One reply for each call: an error of a whole command is that of each of its calls."""
        replies: list[Any] = []
        for group, reply in zip(self._groups, found, strict=True):
            if len(group) == 1:
                replies.append(reply)
            else:
                replies += [reply] * len(group) if isinstance(reply, Exception) else reply
        return replies


def _groups(calls: Sequence[Call[Any]]) -> Iterator[tuple[Sequence[Call[Any]], int]]:
    """Neighbours that share a command, with the bytes of their arguments."""
    begin = num_bytes = 0
    for at, call in enumerate(calls):
        size = _size_bytes(call)
        is_next = call.script is not None and call.script == calls[begin].script
        if at > begin and (not is_next or at - begin == _MAX_CALLS or num_bytes + size > _MAX_BYTES):
            yield calls[begin:at], num_bytes
            begin, num_bytes = at, 0
        num_bytes += size
    if calls:
        yield calls[begin:], num_bytes


def _size_bytes(call: Call[Any]) -> int:
    """Bytes of the arguments; names of keys and numbers are short."""
    size = 0
    for arg in call.args:
        kind = type(arg)
        if kind is str or kind is bytes:
            size += len(arg)  # type: ignore[arg-type]  # not a number
    return size


def _command(group: Sequence[Call[Any]]) -> tuple[Arg, ...]:
    first = group[0]
    if first.script is None:
        return first.args
    keys = [key for call in group for key in call.keys]
    args = [arg for call in group for arg in call.args]
    layout = " ".join(f"{len(call.keys)},{len(call.args)}" for call in group) if len(group) > 1 else ""
    return ("EVALSHA", script(first.script).sha, len(keys), *keys, *args, layout)
