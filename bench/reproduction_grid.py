"""Which runs the reproduction is made of, group by group, the most telling first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from reproduction_cases import KNOWN, MIXED, PAPER, SESSIONS, UNKNOWN, Spec, shared

from l4queue.cost.move import DEFAULT_LINK_GB_PER_S
from l4queue.sim.registry import AFFINITY, LENGTH_BLIND

SEEDS = (0, 1, 2)
HOST_LINK, FAST_LINK = 1.5, 50.0
"""GB/s: shared memory of a host with a GPU, as measured (docs/kv-handover.md), and a network of 400 Gbit/s."""
LINKS = (DEFAULT_LINK_GB_PER_S, HOST_LINK, FAST_LINK)
ENDS = (DEFAULT_LINK_GB_PER_S, FAST_LINK)
ROUTERS = ("round-robin", "least-requests", "power-of-two", "llumnix", *AFFINITY)
"""Routers as they are run (docs/routers.md): the best of them is what `l4` is compared with."""
QUEUES = ("central", "central-sjf")
RIVALS = ("least-requests", *AFFINITY)
"""Routers that are run where all would take too long."""
SERVED = ("round-robin", "least-requests", "session-sticky", "cache-aware", "llm-d")
DRAWING = ("l4", "random", "power-of-two", "llm-d", "dynamo-kv")
"""Policies that draw lots: others give the same run of a recorded trace with every seed."""
MOVING = ("l4", "llumnix", "split")
"""Policies for which the link makes a difference."""
BY_AFFINITY = ("affinity", "escape", "running-steals", "late-binding", "order")
BY_STAGES = ("classes", "hand-over", "stealing", "escape", "order")
FLEETS = (2, 4, 8, 32)
"""Instances, beside the sixteen of all other tables."""
LOADS = (0.7, 1.0)
"""Shares of the capacity, beside 0.85."""
SHARE, SERVED_REQUESTS = 0.95, 3000
"""The paper's service level, and the first requests of a window that a search for it serves."""


class Grid:
    """Traffic that is there. Without the shared traces only what is made here is run."""

    def __init__(self) -> None:
        is_there = shared().is_dir()
        self.known = (*(KNOWN if is_there else ()), *SESSIONS)
        self.unknown = (PAPER, *((MIXED, *UNKNOWN) if is_there else ()))
        self.fleets = tuple(case for case in ("conversation", "agent") if case in self.known)

    def specs(self) -> Iterator[Spec]:
        """All runs, in the order in which they are made, each once."""
        groups = (
            self.first(SEEDS[:1]),
            self.lengths(SEEDS[:1]),
            self.first(SEEDS[1:]),
            self.splits(),
            self.ingredients((FAST_LINK,)),
            self.measured(),
            self.fleet_sizes(),
            self.other_loads(),
            self.served(),
            self.ingredients(ENDS),
            self.lengths(SEEDS[1:]),
            self.pools(),
        )
        yield from dict.fromkeys(spec for group in groups for spec in group)

    def first(self, seeds: tuple[int, ...]) -> Iterator[Spec]:
        """`l4` with each link, and every router, where the content is known."""
        for case, seed in product(self.known, seeds):
            yield from (run(case, seed=seed, gb_per_s=link) for link in LINKS)
            yield from (run(case, seed=seed, policy=name) for name in (*ROUTERS, *QUEUES))
            yield from (run(case, seed=seed, policy="llumnix", gb_per_s=link) for link in LINKS)

    def splits(self) -> Iterator[Spec]:
        """Prefill apart from decode, with each link that there may be."""
        for case, link, seed in product(self.known, (FAST_LINK, HOST_LINK), SEEDS):
            yield run(case, seed=seed, policy="split", gb_per_s=link)

    def pools(self) -> Iterator[Spec]:
        """Two pools by length, tuned on the trace."""
        yield from (run(case, policy="two-pool") for case in self.known)

    def ingredients(self, links: tuple[float, ...]) -> Iterator[Spec]:
        """`l4` without each of its ingredients; those of stages, where affinity is left out."""
        for link, case in product(links, self.known):
            yield from (run(case, without=(name,), gb_per_s=link) for name in BY_AFFINITY)
            yield from (run(case, without=("affinity", name), gb_per_s=link) for name in BY_STAGES)

    def measured(self) -> Iterator[Spec]:
        """With step costs measured on an H100."""
        for case in self.known:
            yield from self.rivalry(run(case, gpu="h100-vllm"))
            yield run(case, gpu="h100-vllm", policy="split", gb_per_s=FAST_LINK)

    def fleet_sizes(self) -> Iterator[Spec]:
        """Smaller fleets and a larger one, at the same load."""
        for case, number in product(self.fleets, FLEETS):
            yield from self.rivalry(run(case, num_instances=number))

    def other_loads(self) -> Iterator[Spec]:
        """Below and at the capacity."""
        for case, load in product(self.known, LOADS):
            yield from self.rivalry(run(case, load=load))

    def served(self) -> Iterator[Spec]:
        """The search for the largest load within the service level."""
        for case in self.known:
            level = run(case, share=SHARE, first=SERVED_REQUESTS)
            yield from (replace(level, gb_per_s=link) for link in ENDS)
            yield from (replace(level, policy=name) for name in SERVED)

    def lengths(self, seeds: tuple[int, ...]) -> Iterator[Spec]:
        """Where nothing is known of the content: `l4` by stages, and length-blind policies."""
        for case, seed in product(self.unknown, seeds):
            yield from (run(case, seed=seed, gb_per_s=link) for link in ENDS)
            yield from (run(case, seed=seed, policy=name) for name in LENGTH_BLIND)

    def rivalry(self, spec: Spec) -> Iterator[Spec]:
        """`l4` with and without a link, and the routers that are run everywhere."""
        yield from (replace(spec, gb_per_s=link) for link in ENDS)
        yield from (normal(replace(spec, policy=name)) for name in RIVALS)


def run(case: str, **told: object) -> Spec:
    """A run, without the distinctions that make no difference."""
    return normal(Spec.of({"case": case, **told}))


def normal(spec: Spec) -> Spec:
    """The run that is the same, with the least seed and the default link."""
    if spec.policy not in MOVING:
        spec = replace(spec, gb_per_s=DEFAULT_LINK_GB_PER_S)
    if spec.policy not in DRAWING and spec.case not in SESSIONS:
        spec = replace(spec, seed=0)
    return spec
