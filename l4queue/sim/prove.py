"""Shadow scoring in a simulation, on the traffic that it has seen finish."""

from __future__ import annotations

from l4queue.planning.planner import Decision, PlannerSettings, Snapshot
from l4queue.planning.shadow import decide, why_settled
from l4queue.sim.policies.l4 import L4
from l4queue.sim.records import Changed, RecordedArrival
from l4queue.sim.replay import make_replay

__all__ = ("prove_recent",)


def prove_recent(policy: L4, snapshot: Snapshot, settings: PlannerSettings) -> tuple[Decision, bool]:
    """`decide` for a running simulation, on what it has seen finish; and whether a replay was possible."""
    traffic, cluster = policy.traffic, policy.cluster
    settled = why_settled(snapshot, settings, traffic.learned)
    if settled is not None:
        return Decision(publish=False, plan=snapshot.plan, reason=settled), False
    recent = [
        RecordedArrival(
            arrival_s=r.arrival_s,
            input_tokens=r.prompt_tokens,
            output_tokens=r.generated,
            e2e_s=(r.finish_s or r.arrival_s) - r.arrival_s,
        )
        for r in traffic.recent
    ]
    replay = make_replay(
        recent,
        cost=cluster.cost,
        num_instances=len(cluster.instances),
        price=settings.partition.move_price,
        options=policy.options,
        changed=Changed.of(traffic.learned, snapshot),
    )
    return decide(snapshot, settings, replay, learned=traffic.learned), replay is not None
