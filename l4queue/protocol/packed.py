"""Packed outputs and records of finished requests, as `pack.lua` stores them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from l4queue.protocol.records import OutputEntry

__all__ = ("cut", "entries_of")

_MAX_PIECES = 16  # of 64 bytes: `pack.lua` cuts texts of up to 1,024


def entries_of(entry_id: bytes, values: Mapping[bytes, bytes]) -> list[OutputEntry]:
    """The entries as they were written, of one entry of an output stream, packed or not.

    ValueError when its parts do not fit each other.
    """
    if b"c" not in values:
        return [OutputEntry.parse(entry_id, values)]
    whole = OutputEntry.parse(entry_id, {name: value for name, value in values.items() if name != b"x"})
    text = values.get(b"x", b"")
    bounds = list(_varints(values[b"c"]))
    pairs = list(zip(bounds[::2], bounds[1::2], strict=True))
    if sum(num for num, _ in pairs) != len(whole.token_ids) or sum(size for _, size in pairs) != len(text):
        raise ValueError("the bounds of a packed output are not those of its tokens and text")
    entries: list[OutputEntry] = []
    token = byte = 0
    first = whole.upto - len(whole.token_ids)
    for num, size in pairs:
        logprobs = whole.logprobs[token : token + num] if whole.logprobs is not None and num else None
        entry = OutputEntry(
            upto=first + token + num,
            token_ids=whole.token_ids[token : token + num],
            text=text[byte : byte + size].decode(),
            logprobs=logprobs,
            cached=None if entries else whole.cached,
        )
        entries.append(entry)
        token, byte = token + num, byte + size
    return entries


def cut(name: str) -> tuple[str, ...]:
    """Fields of a record in which a long text may be: its own, or the pieces of a packed record."""
    return (name, *(f"{name}:{piece}" for piece in range(1, _MAX_PIECES + 1)))


def _varints(data: bytes) -> Iterator[int]:
    """Numbers of 7 bits a byte, the lowest first; the highest bit says that the number goes on."""
    value = shift = 0
    for byte in data:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            yield value
            value = shift = 0
    if shift:
        raise ValueError("a number without an end")
