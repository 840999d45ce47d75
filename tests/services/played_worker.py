"""A worker played by hand: what its scripts write, token by token."""

from __future__ import annotations

from typing import Any

from l4queue.client.aio import AsyncHandle
from l4queue.client.sync import Handle
from l4queue.protocol.calls import Call
from tests.protocol.scene import Scene
from tests.services.pipeline import until

__all__ = ("emit_all", "finished", "follows", "run", "start", "tokens_of")


def start(scene: Scene, *handles: AsyncHandle | Handle) -> None:
    """Worker `w1` takes these requests, which no dispatcher has seen."""
    scene.register()
    run(scene, [scene.calls.route(h.id, entry_id="1-1", stage="0", score=1.0, token_ids=[1, 2], max_tokens=99,
                                  plan_version=0, bucket=1) for h in handles])  # fmt: skip
    assert len(scene.take(max_requests=len(handles)).grants) == len(handles)


def run(scene: Scene, calls: list[Call[Any]]) -> None:
    for begin in range(0, len(calls), 500):
        scene.executor.run_many(calls[begin : begin + 500])


def emit_all(scene: Scene, handles: list[AsyncHandle], *, offset: int, num: int) -> None:
    """The same tokens for every request."""
    ids = scene.tokens(1, offset, num)
    more = {"incarnation": "w1", "epoch": 1, "offset": offset, "token_ids": ids, "text": f"{offset} "}
    run(scene, [scene.calls.emit(h.id, **more) for h in handles])  # type: ignore[arg-type]


async def tokens_of(handle: AsyncHandle, *, after: int = 0, timeout: float = 50) -> list[int]:
    return [t async for chunk in handle.stream(after=after, timeout=timeout) for t in chunk.token_ids]


async def follows(scene: Scene, *handles: AsyncHandle | Handle, number: int = 1) -> None:
    """Wait until that number of clients is told of each of these."""

    async def are_followed() -> bool:
        lists = [scene.raw.hget(scene.keys.request(h.id), "followers") or b"" for h in handles]
        return all(len(one.split()) >= number for one in lists)

    await until(are_followed, timeout_s=300)


def finished(scene: Scene, handle: AsyncHandle | Handle) -> None:
    """Five tokens, written as three and two."""
    start(scene, handle)
    scene.emit(handle.id, num=3)
    scene.settle(handle.id, offset=3, num=2)
