"""The guarantees hold while processes die and replies are lost around every script, with all moves on."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.chaos.faults import Kind
from tests.chaos.storm import MOVES, SCRIPTS, all_points, open_storm, tally
from tests.chaos.verdict import judge
from tests.conftest import SEED
from tests.protocol.server import RedisServer

pytestmark = [pytest.mark.services, pytest.mark.timeout(900)]
_NUM_SAMPLED = 6  # `make chaos` has time for all
_LEAST_REQUESTS = 50
_COMMON = ("submit", "take", "emit", "release", "settle")  # of clients as well as of workers
_RARE = ("migrate", "refuse", "cancel", "unfollow", "pardon", "mark_read")  # may take longer than this test has


async def test_nothing_is_lost_doubled_or_changed_in_a_storm(
    redis_server: RedisServer, namespace: str, tmp_path: Path
) -> None:
    """Another sample of cut points with each printed seed; `make chaos` strikes at all of them, for long."""
    rng = random.Random(SEED)
    common = [p for p in all_points() if p.kind is Kind.KILL and p.script in _COMMON]
    often = [p for p in all_points() if p.script not in _RARE]
    wanted = {*rng.sample(often, _NUM_SAMPLED), *common}
    url = redis_server.url
    async with open_storm(url, namespace=namespace, folder=tmp_path, seed=SEED, wanted=list(wanted)) as opened:
        storm, executor, reads = opened
        await storm.begin()

        async def has_seen_all() -> bool:
            counts = await executor.run(reads.counts())
            has_moved = all(int(counts.get(name, 0)) > 0 for name in MOVES)
            is_long = int(counts.get("submitted", 0)) >= _LEAST_REQUESTS
            return is_long and has_moved and wanted <= tally(storm.journal).keys()

        await storm.until(has_seen_all, at_least_s=0.0, at_most_s=600.0)
        await storm.calm()
        verdict, struck = judge(storm, url, namespace), tally(storm.journal)

    assert verdict.errors == ()
    assert verdict.num_requests >= _LEAST_REQUESTS
    assert verdict.num_resumed > 0
    assert all(verdict.moves.values()), verdict.moves
    assert wanted <= struck.keys(), f"never struck: {sorted(wanted - struck.keys())}"


def test_every_script_is_struck_by_somebody() -> None:
    """A script that is added is added to the storm as well.

    Two wait for what nobody of ours writes; those of the gateway have tests of their own. So have those of prefix
    affinity (`tests/services/test_affinity.py`), which is off here: requests travel through stages instead.
    """
    from l4queue.protocol.scripts import all_scripts

    struck = {name for scripts in SCRIPTS.values() for name in scripts}
    assert {one.name for one in all_scripts()} == struck | {"aside", "bury", "charge", "refund"} | {
        "hold_batch",
        "note_batch",
        "cancel_batch",
        "hold",
        "look",
        "ring",
    }
