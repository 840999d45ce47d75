"""Limits of a key at the door, with a real Redis."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gateway.exchange import Exchange
from gateway.keys import ApiKeys
from gateway.limits import Limiter
from l4queue import Settings
from l4queue.client.arguments import build_spec


async def test_several_prompts_are_one_request_however_their_charges_cross(
    redis_url: str, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is late on its way there, the second on its way back; the answer tells what is left after both."""
    file = tmp_path / "keys"
    file.write_text("ann ann-has-a-long-key requests_per_minute=2")
    settings = Settings(redis_url=redis_url, namespace=namespace, _env_file=None)  # type: ignore[call-arg]
    limiter = Limiter(settings, ApiKeys(key="", file=str(file)))
    spec, exchange = build_spec(token_ids=[1], max_tokens=1), Exchange(base="a", caller="ann")
    run, lags_s = limiter._executor.run, iter([(0.2, 0.0), (0.0, 0.4)])

    async def run_late(call: Any) -> Any:
        there_s, back_s = next(lags_s)
        await asyncio.sleep(there_s)
        found = await run(call)
        await asyncio.sleep(back_s)
        return found

    monkeypatch.setattr(limiter._executor, "run", run_late)
    try:
        await asyncio.gather(*(limiter.charge(exchange, {output: spec}) for output in range(2)))
    finally:
        await limiter.close()
    assert exchange.limit_headers["x-ratelimit-remaining-requests"] == "1"
