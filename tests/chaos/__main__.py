"""`make chaos`: storm after storm, each on a namespace of its own, until the time is up."""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.chaos.faults import Kind, Point
from tests.chaos.storm import all_points, open_storm, tally
from tests.chaos.verdict import Verdict, judge
from tests.protocol.server import DURABLE, VOLATILE, RedisServer, redis_binary


async def _round(
    server: RedisServer, folder: Path, *, seed: int, round_s: float
) -> tuple[Verdict, Counter[Point]]:
    namespace = f"chaos{seed}"
    wanted = all_points()
    async with open_storm(server.url, namespace=namespace, folder=folder, seed=seed, wanted=wanted) as (
        storm,
        _,
        _,
    ):
        await storm.begin()
        await asyncio.sleep(round_s)
        await storm.calm()
        return judge(storm, server.url, namespace), tally(storm.journal)


def main() -> int:
    """1 when a guarantee was broken; 3 when a point was never struck or nothing moved."""
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbits(31))
    parser.add_argument("--duration", type=float, default=600.0, help="seconds; rounds of a minute")
    parser.add_argument("--round", type=float, default=60.0, help="seconds of storm in a round")
    parser.add_argument("--strict", action="store_true", help="Redis fsyncs every write")
    parser.add_argument("--keep", type=Path, help="folder for logs; else they go when all is well")
    given = parser.parse_args()
    binary = redis_binary()
    if binary is None:
        print("redis-server is not on PATH", file=sys.stderr)
        return 2
    folder = given.keep or Path(tempfile.mkdtemp(prefix="l4-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    began_s, seed, struck = time.monotonic(), given.seed, Counter[Point]()
    totals: Counter[str] = Counter()
    server = RedisServer(binary, folder, DURABLE if given.strict else VOLATILE).start()
    print(f"seed {seed}, logs in {folder}", flush=True)
    try:
        while time.monotonic() - began_s < given.duration:
            verdict, points = asyncio.run(_round(server, folder, seed=seed, round_s=given.round))
            struck += points
            totals += Counter({"requests": verdict.num_requests, "resumed": verdict.num_resumed, **verdict.moves})
            kills = sum(n for p, n in points.items() if p.kind is Kind.KILL)
            cuts = sum(points.values()) - kills
            print(
                f"seed {seed}: {verdict.num_requests} requests {verdict.states}, {kills} kills, {cuts} cuts,"
                f" {verdict.moves}, {verdict.num_resumed} resumed, {len(verdict.errors)} errors",
                flush=True,
            )
            for error in verdict.errors[:20]:
                print("  " + error)
            if verdict.errors:
                return 1
            seed += 1
    finally:
        server.kill()
    missed = [p for p in all_points() if not struck[p]]
    kills = sum(n for p, n in struck.items() if p.kind is Kind.KILL)
    print(f"{kills} kills, {sum(struck.values()) - kills} cuts, {dict(totals)}")
    for point in missed:
        print(f"  never struck: {point.role} {point.side} {point.script} ({point.kind})")
    return (
        3 if missed or not all(totals[name] for name in ("handovers", "steals_waiting", "steals_running")) else 0
    )


if __name__ == "__main__":
    sys.exit(main())
