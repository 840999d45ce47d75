"""The dispatchers' side of the inbox stream: a consumer group whose orphans are adopted."""

from __future__ import annotations

import asyncio
from typing import Any

from redis.exceptions import RedisError, ResponseError

from l4queue.protocol.door import AsyncDoor
from l4queue.protocol.keys import Keys
from l4queue.protocol.reads import StreamEntry, parse_entries
from l4queue.protocol.wire import explain, is_foreign, is_passing

__all__ = ("Inbox",)

_GROUP = "d"


class Inbox:
    """Reads entries for one dispatcher. An entry stays pending until `route` or `refuse` clears it."""

    def __init__(self, door: AsyncDoor, keys: Keys, *, consumer: str) -> None:
        self._door = door
        self._key = keys.inbox
        self._consumer = consumer

    async def read(self, *, count: int, block_s: float) -> list[StreamEntry]:
        """New entries, waiting at most `block_s` for the first; [] when there are none or Redis is away."""
        block_ms = max(1, int(block_s * 1000))
        try:
            reply: Any = await self._door.client.xreadgroup(
                _GROUP, self._consumer, {self._key: ">"}, count=count, block=block_ms
            )
        except RedisError as error:
            return await self._mend(error)
        return parse_entries(reply[0][1]) if reply else []

    async def adopt(self, *, min_idle_s: float, count: int) -> list[bytes]:
        """Ids of entries that another dispatcher read and did not clear within `min_idle_s`; they are ours now.

        Not counted as a delivery yet: that is `claim`, one by one, so that an end of this dispatcher counts
        against the entry that it was working on and no other.
        """
        try:
            reply: Any = await self._door.client.xautoclaim(
                self._key, _GROUP, self._consumer, int(min_idle_s * 1000), "0-0", count=count, justid=True
            )
        except RedisError as error:
            await self._mend(error)
            return []
        return list(reply)

    async def claim(self, entry_id: bytes) -> tuple[StreamEntry, int] | None:
        """An adopted entry and how often it was delivered, this time included; None when it is cleared by now."""
        try:
            reply: Any = await self._door.client.xclaim(self._key, _GROUP, self._consumer, 0, [entry_id])
            rows: Any = await self._door.client.xpending_range(self._key, _GROUP, entry_id, entry_id, 1)
        except RedisError as error:
            await self._mend(error)
            return None
        entries = parse_entries(reply)
        return (entries[0], int(rows[0]["times_delivered"])) if entries and rows else None

    async def leave(self) -> None:
        """Forget this consumer if nothing is pending for it; its name would stay in the group otherwise."""
        try:
            pending: Any = await self._door.client.xpending_range(self._key, _GROUP, "-", "+", 1, self._consumer)
            if not pending:
                await self._door.client.xgroup_delconsumer(self._key, _GROUP, self._consumer)
        except RedisError:
            return

    async def _mend(self, error: RedisError) -> list[StreamEntry]:
        if isinstance(error, ResponseError) and str(error).startswith("NOGROUP"):
            try:  # from the beginning: whatever was accepted before the group existed is served too
                await self._door.client.xgroup_create(self._key, _GROUP, id="0", mkstream=True)
            except ResponseError as again:
                if not str(again).startswith("BUSYGROUP"):
                    raise explain(again, self._door.url) from again
            except RedisError:
                await asyncio.sleep(0.1)
            return []
        if is_passing(error):
            await asyncio.sleep(0.1)
            return []
        if is_foreign(error) and await self._door.clear((self._key,)):
            return []
        raise explain(error, self._door.url) from error
