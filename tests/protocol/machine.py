"""The protocol as a dictionary: random histories are played on a real server and compared after every step."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from l4queue.models import TERMINAL, RequestState
from l4queue.protocol.calls import Verdict
from l4queue.protocol.door import Door
from l4queue.protocol.keys import SOLO_STAGE
from l4queue.protocol.records import Outcome
from tests.protocol.consistency import check
from tests.protocol.model import Held, Lease, Req
from tests.protocol.scene import Scene

__all__ = ("ProtocolMachine",)

S = RequestState
MAX_CRASHES, MAX_GRACES, MAX_REQUESTS, BOUND_TOKENS = 2, 3, 7, 60
WORKERS = st.sampled_from(["w1", "w2", "w3"])
STAGES = st.sampled_from(["0", "1"])
COUNTS = st.sampled_from([1, 2, 3, 0])
RARELY = st.sampled_from([False, False, False, True])
SHIFTS = st.sampled_from([0, 0, 0, 0, -1, 1])
DISTURBANCES = st.sampled_from(["cancel", "expire", "retire", "migrate", "publish", "route", "repair", "renew"])


class ProtocolMachine(RuleBasedStateMachine):
    """Rules are what clients, dispatchers, workers and reapers may do at any moment, in any order."""

    door: Door  # set by the test; its database belongs to the machine alone

    def __init__(self) -> None:
        super().__init__()
        self.scene = Scene(self.door, "m")
        self.scene.raw.flushdb()
        self.reqs: dict[str, Req] = {}
        self.leases: dict[str, Lease] = {}
        self.grants: list[Held] = []
        self.entries: dict[str, str] = {}
        self.seen: dict[str, list[tuple[int, ...]]] = {}
        self.version = 0
        self.num_nonces = 0

    def teardown(self) -> None:
        self.scene.close()

    # the model ----------------------------------------------------------------------------------
    def _waiting(self, stage: str) -> list[str]:
        here = [(r.score, i) for i, r in self.reqs.items() if r.state is S.QUEUED and r.stage == stage]
        return [i for _, i in sorted(here)]

    def _held(self, worker: str) -> set[str]:
        return {i for i, r in self.reqs.items() if r.state is S.RUNNING and r.owner == worker}

    def _owns(self, grant: Held) -> bool:
        req = self.reqs[grant.request_id]
        return (req.state, req.owner, req.epoch) == (S.RUNNING, grant.worker, grant.epoch)

    def _end(self, request_id: str, state: RequestState) -> None:
        req = self.reqs[request_id]
        req.state, req.owner = state, None

    def _requeue(self, request_id: str, stage: str = "") -> None:
        req = self.reqs[request_id]
        req.stage = SOLO_STAGE if req.crashes >= 2 else stage or req.stage
        req.state, req.owner = S.QUEUED, None

    def _crash(self, request_id: str, stage: str = "") -> None:
        req = self.reqs[request_id]
        req.crashes += 1
        if req.stage == SOLO_STAGE:
            req.solo_crashes += 1
            if req.solo_crashes >= MAX_CRASHES:
                self._end(request_id, S.DEAD)
                return
        self._requeue(request_id, stage)

    # clients ------------------------------------------------------------------------------------
    @rule(
        data=st.data(),
        charge=st.integers(1, 30),
        digest=st.sampled_from(["", "x"]),
        stage=STAGES,
        score=st.integers(0, 3),
        again=RARELY,
        waits=RARELY,
    )
    def arrive(
        self, *, data: st.DataObject, charge: int, digest: str, stage: str, score: int, again: bool, waits: bool
    ) -> None:
        """A request comes in, or once more; most are routed at once, and some twice."""
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
            self._end(request_id, S.CANCELLED)

    def _some_id(self, data: st.DataObject) -> str:
        return f"r{data.draw(st.integers(0, max(0, len(self.reqs) - 1)))}"

    # dispatchers --------------------------------------------------------------------------------
    def _route(self, request_id: str, stage: str, score: int, *, tokens: int, refuse: bool = False) -> None:
        req, entry = self.reqs.get(request_id), self.entries.get(request_id, "1-1")
        is_first = req is not None and req.state is S.SUBMITTED
        expected = Verdict.OK if is_first else Verdict.DUP
        if refuse:
            assert self.scene.refuse(request_id, entry=entry) is expected
            if is_first:
                self._end(request_id, S.FAILED)
            return
        verdict = self.scene.route(
            request_id, entry=entry, stage=stage, score=float(score), token_ids=[1] * tokens, max_tokens=6
        )
        assert verdict is expected
        if is_first and req is not None:
            req.state, req.stage, req.score, req.charge = S.QUEUED, stage, float(score), tokens + 6

    # workers ------------------------------------------------------------------------------------
    @initialize()
    def begin(self) -> None:
        for worker in ("w1", "w2"):
            self._renew(worker, register=True)

    def _renew(self, worker: str, *, register: bool) -> None:
        is_known = worker in self.leases
        expected = Verdict.OK if is_known or register else Verdict.LOST
        assert self.scene.renew(worker, register=register, lease_ms=600_000) is expected
        if expected is Verdict.OK:
            lease = self.leases.setdefault(worker, Lease())
            lease.is_lapsed, lease.graces = False, 0

    @rule(worker=WORKERS, stage=STAGES, anywhere=RARELY, most=COUNTS, lost=RARELY, again=RARELY)
    def take(self, worker: str, stage: str, anywhere: bool, most: int, lost: bool, again: bool) -> None:
        """A worker takes where something waits; its reply may be lost, and it may ask again."""
        waiting = [s for s in (SOLO_STAGE, stage, "0", "1") if self._waiting(s)]
        if waiting and not anywhere:
            stage = waiting[0]
        self.num_nonces += 1
        self._take(worker, stage, most, nonce=f"n{self.num_nonces}", is_lost=lost)
        lease = self.leases.get(worker)
        if again and lease is not None and lease.nonce:
            self._take(worker, stage, 3, nonce=lease.nonce, is_lost=False)

    def _take(self, worker: str, stage: str, most: int, *, nonce: str, is_lost: bool) -> None:
        expected = self._expected_grants(worker, stage, most, nonce)
        taken = self.scene.take(worker, stage, nonce=nonce, max_requests=most)
        if expected is None:
            assert taken.verdict is Verdict.LOST
            return
        found = [(g.request_id, g.epoch, g.offset) for g in taken.grants]
        assert found == [(i, epoch, self.reqs[i].offset) for i, epoch in expected]
        if not is_lost:
            self.grants += [Held(i, worker, epoch, offset) for i, epoch, offset in found]

    def _expected_grants(self, worker: str, stage: str, most: int, nonce: str) -> list[tuple[str, int]] | None:
        lease = self.leases.get(worker)
        if lease is None:
            return None
        if lease.nonce == nonce:
            return [(i, e) for i, e in lease.granted if self._owns(Held(i, worker, e, 0))]
        if lease.is_lapsed:
            return None
        held = self._held(worker)
        if lease.alone in held or (stage == SOLO_STAGE and held):
            return []
        lease.alone = None
        lease.nonce, lease.granted = nonce, []
        for request_id in self._waiting(stage)[: min(most, 1) if stage == SOLO_STAGE else most]:
            req = self.reqs[request_id]
            req.state, req.owner, req.epoch = S.RUNNING, worker, req.epoch + 1
            lease.granted.append((request_id, req.epoch))
            lease.alone = request_id if stage == SOLO_STAGE else None
        return lease.granted

    @precondition(lambda self: self.grants)
    @rule(data=st.data(), num=COUNTS, shift=SHIFTS, lost=RARELY)
    def emit(self, data: st.DataObject, num: int, shift: int, lost: bool) -> None:
        grant = self._some_grant(data)
        req, offset = self.reqs[grant.request_id], max(0, grant.offset + shift)
        if not self._owns(grant):
            expected = Verdict.FENCED
        elif offset + num <= req.offset:
            expected = Verdict.DUP
        elif offset != req.offset:
            expected = Verdict.HAVE if offset < req.offset else Verdict.GAP
        else:
            expected = Verdict.OK
        assert self.scene.emit(grant.request_id, grant.worker, grant.epoch, offset, num) is expected
        if expected is Verdict.OK:
            req.offset = offset + num
        if expected is not Verdict.FENCED and not lost:
            grant.offset = req.offset

    @precondition(lambda self: self.grants)
    @rule(data=st.data(), num=COUNTS, state=st.sampled_from([S.DONE, S.DONE, S.FAILED]), shift=SHIFTS)
    def settle(self, data: st.DataObject, num: int, state: RequestState, shift: int) -> None:
        grant = self._some_grant(data)
        req, offset = self.reqs[grant.request_id], max(0, grant.offset + shift)
        if req.state is state and req.settled_epoch == grant.epoch:
            expected = Verdict.DUP
        elif not self._owns(grant):
            expected = Verdict.FENCED
        elif offset + num == req.offset or offset == req.offset:
            expected = Verdict.OK
        else:
            expected = Verdict.GAP
        assert self._settle(grant, offset, num, state) is expected
        if expected is Verdict.OK:
            req.offset, req.settled_epoch = offset + num, grant.epoch
            self._end(grant.request_id, state)

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
        return self.scene.door.run(call)

    @precondition(lambda self: self.grants)
    @rule(data=st.data(), stage=st.sampled_from(["", "", "0", "1"]), blame=st.booleans())
    def release(self, data: st.DataObject, stage: str, blame: bool) -> None:
        grant = self._some_grant(data)
        req = self.reqs[grant.request_id]
        if req.state in (S.QUEUED, S.DEAD) and req.epoch == grant.epoch:
            expected = Verdict.DUP
        else:
            expected = Verdict.OK if self._owns(grant) else Verdict.FENCED
        verdict = self.scene.release(
            grant.request_id, grant.worker, grant.epoch, stage=stage, blame=blame, max_crashes=MAX_CRASHES
        )
        assert verdict is expected
        if expected is Verdict.OK and blame:
            self._crash(grant.request_id, stage)
        elif expected is Verdict.OK:
            self._requeue(grant.request_id, stage)

    def _retire(self, worker: str) -> None:
        assert self.scene.retire(worker) is Verdict.OK
        for request_id in self._held(worker):
            self._requeue(request_id)
        self.leases.pop(worker, None)

    def _some_grant(self, data: st.DataObject) -> Held:
        """Mostly a recent one; old ones are kept for ever, as zombies do."""
        recent = st.integers(1, min(4, len(self.grants)))
        return self.grants[-data.draw(recent | recent | st.integers(1, len(self.grants)))]

    # upkeep -------------------------------------------------------------------------------------
    @rule(worker=WORKERS, outage=RARELY, lapses=st.sampled_from([True, True, False]), returns=st.booleans())
    def reap(self, worker: str, outage: bool, lapses: bool, returns: bool) -> None:
        """A worker dies or Redis was away; somebody reaps; the worker may come back under its name."""
        if lapses:
            self.scene.lapse(worker)
            if worker in self.leases:
                self.leases[worker].is_lapsed = True
        self._reap(outage=outage)
        if returns:
            self._renew(worker, register=True)

    def _reap(self, *, outage: bool) -> None:
        if outage:
            self.scene.raw.set(self.scene.keys.tick, 1)
        was_graced = False
        for lease in self.leases.values():
            if outage:
                lease.graces += 1
                if lease.graces <= MAX_GRACES:
                    lease.is_lapsed, was_graced = False, True
        gone = [worker for worker, lease in self.leases.items() if lease.is_lapsed]
        victims = [i for worker in gone for i in self._held(worker)]
        for request_id in victims:
            self._crash(request_id)
        for worker in gone:
            del self.leases[worker]
        num_dead = sum(self.reqs[i].state is S.DEAD for i in victims)

        reaped = self.scene.reap(gap_ms=60_000, grace_ms=1_200_000, max_crashes=MAX_CRASHES)

        assert (reaped.num_requeued, reaped.num_dead) == (len(victims) - num_dead, num_dead)
        assert reaped.was_graced is was_graced

    def _expire(self, request_id: str) -> None:
        self.scene.overdue(request_id)
        req = self.reqs.get(request_id)
        is_due = req is not None and req.state not in TERMINAL
        assert self.scene.expire() == int(is_due)
        if is_due:
            self._end(request_id, S.EXPIRED)

    def _migrate(self, source: str, goal: str, limit: int) -> None:
        moved = [] if source == goal else self._waiting(source)[:limit]
        assert self.scene.migrate(source, goal, limit) == len(moved)
        for request_id in moved:
            self.reqs[request_id].stage = goal

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
        elif kind == "expire":
            self._expire(request_id)
        elif kind == "retire":
            self._retire(worker)
        elif kind == "migrate":
            self._migrate(stage, "0" if number == 0 else "1", 3 - number)
        elif kind == "publish":
            self._publish(behind=number % 2)
        elif kind == "route":
            self._route(request_id, stage, number, tokens=1 + number, refuse=number == 3)
        elif kind == "renew":
            self._renew(worker, register=number > 1)
        else:
            assert self.scene.repair(request_id) == "FINE", "the scripts leave nothing to repair"

    # what must hold -----------------------------------------------------------------------------
    @invariant()
    def the_server_agrees_with_the_model(self) -> None:
        check(self.scene)
        reads = self.scene.reads
        records: list[Any] = self.scene.door.run_many([reads.record(i) for i in self.reqs])
        outputs: list[Any] = self.scene.door.run_many([reads.output(i) for i in self.reqs])
        for (request_id, req), record, entries in zip(self.reqs.items(), records, outputs, strict=True):
            found = (record.state, record.epoch, record.offset, record.crashes, record.stage or "")
            assert found == (req.state, req.epoch, req.offset, req.crashes, req.stage), request_id
            shown = [entry.token_ids for entry in entries]
            before = self.seen.get(request_id, [])
            assert shown[: len(before)] == before, "what a client has read never changes"
            self.seen[request_id] = shown
        for stage in ("0", "1", SOLO_STAGE):
            assert self.scene.waiting(stage) == self._waiting(stage)
        assert {w for w, _ in self.scene.door.run(reads.incarnations())} == set(self.leases)
        for worker in self.leases:
            assert {m.decode() for m in self.scene.raw.smembers(self.scene.keys.held(worker))} == self._held(
                worker
            )
