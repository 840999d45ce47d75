"""Prefix affinity live beside the simulator: conversations on emulated workers with prefix caches.

    python bench/affinity_live.py [--policies auto,affinity,l4,least-loaded,round-robin] [--workers 16]
        [--rate 120] [--requests 1200] [--warmup 300] [--speed 6] [--think-s 4] [--most-tokens 1500] [--seed 0]
        [--simulate-only] [--json FILE]

Conversations go on from what the engine answered, and share system prompts. The emulated engine's tokens hang on
those before them alone, so every prompt is known beforehand, and the simulator plays the very same blocks. Live
engines take `--speed` times as long as simulated ones, and requests arrive as much slower; times are divided by
it. Requests of the first `--warmup` are served and not counted. `auto` is `l4` as it is by default. It is live
only, since the simulator's planner does not choose affinity; `chosen_at` counts the requests before its choice,
and `chosen_s` is the time from the first one to it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from l4queue.cli.stack.stack import Stack, StackOptions
from l4queue.client import AsyncClient
from l4queue.cost.coefficients import read_coefficients
from l4queue.cost.step import BLOCK_TOKENS, StepCost
from l4queue.models import Plan, Routing, StagePlan
from l4queue.plan_json import plan_to_json
from l4queue.policy.prefix_blocks import next_key
from l4queue.protocol.calls import Calls
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.keys import Keys
from l4queue.protocol.reads import Reads
from l4queue.sim.cluster import Cluster
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.policies.affinity import CacheAware, LlmD, SessionSticky
from l4queue.sim.policies.l4 import L4, L4Options
from l4queue.sim.policies.l4_prefixes import PrefixL4
from l4queue.sim.policies.length_blind import LeastTokens, RoundRobin
from l4queue.sim.policy import Policy
from workers.engine.emulated.scheduler import next_tokens

LIVE = {
    "auto": Routing.L4,
    "affinity": Routing.L4,
    "l4": Routing.L4,
    "least-loaded": Routing.LEAST_LOADED,
    "round-robin": Routing.ROUND_ROBIN,
}
SETTINGS = {"auto": "auto", "affinity": "true"}
"""L4_PREFIX_AFFINITY of these; of the others `false`."""
SIMULATED: dict[str, Any] = {
    "affinity": lambda: PrefixL4(L4Options()),
    "l4": lambda: L4(L4Options()),
    "least-loaded": LeastTokens,
    "round-robin": RoundRobin,
    "session-sticky": SessionSticky,
    "cache-aware": CacheAware,
    "llm-d": LlmD,
}
SYSTEM_TOKENS = (1_000, 2_500)
OUTPUT_TOKENS = (30, 300)
MEAN_TURNS = 5.0
NUM_SYSTEMS = 12
MAX_MODEL_LEN = 32_768
TOLD = ("late_s", "chosen_at", "chosen_s", "plans", "decisions", "reasons", "cpu_cores", "moves")
"""What is told of a live run beside its figures."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One request: when it comes, whose it is, its prompt, how much it generates."""

    arrival_s: float
    session: int
    prompt: tuple[int, ...]
    output_tokens: int
    chain: tuple[range, ...]


def conversations(*, count: int, rate: float, think_s: float, most_tokens: int, seed: int) -> list[Turn]:
    """`count` turns of conversations that begin at random moments; messages have 100 to `most_tokens` tokens."""
    rng = np.random.default_rng(seed)
    systems = [_some(rng, *SYSTEM_TOKENS) for _ in range(NUM_SYSTEMS)]
    popularity = 1.0 / np.arange(1, NUM_SYSTEMS + 1)
    numbers: dict[bytes, int] = {}
    turns: list[Turn] = []
    begin_s, session = 0.0, 0
    ramp = int(rate * 2 * MEAN_TURNS * (think_s + 1))  # conversations of all ages are there by then
    while len(turns) < ramp + 2 * count:
        begin_s += float(rng.exponential(MEAN_TURNS / rate))
        ids = list(systems[int(rng.choice(NUM_SYSTEMS, p=popularity / popularity.sum()))])
        at_s = begin_s
        for _ in range(int(rng.geometric(1 / MEAN_TURNS))):
            ids += _some(rng, 100, most_tokens)
            output = between(rng, *OUTPUT_TOKENS)
            if len(ids) + output > MAX_MODEL_LEN - 512:
                break
            prompt = tuple(ids)
            ids += next_tokens(ids, output)
            turns.append(
                Turn(
                    arrival_s=at_s,
                    session=session,
                    prompt=prompt,
                    output_tokens=output,
                    chain=chain_of(ids, numbers),
                )
            )
            at_s += output * 0.012 + float(rng.exponential(think_s))
        session += 1
    turns.sort(key=lambda turn: turn.arrival_s)
    chosen = turns[ramp : ramp + count]
    first_s = chosen[0].arrival_s
    return [replace(turn, arrival_s=turn.arrival_s - first_s) for turn in chosen]


