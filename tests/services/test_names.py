"""Names of workers and planners are one for each `l4queue up` on a Redis, whenever they start."""

from __future__ import annotations

import asyncio
import time

import pytest

from l4queue.cli.stack import names
from l4queue.cli.stack.names import NameClaims

pytestmark = pytest.mark.services


async def test_two_that_start_at_the_same_moment_get_different_names(redis_url: str, namespace: str) -> None:
    """And a third one gets those of the first when that has gone."""
    one, two = NameClaims(redis_url, namespace), NameClaims(redis_url, namespace)
    await asyncio.gather(*(claims.choose(2, is_shared=True) for claims in (one, two)))

    assert sorted(one.workers + two.workers) == ["worker-0", "worker-1", "worker-2", "worker-3"]
    assert {one.planner, two.planner} == {"planner", "planner-1"}
    assert one.others or two.others

    await one.close()
    three = NameClaims(redis_url, namespace)
    await three.choose(2, is_shared=True)

    assert (three.workers, three.planner) == (one.workers, one.planner)
    await two.close()
    await three.close()


async def test_a_claim_outlives_its_process_by_a_while_only(
    redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of one that was killed comes back; that of one that lives is kept beyond the term of a claim."""
    monkeypatch.setattr(names, "_CLAIM_MS", 2_000)
    monkeypatch.setattr(names, "_RENEW_S", 0.1)
    lives, killed, next_one = (NameClaims(redis_url, namespace) for _ in range(3))
    await lives.choose(1, is_shared=False)
    await killed.choose(1, is_shared=False)
    killed._keeping.cancel()
    killed_s = time.monotonic()
    await next_one.choose(1, is_shared=False)

    assert (lives.workers, killed.workers, next_one.workers) == (["worker-0"], ["worker-1"], ["worker-1"])
    assert time.monotonic() - killed_s > 1.0
    for claims in (lives, next_one, killed):
        await claims.close()

    last = NameClaims(redis_url, namespace)
    await last.choose(1, is_shared=False)
    assert last.workers == ["worker-0"]
    await last.close()
