"""Names of all keys. They share one hash tag, so a Redis Cluster keeps them in one slot."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ("SOLO_STAGE", "Keys", "is_private_queue", "private_queue")

SOLO_STAGE = "solo"
"""Queue of requests that are run alone because two workers died with them."""


def private_queue(worker_id: str) -> str:
    """The queue of what only this worker is to take: handed over to it, or pushed to it by a router."""
    return "@" + worker_id


def is_private_queue(stage: str) -> bool:
    """Whether a stage name is a worker's own queue."""
    return stage.startswith("@")


@dataclass(frozen=True, slots=True)
class Keys:
    """Key names under one namespace; `docs/keys.md` says type, writer, reader and TTL of each."""

    namespace: str

    @property
    def prefix(self) -> str:
        """The hash tag and separator that begin every key."""
        return "{" + self.namespace + "}:"

    @property
    def inbox(self) -> str:
        return self.prefix + "in"

    @property
    def counts(self) -> str:
        return self.prefix + "counts"

    @property
    def backlog(self) -> str:
        return self.prefix + "backlog"

    @property
    def foreground(self) -> str:
        return self.prefix + "foreground"

    @property
    def hist(self) -> str:
        return self.prefix + "hist"

    @property
    def workers(self) -> str:
        return self.prefix + "workers"

    @property
    def thieves(self) -> str:
        return self.prefix + "thieves"

    @property
    def survey(self) -> str:
        return self.prefix + "survey"

    @property
    def deadlines(self) -> str:
        return self.prefix + "deadlines"

    @property
    def tick(self) -> str:
        return self.prefix + "tick"

    @property
    def dead(self) -> str:
        return self.prefix + "dead"

    @property
    def finished(self) -> str:
        return self.prefix + "finished"

    @property
    def packed(self) -> str:
        return self.prefix + "packed"

    @property
    def results(self) -> str:
        return self.prefix + "results"

    @property
    def read(self) -> str:
        return self.prefix + "read"

    @property
    def keyed(self) -> str:
        return self.prefix + "keyed"

    @property
    def plan(self) -> str:
        return self.prefix + "plan"

    @property
    def plans(self) -> str:
        return self.prefix + "plans"

    @property
    def memory(self) -> str:
        return self.prefix + "memory"

    @property
    def decisions(self) -> str:
        return self.prefix + "decisions"

    def request(self, request_id: str) -> str:
        return f"{self.prefix}req:{request_id}"

    def output(self, request_id: str) -> str:
        return f"{self.prefix}out:{request_id}"

    def queue(self, stage: str) -> str:
        return f"{self.prefix}q:{stage}"

    def ready(self, stage: str) -> str:
        return f"{self.prefix}ready:{stage}"

    def wake(self, stage: str) -> str:
        return f"{self.prefix}wake:{stage}"

    def dispatcher(self, host: str) -> str:
        return f"{self.prefix}d:{host}"

    def name(self, name: str) -> str:
        return f"{self.prefix}name:{name}"

    def worker(self, incarnation: str) -> str:
        return f"{self.prefix}w:{incarnation}"

    def held(self, incarnation: str) -> str:
        return f"{self.prefix}held:{incarnation}"

    def blocks(self, incarnation: str) -> str:
        return f"{self.prefix}blocks:{incarnation}"

    def lost(self, incarnation: str) -> str:
        return f"{self.prefix}lost:{incarnation}"

    def control(self, incarnation: str) -> str:
        return f"{self.prefix}ctl:{incarnation}"

    def mailbox(self, client_id: str) -> str:
        return f"{self.prefix}mail:{client_id}"

    def news(self, client_id: str) -> str:
        return f"{self.prefix}news:{client_id}"

    def limit(self, caller: str) -> str:
        return f"{self.prefix}limit:{caller}"

    def charged(self, caller: str) -> str:
        return f"{self.prefix}charged:{caller}"

    def file(self, file_id: str) -> str:
        return f"{self.prefix}file:{file_id}"

    def files(self, owner: str) -> str:
        return f"{self.prefix}files:{owner}"

    def files_due(self, store: str) -> str:
        return f"{self.prefix}files_due:{store}"

    def batch(self, batch_id: str) -> str:
        return f"{self.prefix}batch:{batch_id}"

    def batch_parts(self, batch_id: str) -> str:
        return f"{self.prefix}parts:{batch_id}"

    def batches(self, owner: str) -> str:
        return f"{self.prefix}batches:{owner}"

    def open_batches(self, store: str) -> str:
        return f"{self.prefix}open:{store}"
