"""Dispatchers that end in the middle of their work: who is to blame, and that the others are served."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from dispatcher.routing.service import Dispatcher
from l4queue import AsyncClient, RequestState, Settings
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.reads import StreamEntry
from tests.services.pipeline import ByteTokenizer

pytestmark = pytest.mark.services
NUM_REQUESTS = 6


class _Mortal(Dispatcher):
    """Ends after `left` entries, or at the entry of the request called `poison`."""

    def __init__(
        self, settings: Settings, executor: AsyncExecutor, name: str, *, left: int, poison: str = ""
    ) -> None:
        super().__init__(settings=settings, executor=executor, tokenizer=ByteTokenizer(), name=name)  # type: ignore[arg-type]
        self.left, self.poison = left, poison

    async def handle(self, entries: Sequence[StreamEntry]) -> int:
        """As a process that is gone: nothing of this is cleared."""
        if self.left == 0 or any(values[b"i"].decode() == self.poison for _, values in entries):
            raise asyncio.CancelledError
        self.left -= 1
        return await super().handle(entries)


async def _lives(settings: Settings, executor: AsyncExecutor, *, lives: Sequence[int], poison: str = "") -> None:
    """One dispatcher after the other; the first reads all there is, the others adopt."""
    for number, left in enumerate(lives):
        dispatcher = _Mortal(settings, executor, f"d{number}", left=left, poison=poison)
        work = dispatcher.run_once(block_s=0.01) if number == 0 else dispatcher.adopt_once()
        await asyncio.gather(work, return_exceptions=True)


@pytest.fixture
def settings(redis_url: str, namespace: str) -> Settings:
    """Entries are adopted at once."""
    return Settings(redis_url=redis_url, namespace=namespace, dispatcher_claim_idle_s=1e-9)


async def _states(client: AsyncClient, ids: Sequence[str]) -> list[RequestState]:
    return [(await (await client.get(i)).status()).state for i in ids]


async def test_who_was_never_worked_on_is_not_to_blame(settings: Settings) -> None:
    """Every dispatcher is killed after one entry, for reasons of its own: all requests are routed in the end."""
    executor = AsyncExecutor(settings.redis_url)
    async with AsyncClient(settings=settings) as client:
        await _lives(settings, executor, lives=[0])
        ids = [handle.id for handle in await client.enqueue_many(["hello"] * NUM_REQUESTS)]
        await _lives(settings, executor, lives=[0, *[1] * NUM_REQUESTS])

        assert await _states(client, ids) == [RequestState.QUEUED] * NUM_REQUESTS
    await executor.close()


async def test_who_ends_every_dispatcher_is_refused_and_the_others_are_routed(settings: Settings) -> None:
    """Three dispatchers end at the third request, the first of them with all the others in its hands."""
    executor = AsyncExecutor(settings.redis_url)
    async with AsyncClient(settings=settings) as client:
        await _lives(settings, executor, lives=[0])
        ids = [handle.id for handle in await client.enqueue_many(["hello"] * NUM_REQUESTS)]
        await _lives(settings, executor, lives=[-1] * 4, poison=ids[2])

        states = await _states(client, ids)
        assert states.pop(2) is RequestState.FAILED
        assert states == [RequestState.QUEUED] * (NUM_REQUESTS - 1)
        assert "dispatchers ended while counting it" in ((await (await client.get(ids[2])).status()).error or "")
    await executor.close()
