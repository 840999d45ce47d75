"""The protocol as dictionaries: what records, leases, queues, ledgers and counters should say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from l4queue.models import TERMINAL, RequestState
from l4queue.policy.queue_order import BACKGROUND
from l4queue.protocol.calls import Move, MoveKind, Verdict
from l4queue.protocol.keys import SOLO_STAGE, is_private_queue
from l4queue.protocol.records import NO_QUOTA, BackgroundQuota

__all__ = ("ALWAYS_MS", "HISTORY_MS", "MAX_CRASHES", "MAX_GRACES", "Held", "Lease", "Model", "Req")

S = RequestState
MAX_CRASHES, MAX_GRACES = 2, 3
HISTORY_MS, ALWAYS_MS = 3_600_000, 10**13  # longer than any history; longer ago than any score or arrival


@dataclass(slots=True)
class Req:
    """What the record of a request should say."""

    charge: int
    digest: str
    state: RequestState = RequestState.SUBMITTED
    stage: str = ""
    score: float = 0.0
    tokens: int = 0  # of the prompt
    epoch: int = 0
    offset: int = 0
    crashes: int = 0
    solo_crashes: int = 0
    owner: str | None = None
    settled_epoch: int | None = None
    is_late: bool = False
    is_moved: bool = False  # went back to a queue and has made no token since
    came_from: str = ""
    worker: str = ""
    kv: str = ""
    home: str = "0"  # its stage before it was to be run alone
    ledger: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Lease:
    """What a registered worker should have."""

    is_lapsed: bool = False
    graces: int = 0
    alone: str | None = None
    nonce: str = ""
    granted: list[tuple[str, int]] = field(default_factory=list)


@dataclass(slots=True)
class Held:
    """A grant as its worker remembers it, for ever, whatever became of it."""

    request_id: str
    worker: str
    epoch: int
    offset: int


class Model:
    """All of it, and what each transition does to it."""

    def __init__(self) -> None:
        self.reqs: dict[str, Req] = {}
        self.leases: dict[str, Lease] = {}
        self.counts: Counter[str] = Counter()
        self.lost: dict[str, dict[str, bool]] = {}  # blamed for each loss of a worker: id -> whether alone
        self.foreground: set[str] = set()  # stages to which a request came that is not background

    # looking ------------------------------------------------------------------------------------
    def waiting(self, stage: str) -> list[str]:
        """Ids in one queue, in serving order."""
        here = [(r.score, i) for i, r in self.reqs.items() if r.state is S.QUEUED and r.stage == stage]
        return [i for _, i in sorted(here)]

    def in_order(self, stage: str) -> list[str]:
        """The same as a worker goes through them: background requests in their place by arrival."""
        places = {i: (self.reqs[i].score, 0, i) for i in self.waiting(stage)}
        for i, (score, _, _) in places.items():
            if score >= BACKGROUND:
                places[i] = (score - BACKGROUND, 1, i)
        return sorted(places, key=lambda i: places[i])

    def held(self, worker: str) -> set[str]:
        """Ids under a worker's lease."""
        return {i for i, r in self.reqs.items() if r.state is S.RUNNING and r.owner == worker}

    def owns(self, grant: Held) -> bool:
        """Whether a grant is still the lease in force."""
        req = self.reqs[grant.request_id]
        return (req.state, req.owner, req.epoch) == (S.RUNNING, grant.worker, grant.epoch)

    # endings ------------------------------------------------------------------------------------
    def end(self, request_id: str, state: RequestState) -> None:
        """The one outcome."""
        req = self.reqs[request_id]
        assert req.state not in TERMINAL
        req.state, req.owner = state, None

    def expire(self) -> int:
        """All that is late ends; how many."""
        late = [i for i, r in self.reqs.items() if r.is_late and r.state not in TERMINAL]
        for request_id in late:
            self.end(request_id, S.EXPIRED)
        return len(late)

    # going back ---------------------------------------------------------------------------------
    def requeue(self, request_id: str, what: str, *, stage: str = "", kv: str = "") -> None:
        """Back to a queue, with its progress."""
        req = self.reqs[request_id]
        if req.crashes >= 2:
            req.home = req.home if req.stage == SOLO_STAGE else req.stage
            req.stage = SOLO_STAGE
        else:
            req.stage = stage or req.stage
            req.stage = req.home if req.stage == SOLO_STAGE else req.stage
        req.state, req.owner, req.kv = S.QUEUED, None, kv
        req.is_moved, req.came_from = True, req.worker
        req.ledger.append(what)

    def crash(self, request_id: str, what: str, *, stage: str = "") -> None:
        """The same with blame, which may condemn it."""
        req = self.reqs[request_id]
        req.crashes += 1
        if req.stage == SOLO_STAGE:
            req.solo_crashes += 1
            if req.solo_crashes >= MAX_CRASHES:
                self.end(request_id, S.DEAD)
                return
        self.requeue(request_id, what, stage=stage)

    def release(self, grant: Held, *, stage: str, blame: bool, move: Move | None) -> Verdict:
        """A worker gives back, or moves on, what it has or had."""
        req = self.reqs[grant.request_id]
        if req.state in (S.QUEUED, S.DEAD) and req.epoch == grant.epoch:
            return Verdict.DUP
        if not self.owns(grant):
            return Verdict.FENCED
        if blame:
            self.crash(grant.request_id, "crashed", stage=stage)
        elif move is None:
            self.requeue(grant.request_id, "released", stage=stage)
        else:
            self.counts["steals_running" if move.kind is MoveKind.STEAL else "handovers"] += 1
            self.requeue(grant.request_id, move.kind.value, stage=stage, kv=move.kv)
        return Verdict.OK

    def reap(self, *, outage: bool) -> tuple[int, int, bool]:
        """What a reaper finds: (requeued, dead, whether it gave grace)."""
        was_graced = False
        for lease in self.leases.values():
            if outage:
                lease.graces += 1
                if lease.graces <= MAX_GRACES:
                    lease.is_lapsed, was_graced = False, True
        gone = [worker for worker, lease in self.leases.items() if lease.is_lapsed]
        victims = [(i, worker) for worker in gone for i in self.held(worker)]
        for request_id, worker in victims:
            was_alone = self.reqs[request_id].stage == SOLO_STAGE
            self.crash(request_id, "lost")
            if self.reqs[request_id].state is not S.DEAD:
                self.lost.setdefault(worker, {})[request_id] = was_alone
        for worker in gone:
            del self.leases[worker]
        num_dead = sum(self.reqs[i].state is S.DEAD for i, _ in victims)
        return len(victims) - num_dead, num_dead, was_graced

    def pardon(self, worker: str, guilty: set[str]) -> None:
        """A worker that was given up has not died."""
        for request_id, was_alone in self.lost.pop(worker, {}).items():
            req = self.reqs[request_id]
            if req.state in TERMINAL or request_id in guilty or not req.crashes:
                continue
            req.crashes -= 1
            req.solo_crashes -= was_alone
            if req.state is S.QUEUED and req.stage == SOLO_STAGE and req.crashes < 2:
                req.stage = req.home
            req.ledger.append("rerouted")
            self.counts["pardoned"] += 1

    def retire(self, worker: str) -> None:
        """A worker leaves."""
        for request_id in self.held(worker):
            self.requeue(request_id, "left")
        self.leases.pop(worker, None)

    def migrate(self, source: str, highs: Sequence[int], *, skip: int, limit: int) -> tuple[int, int]:
        """By length, as of now: (moved, looked at)."""
        seen, num_moved = self.waiting(source)[skip : skip + limit], 0
        for request_id in seen:
            req = self.reqs[request_id]
            goal = str(sum(req.tokens + req.offset >= high for high in highs))
            if goal != source:
                req.stage, num_moved = goal, num_moved + 1
                req.ledger.append("rerouted")
        return num_moved, len(seen)

    # going on -----------------------------------------------------------------------------------
    def take(
        self, worker: str, stage: str, most: int, *, nonce: str, home: str, hold: BackgroundQuota = NO_QUOTA
    ) -> list[tuple[str, int]] | None:
        """Grants (id, epoch) of a worker whose own stage is `home`; None: it has no lease.

        All scores lie long ago: `hold.overdue_ms` is either nothing, or longer than any time that has passed.
        """
        lease = self.leases.get(worker)
        if lease is None:
            return None
        if lease.nonce == nonce:
            return [(i, e) for i, e in lease.granted if self.owns(Held(i, worker, e, 0))]
        if lease.is_lapsed:
            return None
        held = self.held(worker)
        if lease.alone in held or (stage == SOLO_STAGE and held):
            return []
        lease.alone, granted = None, list[tuple[str, int]]()
        most = min(most, 1) if stage == SOLO_STAGE else most
        is_holding = hold.for_ms == ALWAYS_MS or (hold.for_ms > 0 and home in self.foreground)
        background = hold.max_requests if is_holding else most
        for request_id in self.in_order(stage):
            is_background = hold.overdue_ms > 0 and self.reqs[request_id].score >= BACKGROUND
            if len(granted) >= most:
                break
            if is_background and background <= 0:
                continue
            if self.reqs[request_id].is_late:
                self.end(request_id, S.EXPIRED)
                continue
            background -= is_background
            granted.append((request_id, self._grant(request_id, worker, stage, home)))
            lease.alone = request_id if stage == SOLO_STAGE else None
        if granted:  # the repeat of a take that found nothing is another take
            lease.nonce, lease.granted = nonce, granted
        return granted

    def _grant(self, request_id: str, worker: str, stage: str, home: str) -> int:
        req = self.reqs[request_id]
        req.state, req.owner, req.worker, req.epoch = S.RUNNING, worker, worker, req.epoch + 1
        if is_private_queue(stage):
            req.stage = home
        elif stage not in (home, SOLO_STAGE):
            self.counts["steals_waiting"] += 1
            req.ledger.append("stolen")
            return req.epoch
        if req.epoch > 1:
            req.ledger.append("taken")
        return req.epoch

    def wrote(self, request_id: str, upto: int) -> None:
        """Tokens were written up to this offset."""
        req = self.reqs[request_id]
        if upto > req.offset and req.is_moved:
            req.is_moved = False
            req.ledger.append("resumed")
            self.counts["resumes"] += 1
        req.offset = upto
