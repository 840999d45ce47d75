"""The dispatchers' side of the inbox stream: a consumer group whose orphans are adopted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from redis.exceptions import ResponseError

from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.keys import Keys
from l4queue.protocol.reads import StreamEntry, parse_entries
from l4queue.protocol.trouble import FAILURES
from l4queue.protocol.wire import is_foreign

__all__ = ("Inbox",)

_GROUP = "d"


class Inbox:
    """Reads entries for one dispatcher. An entry stays pending until `route` or `refuse` clears it."""

    def __init__(self, executor: AsyncExecutor, keys: Keys, *, consumer: str) -> None:
        self._executor = executor
        self._key = keys.inbox
        self._consumer = consumer
        self._others: dict[bytes, tuple[bytes, int, float]] = {}  # (consumer, deliveries, since when, s)

    async def read(self, *, count: int, block_s: float) -> list[StreamEntry]:
        """New entries, waiting at most `block_s` for the first; none while Redis is away."""
        block_ms = max(1, int(block_s * 1000))
        group = ("XREADGROUP", "GROUP", _GROUP, self._consumer)
        words = (*group, "COUNT", count, "BLOCK", block_ms, "STREAMS", self._key, ">")
        try:
            reply = await self._executor.client.execute_command(*words)
        except FAILURES as error:
            await self._mend(error, "XREADGROUP")
            return []
        self._executor.waits.passed("XREADGROUP")
        return parse_entries(reply[0][1]) if reply else []

    async def adopt(self, *, min_idle_s: float, count: int) -> list[bytes]:
        """Ids of entries that another dispatcher read and did not clear within `min_idle_s`; they are ours now.

        Not counted as a delivery yet: that is `claim`, one by one, so that an end of this dispatcher counts
        against the entry that it was working on and no other.
        """
        client, key = self._executor.client, self._key
        try:
            reply: Any = await client.xautoclaim(
                key, _GROUP, self._consumer, int(min_idle_s * 1000), "0-0", count=count, justid=True
            )
            pending: Any = await client.xpending_range(key, _GROUP, "-", "+", count)
            if left := self._left_behind(pending, older_s=2 * min_idle_s):
                reply += await client.xclaim(key, _GROUP, self._consumer, 0, left, justid=True)
        except FAILURES as error:
            await self._mend(error, "XAUTOCLAIM")
            return []
        self._executor.waits.passed("XAUTOCLAIM")
        return list(reply)

    def _left_behind(self, pending: Sequence[Mapping[str, Any]], *, older_s: float) -> list[bytes]:
        """Entries of others that stand as they were for so long by this process's clock.

        Redis reckons idle times by its own clock: once that has gone back, nothing is idle for as long.
        """
        now_s, before = time.monotonic(), self._others
        self._others = {
            row["message_id"]: (row["consumer"], row["times_delivered"], now_s)
            for row in pending
            if row["consumer"] != self._consumer.encode()
        }
        for entry_id, fact in self._others.items():
            known = before.get(entry_id)
            if known is not None and known[:2] == fact[:2]:
                self._others[entry_id] = known
        return [entry_id for entry_id, (_, _, since_s) in self._others.items() if now_s - since_s >= older_s]

    async def claim(self, entry_id: bytes) -> tuple[StreamEntry, int] | None:
        """An adopted entry and how often it was delivered, this time included; None when it is cleared by now."""
        try:
            reply: Any = await self._executor.client.xclaim(self._key, _GROUP, self._consumer, 0, [entry_id])
            rows: Any = await self._executor.client.xpending_range(self._key, _GROUP, entry_id, entry_id, 1)
        except FAILURES as error:
            await self._mend(error, "XCLAIM")
            return None
        self._executor.waits.passed("XCLAIM")
        entries = parse_entries(reply)
        return (entries[0], int(rows[0]["times_delivered"])) if entries and rows else None

    async def set_aside(self, entry_id: bytes) -> None:
        """Keep an entry for later without the delivery that was counted for reading it.

        An end of this dispatcher while the entry waits does not count against it; `claim` counts it again.
        """
        try:
            rows: Any = await self._executor.client.xpending_range(self._key, _GROUP, entry_id, entry_id, 1)
            if rows:
                await self._keep([entry_id], retrycount=max(0, int(rows[0]["times_delivered"]) - 1))
        except FAILURES as error:
            await self._mend(error, "XCLAIM")
        else:
            self._executor.waits.passed("XCLAIM")

    async def keep(self, entry_ids: Sequence[bytes]) -> None:
        """Let nobody adopt these entries for a while: they are as young as if just read."""
        try:
            await self._keep(entry_ids)
        except FAILURES as error:
            await self._mend(error, "XCLAIM")
        else:
            self._executor.waits.passed("XCLAIM")

    async def _keep(self, entry_ids: Sequence[bytes], *, retrycount: int | None = None) -> None:
        await self._executor.client.xclaim(
            self._key, _GROUP, self._consumer, 0, list(entry_ids), retrycount=retrycount, justid=True
        )

    async def leave(self) -> None:
        """Forget this consumer if nothing is pending for it; its name would stay in the group otherwise."""
        try:
            pending: Any = await self._executor.client.xpending_range(
                self._key, _GROUP, "-", "+", 1, self._consumer
            )
            if not pending:
                await self._executor.client.xgroup_delconsumer(self._key, _GROUP, self._consumer)
        except FAILURES:
            return

    async def _mend(self, error: Exception, name: str) -> None:
        if isinstance(error, ResponseError) and str(error).startswith("NOGROUP"):
            try:  # from the beginning: whatever was accepted before the group existed is served too
                await self._executor.client.xgroup_create(self._key, _GROUP, id="0", mkstream=True)
            except FAILURES as again:
                if not str(again).startswith("BUSYGROUP"):
                    await self._pause(again, "XGROUP")
                    return
            self._executor.waits.passed("XGROUP")
        elif not (is_foreign(error) and await self._executor.clear((self._key,))):
            await self._pause(error, name)

    async def _pause(self, error: Exception, name: str) -> None:
        await asyncio.sleep(self._executor.waits.failed(error, name))
