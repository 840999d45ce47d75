"""One entrant in one round: a rush of requests, then latencies alone and at half the rate, then memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from l4queue.cli.bench.cpu_time import fixed_work_ms
from l4queue.cli.bench.queue.counts import ResourcesSpent, commands_of, look, spent, used_bytes
from l4queue.cli.bench.queue.entrant import Entrant, L4Entrant

__all__ = ("QueueLoad", "QueueRound", "measure")

_FIRST_REQUESTS = 50  # of a warm-up: they tell how many more it may have
_WARM_S, _WARM_REQUESTS = 1.5, 1000  # connections, code and caches are warm after them
_WARM_SHARE = 5  # one in five requests of a round, at most, warms it up
_MOST_RUSH_S = 8.0  # chosen: a slow machine has fewer requests in a round, not a longer one
_MOST_BYTES = 100_000_000  # of prompts at once; the client has them in memory
_COUNTED_REQUESTS = 1000  # under MONITOR; commands a request vary by a hundredth from one such stretch to the next
_COUNTED_BYTES = 4_000_000  # of prompts under MONITOR, which writes each several times over
_PAUSE_S = 0.005  # before each request alone: all that the last one left to do is done
_HALF = 0.5  # of the rate of the rush: busy, and far from where queues grow without end
_LATENCY_S, _HALF_S = 4.0, 2.0  # at most, of the requests alone; of those at half of the rate
_TIMEOUT_S = 60.0  # of one order, far beyond what it should take


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLoad:
    """What is asked of each entrant, for one size of prompts."""

    num_requests: int
    prompt_bytes: int
    input: str
    num_latencies: int

    @property
    def most_requests(self) -> int:
        """At once."""
        return max(1, min(self.num_requests, _MOST_BYTES // self.prompt_bytes))

    @property
    def prompts(self) -> dict[str, Any]:
        """For orders."""
        return {"bytes": self.prompt_bytes, "input": self.input, "timeout_s": _TIMEOUT_S}


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueRound:
    """What one entrant has shown in one round."""

    entrant: str
    round: int
    durability: str
    prompt_bytes: int
    num_requests: int
    requests_per_s: float
    enqueued_per_s: float
    cpu_s_per_1000: Mapping[str, float]
    foreign_cores: float
    fixed_work_ms: float
    redis_commands: float
    bytes_in: float
    bytes_out: float
    kept_bytes: float
    packed_bytes: float | None = None
    packing_cpu_s_per_1000: float | None = None
    sent_commands: float | None = None
    inside_commands: float | None = None
    commands: Mapping[str, Any] = field(default_factory=dict)
    half_rate_per_s: float | None = None
    alone_ms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    half_ms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


async def measure(
    entrant: Entrant, load: QueueLoad, *, number: int, on_phase: Callable[[str], None]
) -> QueueRound:
    """All figures of one round; commands are counted in the first only."""
    assert entrant.redis is not None
    empty_bytes = await used_bytes(entrant.redis)
    on_phase("warm-up")
    num_warm, count = await _warm(entrant, load)
    on_phase("rush")
    used, rush = await _rush(entrant, load, count=count)
    kept_bytes = await used_bytes(entrant.redis) - empty_bytes
    more = await _packed(entrant, empty_bytes=empty_bytes, count=num_warm + count)
    if number == 0:
        on_phase("commands")
        more |= await _commands(entrant, load)
    if load.num_latencies:
        on_phase("alone")
        more["alone_ms"] = await _alone(entrant, load)
        if entrant.facts["can_pace"]:
            on_phase("half rate")
            more |= await _half(entrant, load, rate_per_s=_HALF * rush["requests_per_s"])
    cpu_s = {name: seconds / count * 1000 for name, seconds in used.cpu_s.items()}
    return QueueRound(
        entrant=entrant.name,
        round=number,
        durability=entrant.durability,
        prompt_bytes=load.prompt_bytes,
        num_requests=count,
        cpu_s_per_1000={"total": sum(cpu_s.values()), **cpu_s},
        foreign_cores=used.foreign_cores,
        fixed_work_ms=fixed_work_ms(),
        redis_commands=used.num_commands / count,
        bytes_in=used.bytes_in / count,
        bytes_out=used.bytes_out / count,
        kept_bytes=kept_bytes / (num_warm + count),
        versions=entrant.facts["versions"],
        **rush,
        **more,
    )


async def _warm(entrant: Entrant, load: QueueLoad) -> tuple[int, int]:
    """Serve some, untimed; returns their number, and how many requests the rush may have."""
    most = max(1, load.most_requests // _WARM_SHARE)
    count, total, rate_per_s = min(_FIRST_REQUESTS, most), 0, 0.0
    while count > 0:
        answers = await entrant.order("rush", count=count, **load.prompts)
        rate_per_s, total = count / max(answer["wall_s"] for answer in answers), total + count
        count = min(round(rate_per_s * _WARM_S), _WARM_REQUESTS, most - total) if total == count else 0
    return total, max(1, min(load.most_requests, round(rate_per_s * _MOST_RUSH_S)))


async def _rush(entrant: Entrant, load: QueueLoad, *, count: int) -> tuple[ResourcesSpent, dict[str, Any]]:
    assert entrant.redis is not None
    await entrant.order("prepare", count=count, **load.prompts)
    before = await look(entrant.redis, entrant.pids)
    answers = await entrant.order("rush", count=count, **load.prompts)
    after = await look(entrant.redis, entrant.pids)
    return spent(before, after), {
        "requests_per_s": count / max(answer["wall_s"] for answer in answers),
        "enqueued_per_s": count / max(answer["enqueue_s"] for answer in answers),
    }


async def _packed(entrant: Entrant, *, empty_bytes: int, count: int) -> dict[str, Any]:
    """Memory of a finished request as it is kept, and the cost of packing it; nothing where none is packed."""
    assert entrant.redis is not None
    before = await look(entrant.redis, entrant.pids)
    if not await entrant.pack():
        return {}
    packing = spent(before, await look(entrant.redis, entrant.pids))
    return {
        "packed_bytes": (await used_bytes(entrant.redis) - empty_bytes) / count,
        "packing_cpu_s_per_1000": packing.cpu_s["redis"] / count * 1000,
    }


async def _commands(entrant: Entrant, load: QueueLoad) -> dict[str, Any]:
    count = max(1, min(_COUNTED_REQUESTS, load.most_requests, _COUNTED_BYTES // load.prompt_bytes))
    work = entrant.order("rush", count=count, **load.prompts)
    sent, inside, _ = await commands_of(entrant.redis_url, work)
    by_name = {"sent": sent.most_common(), "inside": inside.most_common()}
    return {
        "sent_commands": sum(sent.values()) / count,
        "inside_commands": sum(inside.values()) / count,
        "commands": {where: {name: calls / count for name, calls in found} for where, found in by_name.items()},
    }


def _kinds(entrant: Entrant) -> list[str]:
    """Only l4queue streams."""
    return ["first", "result"] if isinstance(entrant, L4Entrant) else ["result"]


async def _alone(entrant: Entrant, load: QueueLoad) -> dict[str, list[float]]:
    """One request at a time, by one client."""
    kinds = _kinds(entrant)
    answer = await entrant.clients[0].order(
        do="alone",
        count=load.num_latencies * len(kinds),
        what=kinds,
        pause_s=_PAUSE_S,
        most_s=_LATENCY_S,
        salt=0,
        **load.prompts,
    )
    return {name.removesuffix("_ms"): values for name, values in answer.items()}


async def _half(entrant: Entrant, load: QueueLoad, *, rate_per_s: float) -> dict[str, Any]:
    kinds = _kinds(entrant)
    count = max(len(kinds), min(load.most_requests, round(rate_per_s * _HALF_S)))
    share = {"rate_per_s": rate_per_s / entrant.num_clients}
    answers = await entrant.order("paced", count=count, what=kinds, **share, **load.prompts)
    names = [*kinds, "late"]
    found = {name: [value for answer in answers for value in answer[f"{name}_ms"]] for name in names}
    return {"half_rate_per_s": rate_per_s, "half_ms": found}
