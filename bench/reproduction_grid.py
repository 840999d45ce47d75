"""Which runs the reproduction is made of, group by group, the most telling first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from reproduction_cases import KNOWN, MIXED, PAPER, SESSIONS, UNKNOWN, Spec

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
SERVED = ("round-robin", "session-sticky", "cache-aware", "llm-d", "central")
DRAWING = ("l4", "random", "power-of-two", "llm-d", "dynamo-kv")
"""Policies that draw lots: others give the same run of a recorded trace with every seed."""
SPLITS = ("split", "split-by-load")
MOVING = ("l4", "llumnix", *SPLITS)
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
    """All traffic; without the shared traces only what is made here."""

    def __init__(self, *, has_traces: bool) -> None:
        self.known = (*(KNOWN if has_traces else ()), *SESSIONS)
        self.unknown = (PAPER, *((MIXED, *UNKNOWN) if has_traces else ()))
        self.fleets = tuple(case for case in ("conversation", "agent") if case in self.known)

    def specs(self) -> Iterator[Spec]:
        """All runs, in the order in which they are made, each once."""
        groups = (
            self.first(SEEDS[:1]),
            self.lengths(SEEDS[:1]),
            self.first(SEEDS[1:]),
            self.splits(),
            self.ingredients((FAST_LINK,), SEEDS[:1]),
            self.measured(SEEDS[:1]),
            self.fleet_sizes(SEEDS[:1]),
            self.served(self.known[:1]),
            self.other_loads(SEEDS[:1]),
            self.served(self.known[1:]),
            self.ingredients(ENDS, SEEDS[:1]),
            self.measured(SEEDS[1:]),
            self.ingredients((FAST_LINK,), SEEDS[1:]),
            self.pools(),
            self.fleet_sizes(SEEDS[1:]),
            self.other_loads(SEEDS[1:]),
            self.lengths(SEEDS[1:]),
            (replace(spec, policy="split") for spec in self.served(self.known) if spec.gb_per_s == FAST_LINK),
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
        for case, link, seed, name in product(self.known, (FAST_LINK, HOST_LINK), SEEDS, SPLITS):
            yield run(case, seed=seed, policy=name, gb_per_s=link)

    def pools(self) -> Iterator[Spec]:
        """Two pools by length, tuned on the trace."""
        yield from (run(case, policy="two-pool") for case in self.known)

    def ingredients(self, links: tuple[float, ...], seeds: tuple[int, ...]) -> Iterator[Spec]:
        """`l4` without each of its ingredients; those of stages, where affinity is left out."""
        for seed, link, case in product(seeds, links, self.known):
            whole = run(case, seed=seed, gb_per_s=link)
            yield from (replace(whole, without=(name,)) for name in BY_AFFINITY)
            yield from (replace(whole, without=("affinity", name)) for name in BY_STAGES)

    def measured(self, seeds: tuple[int, ...]) -> Iterator[Spec]:
        """With step costs measured on an H100."""
        for seed, case in product(seeds, self.known):
            yield from self.rivalry(run(case, seed=seed, gpu="h100-vllm"))
            yield run(case, seed=seed, gpu="h100-vllm", policy="split", gb_per_s=FAST_LINK)

    def fleet_sizes(self, seeds: tuple[int, ...]) -> Iterator[Spec]:
        """Smaller fleets and a larger one, at the same load."""
        for seed, case, number in product(seeds, self.fleets, FLEETS):
            yield from self.rivalry(run(case, seed=seed, num_instances=number))

    def other_loads(self, seeds: tuple[int, ...]) -> Iterator[Spec]:
        """Below and at the capacity."""
        for seed, case, load in product(seeds, self.known, LOADS):
            yield from self.rivalry(run(case, seed=seed, load=load))

    def served(self, cases: tuple[str, ...]) -> Iterator[Spec]:
        """The search for the largest load within the service level."""
        for case in cases:
            level = run(case, share=SHARE, first=SERVED_REQUESTS)
            yield from (replace(level, gb_per_s=link) for link in ENDS)
            yield from (replace(level, policy=name) for name in SERVED)

    def lengths(self, seeds: tuple[int, ...]) -> Iterator[Spec]:
        """Where nothing is known of the content: `l4` by stages, and length-blind policies."""
        for case, seed in product(self.unknown, seeds):
            yield from (run(case, seed=seed, gb_per_s=link) for link in ENDS)
            yield from (run(case, seed=seed, policy=name) for name in LENGTH_BLIND)
            yield run(case, seed=seed, policy="llumnix", gb_per_s=FAST_LINK)

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