def _some(rng: np.random.Generator, low: int, high: int) -> list[int]:
    return [int(token) for token in rng.integers(100, 8000, between(rng, low, high))]


def between(rng: np.random.Generator, low: int, high: int) -> int:
    """A whole number, log-uniform between two."""
    return int(np.exp(rng.uniform(np.log(low), np.log(high))))


def chain_of(ids: Sequence[int], numbers: dict[bytes, int]) -> tuple[range, ...]:
    """Numbers of the full blocks, equal for equal content; `numbers` is what is known of them so far."""
    key, chain = b"", []
    for start in range(0, len(ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        key = next_key(key, ids[start : start + BLOCK_TOKENS])
        number = numbers.setdefault(key, len(numbers))
        chain.append(range(number, number + 1))
    return tuple(chain)


def simulate(policy: Policy, turns: Sequence[Turn], *, cost: StepCost, num_workers: int) -> dict[str, Any]:
    """The figures of one policy by the simulator."""
    requests = [
        SimRequest(
            index,
            turn.arrival_s,
            prompt_tokens=len(turn.prompt),
            output_tokens=turn.output_tokens,
            chain=turn.chain,
            session=turn.session,
        )
        for index, turn in enumerate(turns)
    ]
    cluster = Cluster(
        requests,
        cost=cost,
        num_instances=num_workers,
        policy=policy,
        rng=np.random.default_rng(0),
    )
    cluster.run()
    return {
        "e2e_s": [(r.finish_s or 0) - r.arrival_s for r in requests],
        "ttft_s": [(r.first_token_s or 0) - r.arrival_s for r in requests],
        "cached": [r.cached_tokens or 0 for r in requests],
    }


async def serve(
    policy: str, turns: Sequence[Turn], *, num_workers: int, speed: float, folder: Path
) -> dict[str, Any]:
    """The figures of one policy by a deployment of its own."""
    os.environ |= {
        "L4_EMULATED_SPEED": str(speed),
        "L4_EMULATED_PREFIX_CACHE": "true",
        "L4_PREFIX_AFFINITY": SETTINGS.get(policy, "false"),
        "L4_MAX_MODEL_LEN": str(MAX_MODEL_LEN),
    }
    options = StackOptions(
        workers=num_workers,
        workers_per_process=8,
        engine="emulated",
        model="tiny",
        data_dir=folder / policy,
        flower=False,
    )
    stack = Stack(options)
    async with stack:
        await stack.ready()
        async with AsyncClient(stack.redis_url, settings=stack.settings) as client:
            await _publish(stack, client, LIVE[policy])
            cpu = _cpu_s(stack)
            begun_s, begun_ms = time.monotonic(), (await client.overview()).now_ms
            sending = []
            late_s = 0.0
            for turn in turns:
                wait_s = begun_s + turn.arrival_s * speed - time.monotonic()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                late_s = max(late_s, -wait_s)
                asked = client.enqueue(
                    token_ids=list(turn.prompt), max_tokens=turn.output_tokens, ignore_eos=True, temperature=0.0
                )
                sending.append(asyncio.create_task(asked))
            handles = await asyncio.gather(*sending)
            async for _ in client.as_completed(handles):
                pass
            found = [await handle.status() for handle in handles]
            reasons: dict[str, int] = {}
            for handle in handles[::7] if policy in SETTINGS else ():
                for event in await handle.explain():
                    if event.what == "taken":
                        reason = str(event.facts.get("reason"))
                        reasons[reason] = reasons.get(reason, 0) + 1
            counts = (await client.overview()).counts
            plans = await client.plan_history(count=100)
            decisions = await _decisions(stack, begun_ms=begun_ms)
            chosen_ms = min((plan.created_ms for plan in plans if plan.prefix_affinity), default=None)
            took_s = time.monotonic() - begun_s
            used = {name: (s - cpu.get(name, 0.0)) / took_s for name, s in _cpu_s(stack).items()}
    return {
        "e2e_s": [(one.e2e_s or 0) / speed for one in found],
        "ttft_s": [(one.ttft_s or 0) / speed for one in found],
        "cached": [one.cached_tokens or 0 for one in found],
        "late_s": late_s,
        "chosen_at": sum(1000 * one.submitted_at_s < chosen_ms for one in found) if chosen_ms else None,
        "chosen_s": (chosen_ms - begun_ms) / 1000 if chosen_ms else None,
        "plans": [(plan.version, plan.reason) for plan in plans[::-1]],
        "decisions": decisions,
        "reasons": reasons,
        "cpu_cores": {name: round(share, 2) for name, share in used.items()},
        "moves": {
            name: counts.get(name, 0) for name in ("handovers", "escapes", "steals_waiting", "steals_running")
        },
    }


async def _publish(stack: Stack, client: AsyncClient, routing: Routing) -> None:
    if routing is Routing.L4:
        return
    executor = AsyncExecutor(stack.settings.redis_url)
    try:
        overview = await client.overview()
        ids = tuple(sorted(load.worker_id for load in overview.workers))
        stage = StagePlan(low_tokens=0, high_tokens=None, num_workers=len(ids), worker_ids=ids)
        version = overview.plan.version
        plan = Plan(
            version=version + 1, stages=(stage,), routing=routing, reason="bench", created_ms=overview.now_ms
        )
        call = Calls(Keys(stack.settings.namespace)).publish(
            expected_version=version, version=plan.version, body=plan_to_json(plan)
        )
        await executor.run(call)
    finally:
        await executor.close()
    await asyncio.sleep(2)


async def _decisions(stack: Stack, *, begun_ms: int) -> list[str]:
    """The planner's reasons, round by round, with the time since the first request, s."""
    executor = AsyncExecutor(stack.settings.redis_url)
    try:
        told = await executor.run(Reads(Keys(stack.settings.namespace)).decisions(count=100))
        return [f"{(at_ms - begun_ms) / 1000:.1f}: {json.loads(line)['reason']}" for at_ms, line in told[::-1]]
    finally:
        await executor.close()


def _cpu_s(stack: Stack) -> dict[str, float]:
    from l4queue.cli.bench.cpu_time import cpu_seconds

    return cpu_seconds({"bench": os.getpid(), **{n: c.pid for n, c in stack.supervisor.children.items()}})


def figures(run: dict[str, Any], turns: Sequence[Turn], *, warmup: int) -> dict[str, Any]:
    """Means and tails of what counts."""
    e2e, ttft, cached = (np.array(run[name])[warmup:] for name in ("e2e_s", "ttft_s", "cached"))
    prompts = np.array([len(turn.prompt) for turn in turns])[warmup:]
    longest = prompts >= np.quantile(prompts, 0.95)
    return {
        "mean_e2e_s": float(e2e.mean()),
        "p99_e2e_s": float(np.quantile(e2e, 0.99)),
        "longest_5_e2e_s": float(e2e[longest].mean()),
        "mean_ttft_s": float(ttft.mean()),
        "p99_ttft_s": float(np.quantile(ttft, 0.99)),
        "cached_share": float(cached.sum() / prompts.sum()),
        **{name: run[name] for name in TOLD if name in run},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policies", default="affinity,l4,least-loaded,round-robin")
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--rate", type=float, default=120.0)
    parser.add_argument("--requests", type=int, default=1200)
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--speed", type=float, default=6.0)
    parser.add_argument("--think-s", type=float, default=4.0, help="mean pause of a user, s")
    parser.add_argument("--most-tokens", type=int, default=1500, help="longest message of a user")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--simulate-only", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    coefficients = read_coefficients("h100", "llama-3.1-8b")
    turns = conversations(
        count=args.requests,
        rate=args.rate,
        think_s=args.think_s,
        most_tokens=args.most_tokens,
        seed=args.seed,
    )
    prompts = [len(turn.prompt) for turn in turns]
    rate = len(turns) / turns[-1].arrival_s
    print(f"{len(turns)} requests, {rate:.1f}/s, prompts mean {np.mean(prompts):.0f} max {max(prompts)}")
    results: dict[str, Any] = {}
    for name in args.policies.split(","):
        if name not in SIMULATED:
            results[name] = {}
            continue
        simulated = simulate(SIMULATED[name](), turns, cost=coefficients.cost, num_workers=args.workers)
        results[name] = {"simulated": figures(simulated, turns, warmup=args.warmup)}
        print(name, "simulated", _line(results[name]["simulated"]), flush=True)
    if not args.simulate_only:
        with tempfile.TemporaryDirectory() as folder:
            for name in args.policies.split(","):
                if name not in LIVE:
                    continue
                run = asyncio.run(
                    serve(name, turns, num_workers=args.workers, speed=args.speed, folder=Path(folder))
                )
                results[name]["live"] = figures(run, turns, warmup=args.warmup)
                print(name, "live     ", _line(results[name]["live"]), flush=True)
                print(
                    "   ",
                    {k: results[name]["live"][k] for k in TOLD},
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps({"arguments": {**vars(args), "json": None}, "results": results}, indent=1))


def _line(found: dict[str, Any]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in found.items() if isinstance(value, float))


if __name__ == "__main__":
    main()
