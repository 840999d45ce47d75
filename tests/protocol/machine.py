"""Random histories are played on a real server and on the model, and compared after every step."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from l4queue.models import TERMINAL, RequestState
from l4queue.policy.queue_order import BACKGROUND
from l4queue.protocol.calls import Move, MoveKind, Verdict
from l4queue.protocol.executor import Executor
from l4queue.protocol.keys import SOLO_STAGE, private_queue
from l4queue.protocol.records import BackgroundQuota, Outcome
from tests.protocol.agreement import agree
from tests.protocol.consistency import check
from tests.protocol.model import ALWAYS_MS, HISTORY_MS, MAX_CRASHES, Held, Lease, Model, Req
from tests.protocol.scene import Scene

__all__ = ("ProtocolMachine",)

S = RequestState
MAX_REQUESTS, BOUND_TOKENS = 7, 60
NAMES = ("w1", "w2", "w3")
PERSONAL = tuple(private_queue(name) for name in NAMES)
WORKERS = st.sampled_from(NAMES)
STAGES = st.sampled_from(["0", "1"])
COUNTS = st.sampled_from([1, 2, 3, 0])
RARELY = st.sampled_from([False, False, False, True])
PLACES = st.sampled_from([0.0, 1.0, 2.0, 3.0, BACKGROUND, BACKGROUND + 1.0, BACKGROUND + 2.0])
HOLDS = st.builds(  # by what came since this history began, or always, or never; overdue is nothing, or all of it
    BackgroundQuota,
    for_ms=st.sampled_from([HISTORY_MS, HISTORY_MS, ALWAYS_MS, 0]),
    max_requests=st.sampled_from([0, 0, 1, 2]),
    overdue_ms=st.sampled_from([ALWAYS_MS, ALWAYS_MS, ALWAYS_MS, 0]),
)
SHIFTS = st.sampled_from([0, 0, 0, 0, -1, 1])
TARGETS = st.sampled_from(["", "", "0", "1", *PERSONAL])
HIGHS = st.sampled_from([(), (0,), (3,), (4,), (5,)])
MOVES = st.sampled_from(
    [
        None,
        Move(kind=MoveKind.HANDOVER, benefit_ms=3.0, cost_ms=1.0, kv="seg-1"),
        Move(kind=MoveKind.HANDOVER, benefit_ms=3.0, cost_ms=1.0),
        Move(kind=MoveKind.STEAL, benefit_ms=2.0, cost_ms=0.5, kv="seg-2"),
    ]
)
DISTURBANCES = st.sampled_from(
    ["cancel", "late", "expire", "retire", "publish", "route", "repair", "renew", "extend"]
)


class ProtocolMachine(RuleBasedStateMachine):
    """Rules are what clients, dispatchers, workers and reapers may do at any moment, in any order."""

    executor: Executor  # set by the test; its database belongs to the machine alone

    def __init__(self) -> None:
        super().__init__()
        self.scene = Scene(self.executor, "m")
        self.scene.raw.flushdb()
        self.model = Model()
        self.grants: list[Held] = []
        self.entries: dict[str, str] = {}
        self.seen: dict[str, list[tuple[int, ...]]] = {}
        self.version = 0
        self.num_nonces = 0

    def teardown(self) -> None:
        self.scene.close()

    @property
    def reqs(self) -> dict[str, Req]:
        return self.model.reqs

    # clients ------------------------------------------------------------------------------------
    @rule(
        data=st.data(),
        charge=st.integers(1, 30),
        digest=st.sampled_from(["", "x"]),
        stage=st.sampled_from(["0", "1", "0", "1", *PERSONAL]),
        score=PLACES,
        again=RARELY,
        waits=RARELY,
    )
    def arrive(
        self, *, data: st.DataObject, charge: int, digest: str, stage: str, score: float, again: bool, waits: bool
    ) -> None:
        """A request comes in, or once more; most are routed at once (some pushed to one worker), some twice."""
        request_id = f"r{len(self.reqs)}"
        if self.reqs and (again or len(self.reqs) == MAX_REQUESTS):
            request_id = self._some_id(data)
        self._submit(request_id, charge, digest)
        if not waits:
            self._route(request_id, stage, score, tokens=1 + charge % 4)
            if again:
                self._route(request_id, "1", 0, tokens=1)

    def _submit(self, request_id: str, charge: int, digest: str) -> None:
        live = sum(r.charge for r in self.reqs.values() if r.state not in TERMINAL)
        known = self.reqs.get(request_id)
        if known is not None:
            expected = Verdict.DUP if known.digest == digest else Verdict.CONFLICT
        else:
            expected = Verdict.FULL if live > 0 and live + charge > BOUND_TOKENS else Verdict.OK
        reply = self.scene.submit(
            request_id, charge_tokens=charge, digest=digest, max_live_tokens=BOUND_TOKENS, ttl_ms=600_000
        )
        assert reply.verdict is expected
        if expected is Verdict.OK:
            self.reqs[request_id] = Req(charge=charge, digest=digest)
            self.entries[request_id] = self.scene.entry(request_id)

    def _cancel(self, request_id: str) -> None:
        req = self.reqs.get(request_id)
        expected: tuple[Verdict, str | None] = (Verdict.OK, None)
        if req is None:
            expected = (Verdict.UNKNOWN, None)
        elif req.state in TERMINAL:
            expected = (Verdict.IS, req.state.value)
        assert self.scene.cancel(request_id) == expected
        if expected[0] is Verdict.OK:
            self.model.end(request_id, S.CANCELLED)

    def _some_id(self, data: st.DataObject) -> str:
        return f"r{data.draw(st.integers(0, max(0, len(self.reqs) - 1)))}"

    # dispatchers --------------------------------------------------------------------------------
    def _route(self, request_id: str, stage: str, score: float, *, tokens: int, refuse: bool = False) -> None:
        req, entry = self.reqs.get(request_id), self.entries.get(request_id, "1-1")
        is_first = req is not None and req.state is S.SUBMITTED
        expected = Verdict.OK if is_first else Verdict.DUP
        if refuse:
            assert self.scene.refuse(request_id, entry=entry) is expected
            if is_first:
                self.model.end(request_id, S.FAILED)
            return
        verdict = self.scene.route(
            request_id, entry=entry, stage=stage, score=float(score), token_ids=[1] * tokens, max_tokens=6
        )
        assert verdict is expected
        if is_first and req is not None:
            req.state, req.stage, req.score = S.QUEUED, stage, float(score)
            req.tokens, req.charge = tokens, tokens + 6
            if score < BACKGROUND and stage not in PERSONAL:
                self.model.foreground.add(stage)

    # workers ------------------------------------------------------------------------------------
    @initialize()
    def begin(self) -> None:
        for worker in ("w1", "w2"):
            self._renew(worker, register=True)

    def _renew(self, worker: str, *, register: bool) -> None:
        leases = self.model.leases
        expected = Verdict.OK if worker in leases or register else Verdict.LOST
        assert self.scene.renew(worker, register=register, lease_ms=600_000) is expected
        if expected is Verdict.OK:
            lease = leases.setdefault(worker, Lease())
            lease.is_lapsed, lease.graces = False, 0

    def _extend(self, worker: str) -> None:
        lease = self.model.leases.get(worker)
        assert self.scene.extend(worker, lease_ms=600_000) is (Verdict.OK if lease else Verdict.LOST)
        if lease is not None:
            lease.is_lapsed, lease.graces = False, 0

    @rule(
        worker=WORKERS,
        stage=STAGES,
        home=STAGES,
        anywhere=RARELY,
        most=COUNTS,
        hold=HOLDS,
        lost=RARELY,
        again=RARELY,
    )
    def take(
        self,
        *,
        worker: str,
        stage: str,
        home: str,
        anywhere: bool,
        most: int,
        hold: BackgroundQuota,
        lost: bool,
        again: bool,
    ) -> None:
        """A worker takes where something waits, its own queue included; it may lose the reply and ask again."""
        if not anywhere:  # whoever has something in its own queue comes first
            worker = next((name for name in NAMES if self.model.waiting(private_queue(name))), worker)
        choice = (private_queue(worker), SOLO_STAGE, stage, "0", "1")
        waiting = [s for s in choice if self.model.waiting(s)]
        if waiting and not anywhere:
            stage = waiting[0]
        self.num_nonces += 1
        self._take(worker, stage, most, nonce=f"n{self.num_nonces}", home=home, hold=hold, is_lost=lost)
        lease = self.model.leases.get(worker)
        if again and lease is not None and lease.nonce:
            self._take(worker, stage, 3, nonce=lease.nonce, home=home, hold=hold, is_lost=False)

    def _take(
        self, worker: str, stage: str, most: int, *, nonce: str, home: str, hold: BackgroundQuota, is_lost: bool
    ) -> None:
        expected = self.model.take(worker, stage, most, nonce=nonce, home=home, hold=hold)
        taken = self.scene.take(worker, stage, nonce=nonce, max_requests=most, own_stage=home, hold=hold)
        if expected is None:
            assert taken.verdict is Verdict.LOST
            return
        told = [
            (i, e, r.offset, r.stage, r.kv, r.came_from, hold.overdue_ms > 0 and r.score >= BACKGROUND)
            for i, e in expected
            for r in (self.reqs[i],)
        ]
        found = [
            (g.request_id, g.epoch, g.offset, g.stage, g.kv, g.came_from, g.is_background) for g in taken.grants
        ]
        assert found == told
        if not is_lost:
            self.grants += [Held(g.request_id, worker, g.epoch, g.offset) for g in taken.grants]

    @precondition(lambda self: self.grants)
    @rule(data=st.data(), num=COUNTS, shift=SHIFTS, lost=RARELY)
    def emit(self, data: st.DataObject, num: int, shift: int, lost: bool) -> None:
        grant = self._some_grant(data)
        req, offset = self.reqs[grant.request_id], max(0, grant.offset + shift)
        if not self.model.owns(grant):
            expected = Verdict.FENCED
        elif offset + num <= req.offset:
            expected = Verdict.DUP
        elif offset != req.offset:
            expected = Verdict.HAVE if offset < req.offset else Verdict.GAP
        else:
            expected = Verdict.OK
        assert self.scene.emit(grant.request_id, grant.worker, grant.epoch, offset, num) is expected
        if expected is Verdict.OK:
            self.model.wrote(grant.request_id, offset + num)
        if expected is not Verdict.FENCED and not lost:
            grant.offset = req.offset

    @precondition(lambda self: self.grants)
    @rule(data=st.data(), num=COUNTS, state=st.sampled_from([S.DONE, S.DONE, S.FAILED]), shift=SHIFTS)
    def settle(self, data: st.DataObject, num: int, state: RequestState, shift: int) -> None:
        grant = self._some_grant(data)
        req, offset = self.reqs[grant.request_id], max(0, grant.offset + shift)
        if req.state is state and req.settled_epoch == grant.epoch:
            expected = Verdict.DUP
        elif not self.model.owns(grant):
            expected = Verdict.FENCED
        elif offset + num == req.offset or offset == req.offset:
            expected = Verdict.OK
        else:
            expected = Verdict.GAP
        assert self._settle(grant, offset, num, state) is expected
        if expected is Verdict.OK:
            req.settled_epoch = grant.epoch
            self.model.wrote(grant.request_id, offset + num)
            self.model.end(grant.request_id, state)

    def _settle(self, grant: Held, offset: int, num: int, state: RequestState) -> Verdict:
        call = self.scene.calls.settle(
            grant.request_id,
            incarnation=grant.worker,
            epoch=grant.epoch,
            offset=offset,
            token_ids=self.scene.tokens(grant.epoch, offset, num),
            text="",
            outcome=Outcome(state=state),
        )
        return self.scene.executor.run(call)

    @precondition(lambda self: self.grants)
    @rule(data=st.data(), stage=TARGETS, blame=RARELY, move=MOVES)
    def release(self, data: st.DataObject, stage: str, blame: bool, move: Move | None) -> None:
        """Given back, blamed, handed over to one worker (there or not), or given to a thief."""
        grant, move = self._some_grant(data), None if blame else move
        expected = self.model.release(grant, stage=stage, blame=blame, move=move)
        over: dict[str, Any] = {"stage": stage, "blame": blame, "move": move, "max_crashes": MAX_CRASHES}
        assert self.scene.release(grant.request_id, grant.worker, grant.epoch, **over) is expected

    def _some_grant(self, data: st.DataObject) -> Held:
        """Mostly a recent one; old ones are kept for ever, as zombies do."""
        recent = st.integers(1, min(4, len(self.grants)))
        return self.grants[-data.draw(recent | recent | st.integers(1, len(self.grants)))]

    # upkeep -------------------------------------------------------------------------------------
    @rule(
        data=st.data(),
        worker=WORKERS,
        outage=RARELY,
        lapses=st.sampled_from([True, True, False]),
        returns=st.booleans(),
        pardons=RARELY,
    )
    def reap(
        self, *, data: st.DataObject, worker: str, outage: bool, lapses: bool, returns: bool, pardons: bool
    ) -> None:
        """A worker dies or Redis was away; somebody reaps; the worker may come back, and not have died at all."""
        if lapses:
            self.scene.lapse(worker)
            if worker in self.model.leases:
                self.model.leases[worker].is_lapsed = True
        if outage:
            self.scene.raw.set(self.scene.keys.tick, 1)
        expected = self.model.reap(outage=outage)
        reaped = self.scene.reap(gap_ms=60_000, grace_ms=1_200_000, max_crashes=MAX_CRASHES)
        assert (reaped.num_requeued, reaped.num_dead, reaped.was_graced) == expected
        if returns:
            self._renew(worker, register=True)
        if pardons:
            guilty = {self._some_id(data)} if outage else set[str]()
            self.model.pardon(worker, guilty)
            assert self.scene.pardon(worker, *guilty) is Verdict.OK
            assert self.scene.pardon(worker, *guilty) is Verdict.OK

    @precondition(lambda self: any(r.state is S.QUEUED for r in self.reqs.values()))
    @rule(data=st.data(), stage=STAGES, highs=HIGHS, skip=st.sampled_from([0, 0, 1]), limit=st.integers(0, 4))
    def migrate(self, data: st.DataObject, stage: str, highs: tuple[int, ...], skip: int, limit: int) -> None:
        """What waits follows a new plan, or leaves the own queue of a worker that may be gone."""
        own = [s for s in PERSONAL if self.model.waiting(s)]
        source = data.draw(st.sampled_from([stage, *own]))
        expected = self.model.migrate(source, highs, skip=skip, limit=limit)
        call = self.scene.calls.migrate(source=source, highs=highs, limit=limit, skip=skip)
        answer = self.scene.executor.run(call)
        assert (answer.num_moved, answer.num_seen) == expected

    def _publish(self, *, behind: int) -> None:
        expected = max(0, self.version - behind)
        is_fresh = expected == self.version
        verdict = self.scene.publish(expected, expected + 1, f"{expected}")
        assert verdict is (Verdict.OK if is_fresh else Verdict.DUP)
        self.version += is_fresh
        assert self.scene.publish(self.version + 1, self.version + 2) is Verdict.STALE

    @rule(data=st.data(), kind=DISTURBANCES, worker=WORKERS, stage=STAGES, number=st.integers(0, 3))
    def disturb(self, data: st.DataObject, kind: str, worker: str, stage: str, number: int) -> None:
        """What happens now and then, at any moment, to anybody."""
        request_id = self._some_id(data)
        if kind == "cancel":
            self._cancel(request_id)
        elif kind == "late":
            req = self.reqs.get(request_id)
            if req is not None and req.state not in TERMINAL:
                self.scene.late(request_id)
                req.is_late = True
        elif kind == "expire":
            assert self.scene.expire() == self.model.expire()
        elif kind == "retire":
            self.model.retire(worker)
            assert self.scene.retire(worker) is Verdict.OK
        elif kind == "publish":
            self._publish(behind=number % 2)
        elif kind == "route":
            self._route(request_id, stage, number, tokens=1 + number, refuse=number == 3)
        elif kind == "renew":
            self._renew(worker, register=number > 1)
        elif kind == "extend":
            self._extend(worker)
        else:
            assert self.scene.repair(request_id) == "FINE", "the scripts leave nothing to repair"

    # what must hold -----------------------------------------------------------------------------
    @invariant()
    def the_server_agrees_with_the_model(self) -> None:
        check(self.scene)
        agree(self.scene, self.model, self.seen, stages=("0", "1", SOLO_STAGE, *PERSONAL))
