"""Records of the gateway's files in Redis: values, and the calls that keep them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from l4queue.protocol.calls import Call
from l4queue.protocol.foreign import or_else, text
from l4queue.protocol.keys import Keys

__all__ = ("FileCalls", "FileRecord", "page", "place_of", "record_of", "written")

R = TypeVar("R", bound=BaseModel)


class FileRecord(BaseModel):
    """A stored file. `owner` is the name of an API key, "" where there are none; times are the server's."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    file_id: str
    owner: str
    store: str
    name: str
    purpose: str
    num_bytes: int
    created_ms: int
    expires_ms: int


class FileCalls:
    """Builders of the calls about files under one namespace. Pure."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys

    def keep(self, record: FileRecord) -> tuple[Call[Any], ...]:
        """Record a file whose contents are stored. In this order: a list names no file that has no record."""
        k, file_id = self.keys, record.file_id
        return (
            Call(None, (), ("HSET", k.file(file_id), *written(record)), int),
            Call(None, (), ("ZADD", k.files_due(record.store), record.expires_ms, file_id), int),
            Call(None, (), ("ZADD", k.files(record.owner), record.created_ms, file_id), int),
        )

    def read(self, file_id: str) -> Call[FileRecord | None]:
        """One file; None when there is none."""
        return record_of(self.keys.file(file_id), FileRecord)

    def drop(self, record: FileRecord) -> tuple[Call[Any], ...]:
        """Forget a file."""
        k, file_id = self.keys, record.file_id
        return (
            Call(None, (), ("ZREM", k.files(record.owner), file_id), int),
            Call(None, (), ("DEL", k.file(file_id)), int),
            Call(None, (), ("ZREM", k.files_due(record.store), file_id), int),
        )

    def due(self, store: str, *, now_ms: int, limit: int) -> Call[list[str]]:
        """Files of a store that have expired."""
        args = ("ZRANGEBYSCORE", self.keys.files_due(store), "-inf", now_ms, "LIMIT", 0, limit)
        return Call(None, (), args, _ids)

    def drop_due(self, store: str, file_id: str) -> Call[int]:
        """Forget that a file expires which has no record."""
        return Call(None, (), ("ZREM", self.keys.files_due(store), file_id), int)


def record_of(key: str, kind: type[R]) -> Call[R | None]:
    """The record under a key; None where there is none, or none that can be read."""
    return Call(None, (), ("HGETALL", key), or_else(key, partial(_parsed, kind), lambda: None))


def _parsed(kind: type[R], reply: Any) -> R | None:
    pairs = reply.items() if isinstance(reply, Mapping) else zip(reply[::2], reply[1::2], strict=True)
    found = {name.decode(): value.decode() for name, value in pairs}
    return kind.model_validate(found) if found else None


def written(record: BaseModel) -> tuple[str | int, ...]:
    """Names and values of a record for HSET; what is None is left out."""
    return tuple(part for pair in record.model_dump(mode="json", exclude_none=True).items() for part in pair)


def page(key: str, *, start: int, count: int, is_newest_first: bool) -> Call[list[str]]:
    """`count` members of a sorted set from a rank on."""
    verb = "ZREVRANGE" if is_newest_first else "ZRANGE"
    return Call(None, (), (verb, key, start, start + count - 1), _ids)


def place_of(key: str, member: str, *, is_newest_first: bool) -> Call[int | None]:
    """The rank of a member of a sorted set; None where it is none."""
    verb = "ZREVRANK" if is_newest_first else "ZRANK"
    return Call(None, (), (verb, key, member), lambda reply: None if reply is None else int(reply))


def _ids(reply: Any) -> list[str]:
    return [text(member) for member in reply]
