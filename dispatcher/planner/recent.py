"""Recent traffic as the planner replays it: requests that have ended, with what workers told of their content."""

from __future__ import annotations

from collections.abc import Sequence

from l4queue.config import Settings
from l4queue.cost.move import MovePrice
from l4queue.models import RequestState, WorkerLoad
from l4queue.planning.planner import Replay, Snapshot
from l4queue.planning.traffic_change import Learned
from l4queue.policy.steal import StealFrom, StealLimits
from l4queue.protocol.reads import FinishedRequest
from l4queue.sim.policies.l4 import L4Options
from l4queue.sim.records import Changed, RecordedArrival, told_share
from l4queue.sim.replay import make_replay

__all__ = ("GUESSED_FROM", "recorded", "repeated_share", "replay_of")

GUESSED_FROM = 300
"""Latest requests by which prefix affinity is guessed. Chosen: they are read every two seconds until a replay can
tell, and of more the share differs little."""


def recorded(
    finished: Sequence[FinishedRequest], *, settings: Settings, loads: Sequence[WorkerLoad]
) -> list[RecordedArrival]:
    """What ended well, newest first as it was read.

    Content counts where engines tell of prefix caches, and plans may use them.
    """
    is_told = settings.prefix_affinity == "auto" and any(load.num_prompt_tokens for load in loads)
    return [
        RecordedArrival(
            arrival_s=request.submitted_ms / 1000,
            input_tokens=request.prompt_tokens,
            output_tokens=request.output_tokens,
            e2e_s=(request.finished_ms - request.submitted_ms) / 1000,
            blocks=request.blocks if is_told else b"",
        )
        for request in finished
        if request.state == RequestState.DONE
    ]


def repeated_share(recent: Sequence[RecordedArrival], learned: Learned) -> float:
    """Share of the prompt tokens that came again, of the latest requests since the mix changed; newest first."""
    alike = [arrival for arrival in recent[:GUESSED_FROM] if arrival.arrival_s >= learned.mix_begun_s]
    return told_share(alike[::-1])


def replay_of(
    recent: Sequence[RecordedArrival],
    snapshot: Snapshot,
    settings: Settings,
    *,
    learned: Learned,
    price: MovePrice,
) -> Replay | None:
    """Traffic on which plans are replayed; None where too little has finished since it changed."""
    return make_replay(
        recent,
        cost=snapshot.cost,
        num_instances=len(snapshot.loads),
        price=price,
        options=L4Options(
            objective=settings.objective,
            slo_ttft_ms=settings.slo_ttft_ms,
            slo_tpot_ms=settings.slo_tpot_ms,
            without=_left_out(settings),
            steal=StealLimits(steal_from=StealFrom(settings.steal_from)),
            ageing_tokens_per_s=settings.ageing_tokens_per_s,
        ),
        changed=Changed.of(learned, snapshot),
        needs_content=snapshot.plan.prefix_affinity,
    )


def _left_out(settings: Settings) -> frozenset[str]:
    """Ingredients that the settings switch off, as the simulator names them."""
    if not settings.hand_over:
        return frozenset({"hand-over", "escape"})
    return frozenset() if settings.escape else frozenset({"escape"})
